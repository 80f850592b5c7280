// Runs as files. What can be derived is not written: a file cannot contradict itself, and indices need no trust.

import { countDrafted, type Drafted, MAX_BINS } from "./drafted";
import {
  fail,
  InvalidFileError,
  integer,
  list,
  nullable,
  number,
  object,
  oneOf,
  type Reader,
  table,
  text,
} from "./guards";
import { count, errorMessage, finishedMessage, generateRequest, seed, stepSeconds, treeDebug } from "./messageReaders";
import { type Draft, MAX_TREES, type Run, type Step, type Token } from "./run";

export const FORMAT = "gorgon-run";
export const VERSION = 1;
export const MAX_FILE_BYTES = 64 << 20;
const MAX_STEPS = 1 << 17;
const MAX_TOKENS_A_STEP = 1 << 13;
const MAX_TOKENS = 1 << 19;

type SavedToken = Omit<Token, "step">;
type SavedStep = Omit<Step, "firstToken" | "numTokens"> & { tokens: SavedToken[] };
type SavedRun = Omit<Run, "steps" | "tokens" | "phase" | "status"> & { steps: SavedStep[] };

/** The run as JSON, `importRun`'s input. */
export function exportRun(run: Run): string {
  const { request, startedAt, model, seed, finished, error, endedAt } = run;
  const steps = run.steps.map(({ firstToken, numTokens, ...step }): SavedStep => {
    const tokens = run.tokens.slice(firstToken, firstToken + numTokens);
    return { ...step, tokens: tokens.map(({ id, text, draft }) => ({ id, text, draft })) };
  });
  const saved: SavedRun = { request, startedAt, model, seed, finished, error, endedAt, steps };
  return JSON.stringify({ format: FORMAT, version: VERSION, run: saved });
}

/** "gorgon-run-2026-11-25T09-32-01.json". */
export function fileName(run: Run): string {
  return `${FORMAT}-${run.startedAt.slice(0, 19).replaceAll(":", "-")}.json`;
}

const draft = object<Draft>({ depth: integer(1), rank: count, probability: number(0, 1), source: text });

const token = object<SavedToken>({ id: count, text, draft: nullable(draft) });

const bins = list(count, MAX_BINS);
const drafted = object<Drafted>({ depths: bins, ranks: bins, sources: table(count, MAX_BINS) });

const step = object<SavedStep>({
  at: number(0),
  tokens: list(token, MAX_TOKENS_A_STEP),
  numAccepted: count,
  numNodes: count,
  numPasses: count,
  tokensPerSecond: nullable(number(0)),
  speedup: nullable(number(0)),
  plainTokensPerSecond: nullable(number(0)),
  seconds: nullable(stepSeconds),
  tree: nullable(treeDebug),
  drafted: nullable(drafted),
});

const startedAt: Reader<string> = (value, path) => {
  const moment = text(value, path);
  if (!/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/.test(moment)) fail(path, "must be a time like 2026-01-31T12:00:00Z");
  return moment;
};

const savedRun = object<SavedRun>({
  request: generateRequest,
  startedAt,
  model: nullable(text),
  seed: nullable(seed),
  finished: nullable(finishedMessage),
  error: nullable(errorMessage),
  endedAt: nullable(number(0)),
  steps: list(step, MAX_STEPS),
});

const anyRun: Reader<unknown> = (value) => value;
const envelope = object<{ format: string; version: number; run: unknown }>({
  format: oneOf(FORMAT),
  version: integer(0),
  run: anyRun,
});

/** Raises `InvalidFileError`, whose message names the field. */
export function importRun(json: string): Run {
  const file = envelope(parse(json), "the file");
  if (file.version !== VERSION) fail("the file", `has version ${file.version}: this page reads version ${VERSION}`);
  return restore(savedRun(file.run, "run"));
}

/** Raises `InvalidFileError`; nothing is read of a file that is too large. */
export async function readRunFile(file: Blob): Promise<Run> {
  if (file.size > MAX_FILE_BYTES) {
    throw new InvalidFileError(`the file has ${file.size} bytes: at most ${MAX_FILE_BYTES} are read`);
  }
  return importRun(await file.text());
}

function parse(json: string): unknown {
  try {
    return JSON.parse(json);
  } catch (error) {
    if (error instanceof SyntaxError)
      throw new InvalidFileError("the file is not JSON: choose one that was exported here");
    throw error;
  }
}

function restore(saved: SavedRun): Run {
  const { finished, error } = saved;
  if (finished !== null && error !== null) fail("run.error", "stands beside run.finished: a run ends once");
  const steps: Step[] = [];
  const tokens: Token[] = [];
  let numTrees = 0;
  saved.steps.forEach(({ tokens: own, ...rest }, index) => {
    const path = `run.steps[${index}]`;
    checkStep(rest, own, steps.at(-1)?.at ?? 0, path);
    numTrees += rest.tree === null ? 0 : 1;
    if (numTrees > MAX_TREES) fail(`${path}.tree`, `is one too many: at most ${MAX_TREES} trees are read`);
    if (tokens.length + own.length > MAX_TOKENS) fail(`${path}.tokens`, `goes beyond ${MAX_TOKENS} tokens`);
    const counts = rest.tree === null ? rest.drafted : countDrafted(rest.tree);
    steps.push({ ...rest, firstToken: tokens.length, numTokens: own.length, drafted: counts });
    for (const { id, text, draft } of own) tokens.push({ id, text, step: index, draft });
  });
  const last = steps.at(-1)?.at ?? 0;
  if (saved.endedAt !== null && saved.endedAt < last) fail("run.endedAt", `is before the last step's ${last}`);
  const phase = error === null ? "finished" : "failed";
  return { ...saved, phase, status: null, steps, tokens, endedAt: saved.endedAt ?? last };
}

function checkStep(step: Omit<SavedStep, "tokens">, own: readonly SavedToken[], before: number, path: string): void {
  if (step.at < before) fail(`${path}.at`, `goes back in time, from ${before} to ${step.at}`);
  if (step.numAccepted > own.length) fail(`${path}.numAccepted`, `is more than the step's ${own.length} tokens`);
  if (step.numPasses > own.length) fail(`${path}.numPasses`, `is more than the step's ${own.length} tokens`);
  if (step.tree === null) return;
  const numDrafted = step.tree.candidates.length;
  if (numDrafted === 0) fail(`${path}.tree`, "is empty: a step that drafted nothing has null");
  if (numDrafted >= step.numNodes)
    fail(`${path}.tree`, `has ${numDrafted} nodes and a root, numNodes is ${step.numNodes}`);
}
