// Figures as charts and tables: which columns, which words. Pure.

import { type CountFigures, type Figures, VERBS, type Verb } from "./figures";
import { percent, share, short } from "./format";

/** Rows of a table of steps: the latest ones. */
const MAX_ROWS = 50;

/** In which a step's verbs lie on each other, the longest at the bottom. */
export const STACK_ORDER: readonly Verb[] = ["verify", "draft", "accept", "commit"];

export interface TableData {
  columns: readonly string[];
  rows: readonly (readonly string[])[];
}

/** One bar: stacked segments, each a share of the whole width. */
export interface Bar {
  label: string;
  segments: readonly { share: number; kind: string }[];
  value: string;
  detail: string;
}

/** Column i holds the sum of the verbs up to the i-th of `STACK_ORDER`. */
export function stackedTimes(figures: Figures): number[][] {
  const sums = new Array<number>(figures.times.step.length).fill(0);
  return STACK_ORDER.map((verb) => {
    figures.times.milliseconds[verb].forEach((value, i) => {
      sums[i] = (sums[i] ?? 0) + value;
    });
    return [...sums];
  });
}

/** Sources have colours of their own as far as they are known. */
export function kindOf(source: string): string {
  return source === "head" || source === "lookup" ? source : "other";
}

export function depthBars({ depths }: Figures): Bar[] {
  return depths.map(({ depth, numSteps, numAccepted, acceptedBy }) => ({
    label: String(depth),
    segments: [...acceptedBy]
      .sort()
      .map(([source, count]) => ({ kind: kindOf(source), share: numSteps === 0 ? 0 : count / numSteps })),
    value: share(numAccepted, numSteps) ?? "none",
    detail: `${numAccepted} of ${numSteps} steps`,
  }));
}

export function countBars<T>(
  entries: readonly CountFigures<T>[],
  label: (of: T) => string,
  kind: (of: T) => string,
): Bar[] {
  return entries.map(({ of, numDrafted, numAccepted }) => ({
    label: label(of),
    segments: [{ kind: kind(of), share: numDrafted === 0 ? 0 : numAccepted / numDrafted }],
    value: share(numAccepted, numDrafted) ?? "none",
    detail: `${numAccepted} of ${numDrafted} nodes`,
  }));
}

/** Where a step's time goes, over all steps. */
export function timeShares({ seconds, times }: Figures): { verb: Verb; share: number; meanMilliseconds: number }[] {
  const total = VERBS.reduce((sum, verb) => sum + seconds[verb], 0);
  const numSteps = times.step.length;
  return STACK_ORDER.map((verb) => ({
    verb,
    share: total === 0 ? 0 : seconds[verb] / total,
    meanMilliseconds: numSteps === 0 ? 0 : (1000 * seconds[verb]) / numSteps,
  }));
}

export function lengthTable({ passes }: Figures): TableData {
  return latest(["Step", "Tokens", "Average"], passes.step.length, (i) => [
    String(passes.step[i]),
    short(passes.acceptanceLength[i] ?? 0),
    short(passes.averageLength[i] ?? 0),
  ]);
}

export function sizeTable({ passes }: Figures): TableData {
  return latest(["Step", "Rows verified"], passes.step.length, (i) => [
    String(passes.step[i]),
    short(passes.numNodes[i] ?? 0),
  ]);
}

export function speedTable({ speeds }: Figures): TableData {
  const cell = (value: number | null | undefined) =>
    value === null || value === undefined ? "none yet" : short(value);
  return latest(["Seconds", "Last second", "So far", "Plain"], speeds.seconds.length, (i) => [
    (speeds.seconds[i] ?? 0).toFixed(2),
    cell(speeds.now[i]),
    cell(speeds.soFar[i]),
    cell(speeds.plain[i]),
  ]);
}

export function timeTable({ times }: Figures): TableData {
  return latest(["Step", ...STACK_ORDER.map((verb) => `${verb} (ms)`)], times.step.length, (i) => [
    String(times.step[i]),
    ...STACK_ORDER.map((verb) => (times.milliseconds[verb][i] ?? 0).toFixed(2)),
  ]);
}

export function depthTable({ depths }: Figures): TableData {
  return {
    columns: ["Depth", "Nodes drafted", "Accepted", "Steps so deep", "Share of steps"],
    rows: depths.map(({ depth, numDrafted, numAccepted, numSteps }) => [
      String(depth),
      String(numDrafted),
      String(numAccepted),
      String(numSteps),
      share(numAccepted, numSteps) ?? "none",
    ]),
  };
}

export function countTable<T>(name: string, entries: readonly CountFigures<T>[], label: (of: T) => string): TableData {
  return {
    columns: [name, "Nodes drafted", "Accepted", "Share"],
    rows: entries.map(({ of, numDrafted, numAccepted }) => [
      label(of),
      String(numDrafted),
      String(numAccepted),
      share(numAccepted, numDrafted) ?? "none",
    ]),
  };
}

function latest(columns: readonly string[], numRows: number, row: (i: number) => string[]): TableData {
  const first = Math.max(0, numRows - MAX_ROWS);
  return { columns, rows: Array.from({ length: numRows - first }, (_, i) => row(first + i)) };
}

/** Where step times come from: GPUs are not waited for. */
export function timeSource(device: string | null): string {
  if (device === null) return "as the engine reports it";
  return device.startsWith("cpu") ? "measured on this engine" : "from the start-up calibration";
}

export interface Tile {
  name: string;
  value: string;
  unit: string;
}

export function tiles(figures: Figures): Tile[] {
  const { numPasses, numTokens, numPlain, numAccepted, numDrafted, speeds } = figures;
  const mean = (sum: number) => (numPasses === 0 ? "–" : short(sum / numPasses));
  const speed = speeds.soFar.at(-1) ?? null;
  return [
    { name: "Acceptance length", value: mean(numTokens), unit: "tokens a step" },
    { name: "Decode speed", value: speed === null ? "–" : short(speed), unit: "tokens/s so far" },
    { name: "Accepted", value: numDrafted === 0 ? "–" : percent(numAccepted / numDrafted), unit: "of nodes" },
    { name: "Tree size", value: mean(numDrafted + numPasses), unit: "rows a step" },
    { name: "Plain steps", value: share(numPlain, numPasses) ?? "–", unit: "drafted nothing" },
  ];
}
