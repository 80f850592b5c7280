import { expect, test } from "vitest";
import { record, startRun } from "../../../src/run/run";
import { chunksOf, nextToken, partsOf, piecesOf, STEPS_A_CHUNK } from "../../../src/view/chat/chunks";
import { prefill, stepMessage, tokenMessage } from "../run/messages";

/** A run of one token a step; every `lineSteps` steps a line ends. */
function lines(numSteps: number, lineSteps: number) {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  for (let step = 1; step <= numSteps; step += 1) {
    record(run, tokenMessage([step % lineSteps === 0 ? "\n" : "a"], { num_accepted: 0 }), step);
  }
  return run;
}

const boundsOf = (run: ReturnType<typeof lines>, position: number) =>
  chunksOf(run, position).map(({ first, end }) => [first, end]);

test("a chunk ends with the first line behind enough steps", () => {
  const run = lines(3 * STEPS_A_CHUNK, STEPS_A_CHUNK + 3);
  expect(boundsOf(run, 0)).toEqual([]);
  expect(boundsOf(run, 1)).toEqual([[0, 1]]);
  const end = STEPS_A_CHUNK + 3;
  expect(boundsOf(run, end)).toEqual([[0, end]]);
  expect(boundsOf(run, end + 1)).toEqual([
    [0, end],
    [end, end + 1],
  ]);
});

test("a text without lines is one chunk", () => {
  expect(boundsOf(lines(100, 1000), 100)).toEqual([[0, 100]]);
});

test("a chunk is drawn in parts of which the last one alone grows", () => {
  const bounds = (end: number) => partsOf({ first: 5, end }).map((part) => [part.first, part.end]);
  expect(bounds(5)).toEqual([]);
  expect(bounds(6)).toEqual([[5, 6]]);
  const second = 5 + STEPS_A_CHUNK;
  expect(bounds(second + 1)).toEqual([
    [5, second],
    [second, second + 1],
  ]);
  expect(bounds(second + 9).slice(0, 1)).toEqual(bounds(second + 1).slice(0, 1));
});

test("chunks that are whole stay as they are while the run grows", () => {
  const run = lines(3 * STEPS_A_CHUNK, 5);
  const before = chunksOf(run, 3 * STEPS_A_CHUNK).slice(0, -1);
  for (let step = 0; step < 2 * STEPS_A_CHUNK; step += 1) record(run, tokenMessage(["\n"], { num_accepted: 0 }), 1000);
  expect(before.length).toBeGreaterThan(1);
  expect(chunksOf(run, 5 * STEPS_A_CHUNK).slice(0, before.length)).toEqual(before);
});

function someRun() {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  record(run, prefill("a"), 1);
  record(run, stepMessage([" b", " c"], " d"), 2);
  record(run, tokenMessage(["", "猫"], { num_accepted: 0 }), 3);
  return run;
}

test("pieces are the tokens that released text, drafts told from the backbone's own", () => {
  const run = someRun();
  const pieces = piecesOf(run, { first: 0, end: 3 });
  expect(pieces.map(({ text, isDraft }) => [text, isDraft])).toEqual([
    ["a", false],
    [" b", true],
    [" c", true],
    [" d", false],
    ["猫", false],
  ]);
  expect(pieces.at(-1)?.token).toBe(5);
  expect(piecesOf(run, { first: 1, end: 2 }).map(({ text }) => text)).toEqual([" b", " c", " d"]);
});

test.each<[string, number | null, number | null]>([
  ["ArrowRight", null, 0],
  ["ArrowRight", 0, 1],
  ["ArrowRight", 3, 5],
  ["ArrowRight", 5, null],
  ["ArrowLeft", null, 5],
  ["ArrowLeft", 5, 3],
  ["ArrowLeft", 0, null],
  ["Home", 3, 0],
  ["End", 0, 5],
  ["Enter", 0, null],
])("%s at token %s leads to token %s", (key, token, next) => {
  expect(nextToken(someRun(), 3, token, key)).toBe(next);
});

test("arrow keys stay among the tokens of the shown steps", () => {
  const run = someRun();
  expect([nextToken(run, 1, null, "End"), nextToken(run, 1, 0, "ArrowRight")]).toEqual([0, null]);
});
