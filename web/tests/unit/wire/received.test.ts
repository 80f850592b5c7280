import { expect, test } from "vitest";
import type { TreeDebug } from "../../../src/wire/messages";
import { readMessage } from "../../../src/wire/received";
import { error, finished, prefill, status, stepMessage, tokenMessage, tree } from "../run/messages";

const STEP = stepMessage([" b", " c"], " d", [" x"]);

test.each([
  status("loading", { progress: 0.5 }),
  prefill("a"),
  STEP,
  tokenMessage(["a", " b"], { tree_debug: null }),
  finished(),
  error(),
])("$type is read as it is", (message) => {
  expect(readMessage(JSON.stringify(message))).toEqual(message);
});

function withTree(change: Partial<Record<keyof TreeDebug, unknown>>): unknown {
  return { ...STEP, tree_debug: { ...tree([{ token: "x" }, { token: "y", parent: 0 }]), ...change } };
}

test.each<[string, unknown]>([
  ["null", null],
  ["a number", 3],
  ["no type", {}],
  ["an unknown state", { ...status("queued"), state: "dreaming" }],
  ["ids that are no numbers", { ...STEP, token_ids: ["1", "2", "3"] }],
  ["fewer pieces than tokens", { ...STEP, pieces: STEP.pieces.slice(1) }],
  ["a tree of lists of different lengths", withTree({ depths: [1] })],
  ["a node that is its own parent", withTree({ parents: [-1, 1] })],
  ["a parent behind its child", withTree({ parents: [1, -1] })],
  ["a parent that is none", withTree({ parents: [-2, 0] })],
  ["a tree without times", withTree({ step_seconds: null })],
  ["an unknown reason", { ...finished(), finish_reason: "bored" }],
  ["no metrics", { ...finished(), metrics: null }],
  ["an error without words", { ...error(), message: undefined }],
])("%s is no message", (_, value) => {
  expect(readMessage(JSON.stringify(value))).toBeNull();
});

test("what an engine leaves out, as nobody asked for it, is null", () => {
  const { logprobs, tree_debug, ...rest } = STEP;
  expect(readMessage(JSON.stringify(rest))).toEqual({ ...rest, logprobs: null, tree_debug: null });
});
