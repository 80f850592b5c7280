import { act, cleanup, fireEvent, render, screen, within } from "@testing-library/react";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { Player } from "../../../src/run/player";
import { startRun } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { InsightPanel } from "../../../src/view/insight/InsightPanel";
import { prefill, stepMessage, tokenMessage, tree } from "../run/messages";

// The plots are drawn on a canvas, which needs a browser: here they have no room, and are not made.
class NoSizes {
  observe(): void {}
  disconnect(): void {}
}

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal("ResizeObserver", NoSizes);
});

afterEach(() => {
  cleanup();
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

function setUp(device?: string | null) {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  const store = new RunStore(run, (flush) => flush());
  const player = new Player(() => run.steps.length);
  const step = (accepted: string[]) => act(() => store.receive(stepMessage(accepted, " z", [" x"]), run.steps.length));
  render(<InsightPanel store={store} player={player} {...(device === undefined ? {} : { device })} />);
  act(() => store.receive(prefill("T"), 0));
  act(() => vi.advanceTimersByTime(1000));
  return { store, player, step };
}

const tile = (name: string) => screen.getByText(name, { selector: "dt" }).parentElement?.textContent;
const LENGTH = "Acceptance length";
const card = (title: string) => screen.getByRole("region", { name: title });

test("before the first token it says what will be here", () => {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  render(<InsightPanel store={new RunStore(run)} player={new Player(() => 0)} />);
  expect(screen.getByText(/how many tokens each step gives/)).toBeTruthy();
  expect(screen.queryByRole("region")).toBeNull();
});

test("every chart has a title, a unit, a line of explanation and a table", () => {
  const { step } = setUp();
  step([" a"]);
  for (const title of [LENGTH, "Decode speed", "Tree size", "Step time", "Acceptance by depth", "Acceptance by rank"]) {
    const region = card(title);
    expect(within(region).getByRole("heading", { name: title })).toBeTruthy();
    expect(region.querySelector("p.insight-card__explanation")?.textContent).toMatch(/\w{3}/);
    expect(within(region).getByLabelText(`${title} as a table`)).toBeTruthy();
  }
});

test("updates come four times a second at most, the last one surely", () => {
  const { step } = setUp();
  step([" a"]);
  expect(tile(LENGTH)).toContain("2.00");
  step([" a", " b"]);
  step([" a", " b"]);
  expect(tile(LENGTH)).toContain("2.00");
  act(() => vi.advanceTimersByTime(250));
  expect(tile(LENGTH)).toContain("2.67");
});

test("it goes up to the step that is shown", () => {
  const { step, player } = setUp();
  step([" a"]);
  step([" a", " b"]);
  act(() => vi.advanceTimersByTime(250));
  expect(tile(LENGTH)).toContain("2.50");
  act(() => player.seek(2));
  act(() => vi.advanceTimersByTime(250));
  expect(tile(LENGTH)).toContain("2.00");
});

test("a table is there when it is opened", async () => {
  const { step } = setUp();
  step([" a"]);
  const region = card("Acceptance by depth");
  expect(within(region).queryByRole("table")).toBeNull();
  const details = region.querySelector("details") as HTMLDetailsElement;
  details.open = true;
  fireEvent(details, new Event("toggle"));
  const rows = within(within(region).getByRole("table")).getAllByRole("row");
  expect(rows.map((row) => row.textContent)).toEqual([
    "DepthNodes draftedAcceptedSteps so deepShare of steps",
    "1211100 %",
  ]);
});

describe("step times are labelled by where they come from", () => {
  test.each([
    ["cpu", /measured on this engine/],
    ["cuda", /from the start-up calibration/],
    [null, /as the engine reports it/],
    [undefined, /as the engine reports it/],
  ])("%s", (device, words) => {
    setUp(device);
    expect(card("Step time").textContent).toMatch(words);
  });
});

test("names out of a run are text", () => {
  const { store } = setUp();
  const odd = tree([{ token: " a", accepted: true, source: "<img src=x onerror=alert(1)>" }]);
  act(() => store.receive(tokenMessage([" a", " b"], { num_accepted: 1, tree_debug: odd }), 5));
  act(() => vi.advanceTimersByTime(250));
  expect(document.querySelector("img")).toBeNull();
  expect(screen.getAllByText("<img src=x onerror=alert(1)>").length).toBeGreaterThan(0);
});
