// How fast steps come, in classes that animations are chosen by: no animation outlives the step that it belongs to.

import type { Step } from "../run/run";

/** calm: time for every animation; brisk: short ones; fast: several steps a blink, colours only. */
export type Pace = "calm" | "brisk" | "fast";

const NUM_STEPS = 8;
/** Mean milliseconds a step below which a pace is quicker than calm, than brisk. */
const BRISK_BELOW = 400;
const FAST_BELOW = 90;
/** By how much the mean must be over the bound to slow down again. */
const HYSTERESIS = 1.35;

/** The pace at the end of the first `position` steps, coming from `previous`. */
export function paceAt(steps: readonly Step[], position: number, previous: Pace = "calm"): Pace {
  const last = steps[position - 1];
  const first = steps[Math.max(0, position - 1 - NUM_STEPS)];
  if (last === undefined || first === undefined || last === first) return previous;
  const mean = (last.at - first.at) / Math.min(NUM_STEPS, position - 1);
  if (mean < FAST_BELOW * (previous === "fast" ? HYSTERESIS : 1)) return "fast";
  return mean < BRISK_BELOW * (previous === "calm" ? 1 : HYSTERESIS) ? "brisk" : "calm";
}
