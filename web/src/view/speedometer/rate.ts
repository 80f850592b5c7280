// Speeds of a run at one of its steps.

import type { Run } from "../../run/run";

const WINDOW_MILLISECONDS = 1000;
/** Below this a rate says more about when messages were read than about the engine. */
const MIN_WINDOW_MILLISECONDS = 150;

export interface Speeds {
  /** Tokens per second over the last second; null: too little has come yet. */
  current: number | null;
  /** Tokens per second from the first token on, as the engine measures it. */
  average: number | null;
  /** Of plain decoding; null: not measured. */
  plain: number | null;
  /** average over plain decoding, as the engine measures it. */
  speedup: number | null;
}

/** The speeds at the end of the first `position` steps. */
export function speedsAt(run: Run, position: number): Speeds {
  const last = run.steps[position - 1];
  return {
    current: currentRate(run, position),
    average: last?.tokensPerSecond ?? null,
    plain: last?.plainTokensPerSecond ?? null,
    speedup: last?.speedup ?? null,
  };
}

/** Tokens per second in the second before step `position - 1` came. Costs O(steps in that second). */
function currentRate({ steps }: Run, position: number): number | null {
  const end = steps[position - 1];
  if (end === undefined) return null;
  let numTokens = 0;
  let start = end;
  for (let i = position - 1; i > 0 && end.at - start.at < WINDOW_MILLISECONDS; i -= 1) {
    numTokens += steps[i]?.numTokens ?? 0;
    start = steps[i - 1] ?? start;
  }
  const milliseconds = end.at - start.at;
  return milliseconds < MIN_WINDOW_MILLISECONDS ? null : (1000 * numTokens) / milliseconds;
}
