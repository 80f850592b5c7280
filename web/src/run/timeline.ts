// A run's steps on a line, and where on it the page looks.

import { timeAt } from "./playback";
import type { Run, Step } from "./run";

/** Most tokens of a step in each of at most `maxColumns` stretches of equal length. */
export function columnsOf(steps: readonly Step[], maxColumns: number): number[] {
  const numColumns = Math.min(steps.length, maxColumns);
  const columns = new Array<number>(numColumns).fill(0);
  steps.forEach((step, index) => {
    const column = Math.floor((index * numColumns) / steps.length);
    columns[column] = Math.max(columns[column] ?? 0, step.numTokens);
  });
  return columns;
}

/** Prefill is step 0: "step 17 of 90 · 1.24 s". */
export function positionLabel(run: Run, position: number): string {
  if (run.steps.length === 0) return "no steps yet";
  const time = `${(timeAt(run.steps, position) / 1000).toFixed(2)} s`;
  if (position <= 1) return `prefill · ${time}`;
  return `step ${position - 1} of ${run.steps.length - 1} · ${time}`;
}
