import { expect, test } from "vitest";
import {
  countBars,
  countTable,
  depthBars,
  depthTable,
  kindOf,
  lengthTable,
  sizeTable,
  speedTable,
  stackedTimes,
  tiles,
  timeShares,
  timeSource,
  timeTable,
} from "../../../src/insight/charts";
import { type Figures, FiguresBuilder } from "../../../src/insight/figures";
import { percent, share, short } from "../../../src/insight/format";
import { type Run, record, startRun } from "../../../src/run/run";
import { prefill, stepMessage, tokenMessage, tree } from "../run/messages";

function figuresOf(fill: (run: Run) => void): Figures {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  fill(run);
  return new FiguresBuilder(run).upTo(run.steps.length);
}

const none = figuresOf(() => undefined);
const some = figuresOf((run) => {
  record(run, prefill("T"), 100);
  record(run, stepMessage([" a", " b"], " c", [" x", " y"]), 400);
  const lookup = tree([{ token: " d", accepted: true, source: "lookup" }]);
  record(run, tokenMessage([" d", " e"], { num_accepted: 1, tree_debug: lookup }), 500);
});

test.each([
  [0, "0.00"],
  [0.416, "0.42"],
  [17.34, "17.3"],
  [1234.5, "1,235"],
])("short(%d) is %s", (value, text) => {
  expect(short(value)).toBe(text);
});

test.each([
  [0, "0 %"],
  [0.004, "0.4 %"],
  [0.0999, "10.0 %"],
  [0.426, "43 %"],
  [1, "100 %"],
])("percent(%d) is %s", (value, text) => {
  expect(percent(value)).toBe(text);
});

test("a share of nothing is none", () => {
  expect([share(0, 0), share(1, 2)]).toEqual([null, "50 %"]);
});

test("step times lie on each other, the longest at the bottom", () => {
  const sums = stackedTimes(some);
  expect(sums).toHaveLength(4);
  expect(sums.map((column) => column[1])).toEqual([20, 22, 23, 23.5].map((sum) => expect.closeTo(sum)));
  expect(stackedTimes(none)).toEqual([[], [], [], []]);
});

test("time shares sum to the whole", () => {
  const shares = timeShares(some);
  expect(shares.map(({ verb }) => verb)).toEqual(["verify", "draft", "accept", "commit"]);
  expect(shares.reduce((sum, entry) => sum + entry.share, 0)).toBeCloseTo(1);
  expect(shares[0]?.meanMilliseconds).toBeCloseTo(20);
  expect(timeShares(none).map((entry) => entry.share)).toEqual([0, 0, 0, 0]);
});

test("depths as bars, by who drafted", () => {
  expect(depthBars(some)).toEqual([
    {
      label: "1",
      segments: [
        { kind: "head", share: 0.5 },
        { kind: "lookup", share: 0.5 },
      ],
      value: "100 %",
      detail: "2 of 2 steps",
    },
    { label: "2", segments: [{ kind: "head", share: 1 }], value: "100 %", detail: "1 of 1 steps" },
  ]);
  expect(depthTable(some).rows[0]).toEqual(["1", "4", "2", "2", "100 %"]);
});

test("a source of a file gets no class of its own making", () => {
  expect(["head", "lookup", "x y--z"].map(kindOf)).toEqual(["head", "lookup", "other"]);
});

test("ranks and sources as bars and table", () => {
  expect(countBars(some.sources, String, kindOf)).toEqual([
    { label: "head", segments: [{ kind: "head", share: 0.5 }], value: "50 %", detail: "2 of 4 nodes" },
    { label: "lookup", segments: [{ kind: "lookup", share: 1 }], value: "100 %", detail: "1 of 1 nodes" },
  ]);
  expect(countTable("Rank", some.ranks, (rank) => `${rank + 1}`).rows).toEqual([
    ["1", "3", "3", "100 %"],
    ["2", "1", "0", "0 %"],
    ["3", "1", "0", "0 %"],
  ]);
});

test("tables of steps have a row a step, the latest fifty", () => {
  expect(lengthTable(some).rows).toEqual([
    ["1", "3.00", "3.00"],
    ["2", "2.00", "2.50"],
  ]);
  expect(sizeTable(some).rows).toEqual([
    ["1", "5.00"],
    ["2", "2.00"],
  ]);
  expect(speedTable(some).rows[1]).toEqual(["0.30", "10.0", "90.0", "50.0"]);
  expect(speedTable(some).rows[0]).toEqual(["0.00", "none yet", "none yet", "50.0"]);
  expect(timeTable(some).columns).toEqual(["Step", "verify (ms)", "draft (ms)", "accept (ms)", "commit (ms)"]);
  const long = figuresOf((run) => {
    for (let i = 0; i < 80; i += 1) record(run, i === 0 ? prefill("T") : stepMessage([], " a"), i);
  });
  expect(lengthTable(long).rows).toHaveLength(50);
  expect(lengthTable(long).rows.at(-1)?.[0]).toBe("79");
});

test("tiles say the means, or that there are none", () => {
  expect(tiles(some).map((tile) => tile.value)).toEqual(["2.50", "90.0", "60 %", "3.50", "0 %"]);
  expect(tiles(none).map((tile) => tile.value)).toEqual(["–", "–", "–", "–", "–"]);
});

test.each([
  ["cpu", "measured on this engine"],
  ["cuda:0", "from the start-up calibration"],
  [null, "as the engine reports it"],
])("step times on %s are %s", (device, words) => {
  expect(timeSource(device)).toBe(words);
});
