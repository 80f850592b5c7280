import { describe, expect, test } from "vitest";
import { acceptedPath, hasEnded, MAX_TREES, type Run, record, startRun, textOf } from "../../../src/run/run";
import type { Wire } from "../../../src/wire/messages";
import { error, finished, prefill, status, stepMessage, tokenMessage, tree } from "./messages";

const STARTED = "2026-01-31T12:00:00Z";

function runOf(...messages: Wire["received"][]): Run {
  const run = startRun({ prompt: "x", tree_debug: true }, STARTED, "smollm2");
  messages.forEach((message, i) => {
    record(run, message, 10 * (i + 1));
  });
  return run;
}

describe("steps", () => {
  test("the first token is prefill's: no rows verified, no draft", () => {
    const run = runOf(status("prefill"), prefill("The"));
    expect(run.phase).toBe("streaming");
    expect(run.steps).toHaveLength(1);
    expect(run.steps[0]).toMatchObject({ at: 20, firstToken: 0, numTokens: 1, numNodes: 0, numPasses: 0, tree: null });
    expect(run.tokens[0]).toMatchObject({ text: "The", step: 0, draft: null });
  });

  test("accepted drafts know their node, the bonus token has none", () => {
    const drafted = tree([
      { token: " sea", probability: 0.4 },
      { token: " sun", rank: 1, accepted: true, probability: 0.3, source: "lookup" },
      { token: " is", parent: 0 },
      { token: " was", parent: 1, accepted: true, probability: 0.2 },
    ]);
    const run = runOf(prefill("The"), tokenMessage([" sun", " was", " up"], { num_accepted: 2, tree_debug: drafted }));
    expect(run.tokens.map((token) => token.draft)).toEqual([
      null,
      { depth: 1, rank: 1, probability: 0.3, source: "lookup" },
      { depth: 2, rank: 0, probability: 0.2, source: "head" },
      null,
    ]);
    expect(run.steps[1]).toMatchObject({ numTokens: 3, numAccepted: 2, numNodes: 5, numPasses: 1 });
    expect(run.steps[1]?.tree).toBe(drafted);
    expect(run.steps[1]?.drafted).toEqual({ depths: [2, 2], ranks: [3, 1], sources: { head: 3, lookup: 1 } });
  });

  test("a plain step has no tree, but its figures", () => {
    const run = runOf(prefill("a"), tokenMessage([" b"], { tree_debug: tree([]) }));
    expect(run.steps[1]).toMatchObject({ tree: null, drafted: null, numNodes: 1, numPasses: 1, tokensPerSecond: 90 });
  });

  test("without trees everything but them is there", () => {
    const run = runOf(tokenMessage(["a"]), tokenMessage([" b", " c"], { num_nodes: 8 }));
    expect(run.steps[1]).toMatchObject({
      numAccepted: 1,
      numNodes: 8,
      tree: null,
      seconds: null,
      tokensPerSecond: null,
    });
    expect(textOf(run)).toBe("a b c");
  });

  test("nor are they where the gateway leaves the field out", () => {
    const { tree_debug: _, logprobs: __, ...bare } = tokenMessage([" b", " c"], { num_nodes: 8 });
    const run = runOf(tokenMessage(["a"]), bare as Wire["received"]);
    expect(run.steps[1]).toMatchObject({ tree: null, drafted: null, seconds: null, numPasses: 1 });
  });

  test("of merged steps the last one's tree belongs to the last tokens", () => {
    const last = tree([{ token: " d", accepted: true }, { token: " e", parent: 0, accepted: true }, { token: " x" }]);
    const merged = tokenMessage([" a", " b", " c", " d", " e", " f"], {
      num_accepted: 3,
      num_nodes: 12,
      tree_debug: last,
    });
    const run = runOf(prefill("T"), merged);
    expect(run.steps[1]).toMatchObject({ numTokens: 6, numPasses: 3, numNodes: 12 });
    expect(run.tokens.map((token) => token.draft?.depth ?? null)).toEqual([null, null, null, null, 1, 2, null]);
  });

  test("prefill's token may be merged with the first steps", () => {
    const first = tokenMessage(["T", " a", " b"], {
      num_accepted: 1,
      num_nodes: 5,
      tree_debug: tree([{ token: " a", accepted: true }]),
    });
    expect(runOf(first).steps[0]).toMatchObject({ numPasses: 1, numNodes: 4, numAccepted: 1 });
    expect(runOf(first).tokens.map((token) => token.draft !== null)).toEqual([false, true, false]);
  });

  test("an answer that ends within the accepted path keeps those drafts", () => {
    const path = tree([
      { token: " a", accepted: true },
      { token: " b", parent: 0, accepted: true },
      { token: " c", parent: 1, accepted: true },
    ]);
    const run = runOf(prefill("T"), tokenMessage([" a", " b"], { num_accepted: 2, tree_debug: path }));
    expect(run.tokens.slice(1).map((token) => token.draft?.depth)).toEqual([1, 2]);
    expect(run.steps[1]?.numPasses).toBe(1);
  });

  test("trees of old steps are let go, their counts stay", () => {
    const run = runOf(prefill("T"));
    for (let i = 0; i < MAX_TREES + 5; i += 1) record(run, stepMessage([" a"], " b"), 100 + i);
    expect(run.steps.filter((step) => step.tree !== null)).toHaveLength(MAX_TREES);
    expect(run.steps[5]?.tree).toBeNull();
    expect(run.steps[5]?.drafted).toEqual({ depths: [1], ranks: [1], sources: { head: 1 } });
    expect(run.steps[6]?.tree).not.toBeNull();
  });
});

describe("phases", () => {
  test("queued, loading and prefill are shown as they come", () => {
    const run = runOf(status("queued", { position: 3 }));
    expect(run.phase).toBe("queued");
    expect(run.status?.position).toBe(3);
    record(run, status("prefill", { progress: 0.5, seed: null }), 20);
    expect(run.phase).toBe("prefill");
    expect(run.seed).toBe(7);
  });

  test("a resumption in mid-stream: resuming, then streaming, the new engine's first token from prefill", () => {
    const run = runOf(prefill("a"), stepMessage([" b"], " c"), status("resuming"));
    expect(run.phase).toBe("resuming");
    record(run, tokenMessage([" d"]), 50);
    expect(run.phase).toBe("streaming");
    expect(run.steps.at(-1)).toMatchObject({ numPasses: 0, numNodes: 0 });
    record(run, stepMessage([" e"], " f"), 60);
    expect(run.steps.at(-1)).toMatchObject({ numPasses: 1, numNodes: 2 });
    expect(textOf(run)).toBe("a b c d e f");
  });

  test("an error behind tokens keeps them", () => {
    const run = runOf(prefill("a"), stepMessage([" b"], " c"), error({ code: "unavailable" }));
    expect(run).toMatchObject({ phase: "failed", endedAt: 30, error: { code: "unavailable" }, finished: null });
    expect(hasEnded(run)).toBe(true);
    expect(textOf(run)).toBe("a b c");
  });

  test.each([finished(), error()])("nothing is taken in behind $type", (terminal) => {
    const run = runOf(prefill("a"), terminal);
    record(run, stepMessage([" b"], " c"), 99);
    record(run, error({ code: "late" }), 99);
    expect(run.endedAt).toBe(20);
    expect(run.tokens).toHaveLength(1);
    expect(run.error?.code).not.toBe("late");
  });
});

describe("text", () => {
  const run = runOf(prefill("a"), stepMessage([" b"], " c"), stepMessage([], " d"), finished({ text: "!" }));

  test.each([
    [0, ""],
    [1, "a"],
    [2, "a b c"],
    [3, "a b c d!"],
  ])("of the first %i steps", (numSteps, text) => {
    expect(textOf(run, numSteps)).toBe(text);
  });
});

test("the accepted path goes by depth, not by place", () => {
  const odd = tree([{ token: "x" }, { token: "a", accepted: true }, { token: "b", parent: 1, accepted: true }]);
  odd.depths = [1, 2, 1];
  expect(acceptedPath(odd)).toEqual([2, 1]);
});
