// What a run's steps add up to: one pass over them, carried on as they come.

import { binOf } from "../run/drafted";
import type { Run, Step } from "../run/run";
import type { StepSeconds } from "../wire/messages";

/** Recorded steps that the moving average of the acceptance length spans. */
export const AVERAGE_STEPS = 16;
/** Milliseconds of tokens that the speed of a moment counts, and the least that it is told of. */
export const SPEED_WINDOW = 1000;
const SPEED_LEAST = 200;

export const VERBS = ["draft", "verify", "accept", "commit"] as const satisfies readonly (keyof StepSeconds)[];
export type Verb = (typeof VERBS)[number];

/** One column an entry; all columns of a series are equally long. */
export interface PassSeries {
  /** Index into `Run.steps`, without those that verified nothing. */
  step: number[];
  /** Tokens a verification step. */
  acceptanceLength: number[];
  averageLength: number[];
  /** Rows verified, root included. */
  numNodes: number[];
}

export interface TimeSeries {
  step: number[];
  /** Of the step's verbs, milliseconds. */
  milliseconds: Record<Verb, number[]>;
}

export interface SpeedSeries {
  /** Since the first token. */
  seconds: number[];
  /** Tokens a second over the last second, as received here; null: too early to tell. */
  now: (number | null)[];
  /** From the first token to here, by the engine's clock. */
  soFar: (number | null)[];
  /** Plain decoding of this engine at this batch size. */
  plain: (number | null)[];
}

export interface DepthFigures {
  depth: number;
  numDrafted: number;
  numAccepted: number;
  /** Steps whose trees were so deep. */
  numSteps: number;
  /** Of them, those whose accepted path came so deep, by who drafted the node there. */
  acceptedBy: Map<string, number>;
}

export interface CountFigures<T> {
  of: T;
  numDrafted: number;
  numAccepted: number;
}

export interface Figures {
  /** Verification steps, and those that verified the root alone. */
  numPasses: number;
  numPlain: number;
  /** That they gave: prefill's are in none of them. */
  numTokens: number;
  /** Nodes without roots; those of them that were accepted. */
  numDrafted: number;
  numAccepted: number;
  passes: PassSeries;
  times: TimeSeries;
  speeds: SpeedSeries;
  /** Of steps whose trees came along. [i] is depth i + 1. */
  depths: DepthFigures[];
  ranks: CountFigures<number>[];
  sources: CountFigures<string>[];
  /** Sums over `times`. */
  seconds: Record<Verb, number>;
}

export function acceptanceLength(figures: Figures): number | null {
  return figures.numPasses === 0 ? null : figures.numTokens / figures.numPasses;
}

export class FiguresBuilder {
  readonly #run: Run;
  #figures = noFigures();
  #numSteps = 0;

  constructor(run: Run) {
    this.#run = run;
  }

  /** Of the first `position` steps. Forward it adds the new ones to the same object, back it starts over. */
  upTo(position: number): Figures {
    const end = Math.min(position, this.#run.steps.length);
    if (end < this.#numSteps) {
      this.#figures = noFigures();
      this.#numSteps = 0;
    }
    for (; this.#numSteps < end; this.#numSteps += 1) addStep(this.#figures, this.#run, this.#numSteps);
    return this.#figures;
  }
}

function noFigures(): Figures {
  return {
    numPasses: 0,
    numPlain: 0,
    numTokens: 0,
    numDrafted: 0,
    numAccepted: 0,
    passes: { step: [], acceptanceLength: [], averageLength: [], numNodes: [] },
    times: { step: [], milliseconds: { draft: [], verify: [], accept: [], commit: [] } },
    speeds: { seconds: [], now: [], soFar: [], plain: [] },
    depths: [],
    ranks: [],
    sources: [],
    seconds: { draft: 0, verify: 0, accept: 0, commit: 0 },
  };
}

function addStep(figures: Figures, run: Run, index: number): void {
  const step = run.steps[index];
  if (step === undefined) return;
  addSpeed(figures.speeds, run, index, step);
  if (step.numPasses === 0) return;
  figures.numPasses += step.numPasses;
  // Of steps that came merged it cannot be told which of them drafted.
  if (step.numNodes <= step.numPasses) figures.numPlain += step.numPasses;
  figures.numTokens += passTokens(step);
  figures.numDrafted += Math.max(0, step.numNodes - step.numPasses);
  figures.numAccepted += step.numAccepted;
  addPass(figures.passes, run, index, step);
  addTimes(figures, index, step);
  addTree(figures, run, step);
}

/** Without prefill's token, which may have been merged with them. */
function passTokens(step: Step): number {
  return Math.min(step.numTokens, step.numAccepted + step.numPasses);
}

function addPass(passes: PassSeries, run: Run, index: number, step: Step): void {
  let [numTokens, numPasses] = [passTokens(step), step.numPasses];
  passes.step.push(index);
  passes.acceptanceLength.push(numTokens / numPasses);
  passes.numNodes.push(step.numNodes / numPasses);
  for (const before of passes.step.slice(-AVERAGE_STEPS, -1)) {
    const other = run.steps[before];
    if (other === undefined) continue;
    numTokens += passTokens(other);
    numPasses += other.numPasses;
  }
  passes.averageLength.push(numTokens / numPasses);
}

function addTimes(figures: Figures, index: number, step: Step): void {
  if (step.seconds === null) return;
  figures.times.step.push(index);
  for (const verb of VERBS) {
    figures.times.milliseconds[verb].push(1000 * step.seconds[verb]);
    figures.seconds[verb] += step.seconds[verb];
  }
}

function addSpeed(speeds: SpeedSeries, run: Run, index: number, step: Step): void {
  const start = run.steps[0]?.at ?? 0;
  speeds.seconds.push((step.at - start) / 1000);
  speeds.soFar.push(step.tokensPerSecond);
  speeds.plain.push(step.plainTokensPerSecond);
  let numTokens = step.numTokens;
  let first = index - 1;
  for (; first > 0 && step.at - (run.steps[first]?.at ?? 0) < SPEED_WINDOW; first -= 1) {
    numTokens += run.steps[first]?.numTokens ?? 0;
  }
  // The tokens of step `first` itself came before the span.
  const span = step.at - (run.steps[first]?.at ?? step.at);
  speeds.now.push(span < SPEED_LEAST ? null : (1000 * numTokens) / span);
}

function addTree(figures: Figures, run: Run, step: Step): void {
  if (step.drafted === null) return;
  const { depths, ranks, sources } = step.drafted;
  depths.forEach((numNodes, i) => {
    const entry = depthEntry(figures.depths, i + 1);
    entry.numSteps += 1;
    entry.numDrafted += numNodes;
  });
  ranks.forEach((numNodes, rank) => {
    countEntry(figures.ranks, rank).numDrafted += numNodes;
  });
  for (const [source, numNodes] of Object.entries(sources)) countEntry(figures.sources, source).numDrafted += numNodes;
  for (let i = step.firstToken; i < step.firstToken + step.numTokens; i += 1) {
    const draft = run.tokens[i]?.draft ?? null;
    if (draft === null) continue;
    const entry = depthEntry(figures.depths, 1 + binOf(draft.depth, 1));
    entry.numAccepted += 1;
    entry.acceptedBy.set(draft.source, (entry.acceptedBy.get(draft.source) ?? 0) + 1);
    countEntry(figures.ranks, binOf(draft.rank, 0)).numAccepted += 1;
    countEntry(figures.sources, draft.source).numAccepted += 1;
  }
}

function depthEntry(depths: DepthFigures[], depth: number): DepthFigures {
  for (let next = depths.length + 1; next <= depth; next += 1) {
    depths.push({ depth: next, numDrafted: 0, numAccepted: 0, numSteps: 0, acceptedBy: new Map() });
  }
  return depths[depth - 1] as DepthFigures;
}

function countEntry<T extends string | number>(entries: CountFigures<T>[], of: T): CountFigures<T> {
  let entry = entries.find((known) => known.of === of);
  if (entry === undefined) {
    entry = { of, numDrafted: 0, numAccepted: 0 };
    entries.push(entry);
    entries.sort((a, b) => (a.of < b.of ? -1 : 1));
  }
  return entry;
}
