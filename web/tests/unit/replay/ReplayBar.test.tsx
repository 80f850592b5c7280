import { act, cleanup, fireEvent, render, screen, waitFor } from "@testing-library/react";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { exportRun } from "../../../src/run/exchange";
import { Player } from "../../../src/run/player";
import { type Run, startRun } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { columnsOf, positionLabel } from "../../../src/run/timeline";
import { ReplayBar } from "../../../src/view/replay/ReplayBar";
import { finished, prefill, stepMessage } from "../run/messages";

const frames = new Map<number, FrameRequestCallback>();
let numFrames = 0;

beforeEach(() => {
  frames.clear();
  vi.stubGlobal("requestAnimationFrame", (callback: FrameRequestCallback) => {
    numFrames += 1;
    frames.set(numFrames, callback);
    return numFrames;
  });
  vi.stubGlobal("cancelAnimationFrame", (frame: number) => frames.delete(frame));
});

afterEach(() => {
  cleanup();
  vi.unstubAllGlobals();
});

function drawAt(now: number): void {
  act(() => {
    for (const [frame, callback] of [...frames]) {
      frames.delete(frame);
      callback(now);
    }
  });
}

function setUp({ isOver = true, numSteps = 5 } = {}) {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  const store = new RunStore(run, (flush) => flush());
  const player = new Player(() => run.steps.length);
  for (let i = 0; i < numSteps; i += 1)
    store.receive(i === 0 ? prefill("a") : stepMessage([" b"], " c"), 100 * (i + 1));
  if (isOver) store.receive(finished(), 1000);
  const imported: Run[] = [];
  render(<ReplayBar store={store} player={player} onImport={(other) => imported.push(other)} />);
  return { store, player, imported };
}

const bar = () => screen.getByRole("group", { name: "Replay" });
const slider = () => screen.getByRole("slider", { name: "Step" });
const button = (name: string) => screen.getByRole<HTMLButtonElement>("button", { name });

describe("position", () => {
  test("is said as step and time", () => {
    const { player } = setUp();
    expect(screen.getByText("step 4 of 4 · 0.50 s")).toBeTruthy();
    act(() => player.seek(2));
    expect(screen.getByText("step 1 of 4 · 0.20 s")).toBeTruthy();
    expect(slider().getAttribute("aria-valuetext")).toBe("step 1 of 4 · 0.20 s");
    act(() => player.seek(1));
    expect(screen.getByText("prefill · 0.10 s")).toBeTruthy();
  });

  test("goes along with a live run", () => {
    const { store } = setUp({ isOver: false });
    act(() => store.receive(stepMessage([], " d"), 650));
    expect(screen.getByText("step 5 of 5 · 0.65 s")).toBeTruthy();
  });

  test("follows the slider and the buttons", () => {
    const { player } = setUp();
    fireEvent.change(slider(), { target: { value: "3" } });
    expect(player.position).toBe(3);
    fireEvent.click(button("One step back"));
    expect(player.position).toBe(2);
    fireEvent.click(button("One step forward"));
    fireEvent.click(button("One step forward"));
    expect(player.position).toBe(4);
    fireEvent.click(button("End"));
    expect(player.isLive).toBe(true);
  });
});

describe("keys", () => {
  test.each([
    ["ArrowLeft", 3, 2],
    ["ArrowRight", 3, 4],
    ["Home", 3, 1],
    ["End", 3, 5],
    ["ArrowLeft", 1, 1],
    ["x", 3, 3],
  ])("%s from %i goes to %i", (key, from, to) => {
    const { player } = setUp();
    act(() => player.seek(from));
    fireEvent.keyDown(slider(), { key });
    expect(player.position).toBe(to);
  });

  test("space pauses a live run; on a button it is the button's", () => {
    const { player } = setUp({ isOver: false });
    fireEvent.keyDown(button("Live"), { key: " " });
    expect(player.isLive).toBe(true);
    fireEvent.keyDown(slider(), { key: " " });
    expect([player.isLive, player.position]).toEqual([false, 5]);
  });

  test("with a modifier belong to the browser", () => {
    const { player } = setUp();
    fireEvent.keyDown(bar(), { key: "ArrowLeft", altKey: true });
    expect(player.isLive).toBe(true);
  });
});

describe("playing", () => {
  test("in recorded time to the end, then live", () => {
    const { player } = setUp();
    fireEvent.click(button("Play"));
    expect(player.position).toBe(1);
    drawAt(0);
    drawAt(100);
    expect(player.position).toBe(2);
    fireEvent.change(screen.getByRole("combobox"), { target: { value: "4" } });
    drawAt(150);
    expect(player.position).toBe(4);
    drawAt(200);
    expect([player.isLive, player.position]).toEqual([true, 5]);
    expect(button("Play").disabled).toBe(false);
  });

  test("ends with pause, and with a step", () => {
    const { player } = setUp();
    fireEvent.click(button("Play"));
    drawAt(0);
    fireEvent.click(button("Pause"));
    drawAt(900);
    expect(player.position).toBe(1);
    fireEvent.click(button("Play"));
    fireEvent.click(button("One step forward"));
    expect(button("Play")).toBeTruthy();
  });
});

test("an empty run can be replaced, nothing else", () => {
  setUp({ numSteps: 0, isOver: false });
  for (const name of ["One step back", "Play", "One step forward", "Live", "Export"]) {
    expect(screen.queryByRole<HTMLButtonElement>("button", { name })?.disabled ?? name).toBe(true);
  }
  expect((slider() as HTMLInputElement).disabled).toBe(true);
  expect(button("Import").disabled).toBe(false);
});

describe("files", () => {
  const file = (content: string) => new File([content], "run.json", { type: "application/json" });

  test("the run is saved under its time", async () => {
    const { store } = setUp();
    const saved: Blob[] = [];
    vi.stubGlobal("URL", {
      createObjectURL: (blob: Blob) => `blob:${saved.push(blob)}`,
      revokeObjectURL: () => undefined,
    });
    const names: string[] = [];
    const click = vi.spyOn(HTMLAnchorElement.prototype, "click").mockImplementation(function (this: HTMLAnchorElement) {
      names.push(this.download);
    });
    fireEvent.click(button("Export"));
    expect(names).toEqual(["gorgon-run-2026-01-31T12-00-00.json"]);
    expect(await saved[0]?.text()).toBe(exportRun(store.run));
    click.mockRestore();
  });

  test("a picked file is taken in", async () => {
    const { store, imported } = setUp();
    fireEvent.change(screen.getByLabelText("Run to import"), { target: { files: [file(exportRun(store.run))] } });
    await waitFor(() => expect(imported).toHaveLength(1));
    expect(imported[0]?.tokens).toEqual(store.run.tokens);
  });

  test("a dropped file that is bad is refused beside the bar, until it is dismissed or a good one comes", async () => {
    const { store, imported } = setUp();
    fireEvent.drop(bar(), { dataTransfer: { files: [file('{"format": "gorgon-run", "version": 9, "run": {}}')] } });
    expect((await screen.findByRole("alert")).textContent).toContain("run.json: the file has version 9");
    expect(imported).toEqual([]);
    fireEvent.click(button("Dismiss"));
    expect(screen.queryByRole("alert")).toBeNull();
    fireEvent.drop(bar(), { dataTransfer: { files: [file("{")] } });
    await screen.findByRole("alert");
    fireEvent.drop(bar(), { dataTransfer: { files: [file(exportRun(store.run))] } });
    await waitFor(() => expect(imported).toHaveLength(1));
    expect(screen.queryByRole("alert")).toBeNull();
  });
});

test("a timeline's columns keep the highest of their steps", () => {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  const store = new RunStore(run, (flush) => flush());
  store.receive(prefill("a"), 1);
  for (const accepted of [[" a", " b"], [], [" a"]]) store.receive(stepMessage(accepted, " c"), 2);
  expect(columnsOf(run.steps, 10)).toEqual([1, 3, 1, 2]);
  expect(columnsOf(run.steps, 2)).toEqual([3, 2]);
  expect(columnsOf([], 2)).toEqual([]);
  expect(positionLabel(startRun({}, "2026-01-31T12:00:00Z"), 0)).toBe("no steps yet");
});
