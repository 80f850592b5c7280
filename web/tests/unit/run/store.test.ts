import { expect, test } from "vitest";
import { startRun } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { finished, prefill, stepMessage } from "./messages";

function storeOfFrames() {
  const frames: (() => void)[] = [];
  const store = new RunStore(startRun({ prompt: "x" }, "2026-01-31T12:00:00Z"), (flush) => {
    frames.push(flush);
  });
  const draw = () => {
    for (const flush of frames.splice(0)) flush();
  };
  return { store, frames, draw };
}

test("messages change the run at once, listeners hear once a frame", () => {
  const { store, frames, draw } = storeOfFrames();
  let calls = 0;
  const leave = store.subscribe(() => {
    calls += 1;
  });
  store.receive(prefill("a"), 1);
  store.receive(stepMessage([" b"], " c"), 2);
  store.receive(stepMessage([], " d"), 3);
  expect(store.run.tokens).toHaveLength(4);
  expect([calls, store.version(), frames.length]).toEqual([0, 0, 1]);
  draw();
  expect([calls, store.version()]).toEqual([1, 1]);
  store.receive(finished(), 4);
  draw();
  expect([calls, store.version()]).toEqual([2, 2]);
  leave();
  store.receive(finished(), 5);
  draw();
  expect(calls).toBe(2);
});

test("phases of the page's own are told, and do not wake a run that has ended", () => {
  const { store, draw } = storeOfFrames();
  store.setPhase("reconnecting");
  draw();
  expect([store.run.phase, store.version()]).toEqual(["reconnecting", 1]);
  store.receive(finished(), 4);
  store.setPhase("reconnecting");
  expect(store.run.phase).toBe("finished");
});
