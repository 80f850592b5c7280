import { describe, expect, test } from "vitest";
import { AVERAGE_STEPS, acceptanceLength, FiguresBuilder } from "../../../src/insight/figures";
import { MAX_TREES, type Run, record, startRun } from "../../../src/run/run";
import { prefill, status, stepMessage, tokenMessage, tree } from "../run/messages";

function newRun(): Run {
  return startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
}

/** prefill; 2 of 4 nodes accepted; a plain step; 1 of 3 accepted, by lookup, rank 1. */
function mixedRun(): Run {
  const run = newRun();
  record(run, prefill("T"), 100);
  record(run, stepMessage([" a", " b"], " c", [" x", " y"]), 200);
  record(run, tokenMessage([" d"], { tree_debug: tree([]) }), 300);
  const lookup = tree([
    { token: " e", rank: 0 },
    { token: " f", rank: 1, accepted: true, source: "lookup" },
    { token: " g", parent: 1, source: "lookup" },
  ]);
  record(run, tokenMessage([" f", " h"], { num_accepted: 1, tree_debug: lookup }), 400);
  return run;
}

test("steps, plain ones and nodes are counted, prefill's token in none of them", () => {
  const figures = new FiguresBuilder(mixedRun()).upTo(99);
  expect(figures).toMatchObject({ numPasses: 3, numPlain: 1, numTokens: 6, numDrafted: 7, numAccepted: 3 });
  expect(acceptanceLength(figures)).toBe(2);
  expect(figures.passes).toEqual({
    step: [1, 2, 3],
    acceptanceLength: [3, 1, 2],
    averageLength: [3, 2, 2],
    numNodes: [5, 1, 4],
  });
});

test("acceptance by depth, rank and source", () => {
  const { depths, ranks, sources } = new FiguresBuilder(mixedRun()).upTo(99);
  expect(depths).toEqual([
    {
      depth: 1,
      numDrafted: 5,
      numAccepted: 2,
      numSteps: 2,
      acceptedBy: new Map([
        ["head", 1],
        ["lookup", 1],
      ]),
    },
    { depth: 2, numDrafted: 2, numAccepted: 1, numSteps: 2, acceptedBy: new Map([["head", 1]]) },
  ]);
  expect(ranks).toEqual([
    { of: 0, numDrafted: 4, numAccepted: 2 },
    { of: 1, numDrafted: 2, numAccepted: 1 },
    { of: 2, numDrafted: 1, numAccepted: 0 },
  ]);
  expect(sources).toEqual([
    { of: "head", numDrafted: 5, numAccepted: 2 },
    { of: "lookup", numDrafted: 2, numAccepted: 1 },
  ]);
});

test("step times in milliseconds, and their sums", () => {
  const { times, seconds } = new FiguresBuilder(mixedRun()).upTo(99);
  expect(times.step).toEqual([1, 2, 3]);
  expect(times.milliseconds.verify).toEqual([20, 20, 20]);
  expect(seconds.draft).toBeCloseTo(0.006);
});

test("without trees the lengths and sizes remain", () => {
  const run = newRun();
  record(run, tokenMessage(["T"]), 1);
  record(run, tokenMessage([" a", " b"], { num_nodes: 8 }), 2);
  const figures = new FiguresBuilder(run).upTo(2);
  expect(figures).toMatchObject({ numPasses: 1, numTokens: 2, numDrafted: 7, depths: [], times: { step: [] } });
  expect(figures.passes.numNodes).toEqual([8]);
});

test("merged steps weigh as many as they are", () => {
  const run = newRun();
  const last = tree([{ token: " d", accepted: true }]);
  record(
    run,
    tokenMessage(["T", " a", " b", " c", " d", " e"], { num_accepted: 2, num_nodes: 10, tree_debug: last }),
    5,
  );
  const figures = new FiguresBuilder(run).upTo(1);
  expect(figures).toMatchObject({ numPasses: 3, numTokens: 5, numDrafted: 6, numPlain: 0 });
  expect(figures.passes).toMatchObject({ acceptanceLength: [5 / 3], numNodes: [3] });
  expect(figures.depths).toMatchObject([{ numSteps: 1, numAccepted: 1 }]);
});

test("another engine's first token is in no step either", () => {
  const run = mixedRun();
  record(run, status("resuming"), 500);
  record(run, tokenMessage([" z"], { tree_debug: tree([], { step: 0 }) }), 600);
  expect(new FiguresBuilder(run).upTo(99)).toMatchObject({ numPasses: 3, numTokens: 6 });
});

test("the moving average spans the last steps", () => {
  const run = newRun();
  record(run, prefill("T"), 0);
  for (let i = 0; i < AVERAGE_STEPS; i += 1) record(run, stepMessage([], " a"), i);
  for (let i = 0; i < AVERAGE_STEPS; i += 1) record(run, stepMessage([" b", " c"], " d"), 100 + i);
  const { averageLength } = new FiguresBuilder(run).upTo(99).passes;
  expect(averageLength[AVERAGE_STEPS - 1]).toBe(1);
  expect(averageLength[AVERAGE_STEPS + AVERAGE_STEPS / 2 - 1]).toBe(2);
  expect(averageLength.at(-1)).toBe(3);
});

describe("speed", () => {
  test("of the last second as received, beside the engine's own figures", () => {
    const run = newRun();
    record(run, prefill("T"), 100);
    for (let i = 1; i <= 30; i += 1) record(run, stepMessage([" a"], " b"), 100 + 100 * i);
    const { seconds, now, soFar, plain } = new FiguresBuilder(run).upTo(99).speeds;
    expect(seconds.slice(0, 3)).toEqual([0, 0.1, 0.2]);
    expect(now.slice(0, 3)).toEqual([null, null, 20]);
    expect(now.at(-1)).toBe(20);
    expect([soFar[0], soFar.at(-1), plain.at(-1)]).toEqual([null, 90, 50]);
  });

  test("of messages that all came at once is not told", () => {
    const run = newRun();
    record(run, prefill("T"), 100);
    for (let i = 0; i < 5; i += 1) record(run, stepMessage([], " a"), 100);
    expect(new FiguresBuilder(run).upTo(99).speeds.now).toEqual([null, null, null, null, null, null]);
  });
});

describe("the builder", () => {
  test("gives the same step by step as at once, forward and back", () => {
    const run = mixedRun();
    const builder = new FiguresBuilder(run);
    for (const position of [0, 1, 2, 4, 3, 4, 0, 2]) {
      expect(builder.upTo(position)).toEqual(new FiguresBuilder(run).upTo(position));
    }
  });

  test("counts trees that the run has let go", () => {
    const run = newRun();
    record(run, prefill("T"), 0);
    for (let i = 0; i < MAX_TREES + 100; i += 1) record(run, stepMessage([" a"], " b", [" c"]), i);
    const { depths, numDrafted } = new FiguresBuilder(run).upTo(run.steps.length);
    expect(depths[0]).toMatchObject({ numSteps: MAX_TREES + 100, numDrafted, numAccepted: MAX_TREES + 100 });
  });
});
