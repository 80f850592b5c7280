import { describe, expect, it } from "vitest";
import { record, startRun } from "../../../src/run/run";
import { caption, factsOf, percent, summary } from "../../../src/tree/describe";
import { firstMessage, messageOf } from "./runs";

function storyRun() {
  const run = startRun({ prompt: "x" }, "2026-11-25T09:00:00.000Z");
  record(run, firstMessage("The"), 0);
  const nodes = [
    { text: " cat", parent: -1, isAccepted: true, probability: 0.5 },
    { text: "\n", parent: -1, rank: 1, source: "lookup", probability: 0.0003 },
  ];
  record(run, messageOf(nodes, " on"), 100);
  record(run, { ...messageOf([], "."), num_nodes: 1 }, 200);
  return run;
}

describe("caption", () => {
  const run = storyRun();

  it.each([
    [-1, ""],
    [0, "prefill: the first token"],
    [1, "step 1: 2 nodes, accepted 1"],
    [2, "step 2: nothing drafted, a plain decoding step"],
    [3, ""],
  ])("of step %d is %j", (step, expected) => {
    expect(caption(run, step)).toBe(expected);
  });

  it("says that a tree is no longer kept", () => {
    const old = storyRun();
    const step = old.steps[1];
    if (step === undefined) throw new Error("no such step");
    step.tree = null;
    expect(caption(old, 1)).toBe("step 1: 2 nodes, accepted 1; its tree is no longer kept");
  });
});

describe("summary", () => {
  it("names the tokens", () => {
    expect(summary(storyRun(), 1)).toBe("step 1: 2 nodes, accepted 1: '·cat'; the backbone's own: '·on'");
    expect(summary(storyRun(), 2)).toBe("step 2: nothing drafted, a plain decoding step; the backbone's own: '.'");
  });
});

describe("factsOf", () => {
  const run = storyRun();

  it("tells of an accepted draft", () => {
    expect(factsOf(run, { token: 1 })).toEqual({
      token: "·cat",
      tokenId: 100,
      step: 1,
      fate: "accepted",
      draft: { depth: 1, rank: 0, probability: 0.5, source: "head" },
    });
  });

  it("tells of a rejected draft", () => {
    expect(factsOf(run, { step: 1, node: 1 })).toEqual({
      token: "⏎",
      tokenId: 101,
      step: 1,
      fate: "rejected",
      draft: { depth: 1, rank: 1, probability: 0.0003, source: "lookup" },
    });
  });

  it("tells of the backbone's own token", () => {
    expect(factsOf(run, { token: 2 })).toEqual({ token: "·on", tokenId: 7, step: 1, fate: "backbone", draft: null });
  });

  it.each([{ token: 99 }, { step: 2, node: 0 }, { step: 1, node: 2 }])("knows nothing of %j", (target) => {
    expect(factsOf(run, target)).toBeNull();
  });
});

describe("percent", () => {
  it.each([
    [0, "0 %"],
    [1, "100 %"],
    [0.4231, "42.3 %"],
    [0.0312, "3.1 %"],
    [0.0003, "0.03 %"],
    [0.00001, "< 0.01 %"],
  ])("of %d is %s", (share, expected) => {
    expect(percent(share)).toBe(expected);
  });
});
