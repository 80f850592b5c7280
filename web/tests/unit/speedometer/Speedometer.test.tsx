import { act, cleanup, render } from "@testing-library/react";
import { afterEach, describe, expect, it } from "vitest";
import { Player } from "../../../src/run/player";
import { startRun } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { Speedometer } from "../../../src/view/speedometer/Speedometer";
import { generatedRun } from "../tree/runs";

afterEach(cleanup);

function open(run = generatedRun(1, 30)) {
  const store = new RunStore(run, (flush) => flush());
  const player = new Player(() => run.steps.length);
  const { container } = render(<Speedometer store={store} player={player} />);
  const textOf = (selector: string) => container.querySelector(selector)?.textContent;
  const label = () => container.querySelector("figure")?.getAttribute("aria-label");
  const needle = () => container.querySelector(".speedometer__needle")?.getAttribute("style");
  return { store, player, container, textOf, label, needle };
}

describe("Speedometer", () => {
  it("is measuring before there are figures", () => {
    const { textOf, label, container } = open(startRun({ prompt: "x" }, ""));
    expect(label()).toBe("Speed: measuring");
    expect(textOf(".speedometer__average")).toBe("–");
    expect(textOf(".speedometer__speedup")).toBe("–");
    expect(container.textContent).toContain("measuring");
    expect(container.querySelector(".speedometer__plain")).toBeNull();
  });

  it("shows average, plain decoding and speedup", () => {
    const run = generatedRun(1, 30);
    const { textOf, label, container } = open(run);
    const step = run.steps[29];
    expect(textOf(".speedometer__average")).toBe(step?.tokensPerSecond?.toFixed(0));
    expect(textOf(".speedometer__speedup")).toBe(`${step?.speedup?.toFixed(1)}×`);
    expect(textOf(".speedometer__unit--plain")).toContain("96 tok/s");
    expect(container.querySelector(".speedometer__plain")).not.toBeNull();
    expect(label()).toMatch(/^Speed: \d+ tokens per second on average, \d+ in the last second, plain decoding 96, /);
  });

  it("does without a plain speed", () => {
    const { textOf, container, label } = open(generatedRun(1, 30, { plainTokensPerSecond: null }));
    expect(textOf(".speedometer__speedup")).toBe("–");
    expect(textOf(".speedometer__average")).not.toBe("–");
    expect(container.querySelector(".speedometer__plain")).toBeNull();
    expect(label()).not.toMatch(/plain|null|NaN/);
  });

  it("shows a paused step's figures", () => {
    const run = generatedRun(1, 30);
    const { player, textOf } = open(run);
    act(() => player.seek(12));
    expect(textOf(".speedometer__average")).toBe(run.steps[11]?.tokensPerSecond?.toFixed(0));
  });

  it("lets the needle fall when nothing comes, and rests it on the average at the end", () => {
    const { store, needle } = open();
    const running = needle();
    act(() => store.setPhase("reconnecting"));
    expect(needle()).toContain("rotate(-120deg)");
    act(() =>
      store.receive(
        { type: "error", code: "internal", message: "x", retry_after_seconds: null, request_id: null },
        9e3,
      ),
    );
    expect(needle()).not.toContain("rotate(-120deg)");
    expect(needle()).not.toBe(running);
  });
});
