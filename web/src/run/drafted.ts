// How many nodes a step's tree had, where: small enough to keep for every step, when the trees themselves are let go.

import type { TreeDebug } from "../wire/messages";

/** Depths and ranks from here on are counted together: a hostile or odd message cannot make the lists long. */
export const MAX_BINS = 64;

export interface Drafted {
  /** [i] = nodes at depth i + 1; as long as the tree is deep. */
  depths: number[];
  /** [i] = nodes of rank i, 0 the drafter's best guess at its place. */
  ranks: number[];
  /** Nodes by who drafted them: "head", "lookup". */
  sources: Record<string, number>;
}

export function countDrafted(tree: TreeDebug): Drafted {
  const sources = new Map<string, number>();
  for (const source of tree.sources) sources.set(source, (sources.get(source) ?? 0) + 1);
  return {
    depths: histogram(tree.depths, 1),
    ranks: histogram(tree.ranks, 0),
    sources: Object.fromEntries(sources),
  };
}

function histogram(values: readonly number[], first: number): number[] {
  const counts: number[] = [];
  for (const value of values) {
    const bin = binOf(value, first);
    while (counts.length <= bin) counts.push(0);
    counts[bin] = (counts[bin] ?? 0) + 1;
  }
  return counts;
}

/** Where a depth (`first` 1) or a rank (`first` 0) is counted. */
export function binOf(value: number, first: number): number {
  return Math.max(0, Math.min(value - first, MAX_BINS - 1));
}
