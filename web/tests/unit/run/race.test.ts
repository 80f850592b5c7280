import { describe, expect, test } from "vitest";
import { clocksOf, drawSeed, laneRequest, reasonToDiffer, resultOf } from "../../../src/run/race";
import { type Run, record, startRun } from "../../../src/run/run";
import type { GenerateRequest, Wire } from "../../../src/wire/messages";
import { error, finished, prefill, stepMessage } from "./messages";

function runOf(...messages: [number, Wire["received"]][]): Run {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  for (const [at, message] of messages) record(run, message, at);
  return run;
}

const plain = () =>
  runOf(
    [50, prefill("a")],
    [100, stepMessage([], " b")],
    [150, stepMessage([], " c")],
    [200, stepMessage([], " d")],
    [201, finished()],
  );
const speculative = (last = " d") =>
  runOf([60, prefill("a")], [120, stepMessage([" b", " c"], last)], [121, finished()]);

test("seeds have 53 bits at most and use them all", () => {
  expect(drawSeed([0, 0])).toBe(0);
  expect(drawSeed([0xffffffff, 0xffffffff])).toBe(Number.MAX_SAFE_INTEGER);
  expect(drawSeed([1, 5])).toBe(2 ** 32 + 5);
});

describe("a lane asks", () => {
  const request: GenerateRequest = {
    prompt: "x",
    temperature: 0.7,
    request_id: "once",
    tree_debug: true,
    speculation: { max_nodes: 12 },
  };

  test("the same thing, speculation apart", () => {
    const [off, on] = [laneRequest(request, "plain", 9), laneRequest(request, "speculative", 9)];
    expect(off).toEqual({
      prompt: "x",
      temperature: 0.7,
      seed: 9,
      tree_debug: false,
      speculation: { max_nodes: 12, enabled: false },
    });
    expect(on).toEqual({ ...off, speculation: { max_nodes: 12, enabled: true } });
  });

  test("with the request's own seed where it has one, 0 too", () => {
    expect(laneRequest({ ...request, seed: 0 }, "plain", 9).seed).toBe(0);
    expect(laneRequest({ ...request, seed: null }, "plain", 9).seed).toBe(9);
  });
});

describe("clocks", () => {
  test("from sending to the first token, from there to the last", () => {
    expect(clocksOf(plain())).toEqual({ firstToken: 50, decode: 150, numTokens: 4, tokensPerSecond: 20 });
  });

  test("of nothing yet, and of a single token", () => {
    expect(clocksOf(runOf())).toEqual({ firstToken: null, decode: null, numTokens: 0, tokensPerSecond: null });
    expect(clocksOf(runOf([50, prefill("a")]))).toMatchObject({ firstToken: 50, decode: 0, tokensPerSecond: null });
  });
});

describe("the result", () => {
  test("equal tokens: the ratio is that of the decode times", () => {
    expect(resultOf({ plain: plain(), speculative: speculative() })).toEqual({
      verdict: { kind: "identical", numTokens: 4 },
      ratio: 2.5,
      acceptanceLength: 2.5,
    });
  });

  test("the first difference is shown with what leads to it", () => {
    expect(resultOf({ plain: plain(), speculative: speculative(" X") })?.verdict).toEqual({
      kind: "different",
      position: 3,
      numTokens: { plain: 4, speculative: 4 },
      excerpts: { plain: { lead: "a b c", rest: " d" }, speculative: { lead: "a b c", rest: " X" } },
    });
  });

  test("an answer that ends earlier differs where it ends", () => {
    const short = runOf([60, prefill("a")], [80, stepMessage([], " b")], [81, finished()]);
    expect(resultOf({ plain: plain(), speculative: short })?.verdict).toMatchObject({
      position: 2,
      excerpts: { plain: { rest: " c d" }, speculative: { rest: "" } },
    });
  });

  test("answers of one token have no ratio", () => {
    const one = () => runOf([60, prefill("a")], [61, finished()]);
    expect(resultOf({ plain: one(), speculative: one() })).toMatchObject({ ratio: null, verdict: { numTokens: 1 } });
  });

  test.each([
    ["failed", runOf([60, prefill("a")], [61, error()])],
    ["was cancelled", runOf([60, prefill("a")], [61, finished({ finish_reason: "cancelled" })])],
    ["runs", runOf([60, prefill("a")])],
  ])("is none where a lane %s", (_, other) => {
    expect(resultOf({ plain: plain(), speculative: other })).toBeNull();
  });
});

test.each<[GenerateRequest, RegExp | null]>([
  [{}, null],
  [{ speculation: { acceptance: "rejection" } }, null],
  [{ temperature: 0.7, speculation: { acceptance: "rejection" } }, /distribution/],
  [{ speculation: { acceptance: "typical" } }, /changes the output/],
])("whether %j may differ", (request, reason) => {
  if (reason === null) expect(reasonToDiffer(request)).toBeNull();
  else expect(reasonToDiffer(request)).toMatch(reason);
});
