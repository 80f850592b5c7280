// The tree in words: tooltips, captions, the text alternative.

import type { Run } from "../run/run";
import { tokenLabel, visibleText } from "./label";
import type { Target } from "./scene";

export type Fate = "accepted" | "rejected" | "backbone";

export interface NodeFacts {
  /** With what cannot be seen made visible, whole. */
  token: string;
  tokenId: number;
  /** Index into `Run.steps`. */
  step: number;
  fate: Fate;
  /** null: no drafter proposed it. */
  draft: { depth: number; rank: number; probability: number; source: string } | null;
}

/** What is known of a token or of a drafted node; null: it is no longer kept. */
export function factsOf(run: Run, target: Target): NodeFacts | null {
  if ("token" in target) {
    const token = run.tokens[target.token];
    if (token === undefined) return null;
    const { id, text, step, draft } = token;
    return { token: visibleText(text), tokenId: id, step, fate: draft === null ? "backbone" : "accepted", draft };
  }
  const tree = run.steps[target.step]?.tree ?? null;
  const text = tree?.candidates[target.node];
  if (tree === null || text === undefined) return null;
  return {
    token: visibleText(text),
    tokenId: tree.token_ids[target.node] ?? 0,
    step: target.step,
    fate: tree.accepted[target.node] ? "accepted" : "rejected",
    draft: {
      depth: tree.depths[target.node] ?? 0,
      rank: tree.ranks[target.node] ?? 0,
      probability: tree.probabilities[target.node] ?? 0,
      source: tree.sources[target.node] ?? "",
    },
  };
}

/** 0.4231 -> "42.3 %"; what is small keeps two digits. */
export function percent(share: number): string {
  const value = 100 * share;
  if (value === 0 || value >= 9.995) return `${value.toFixed(value >= 99.95 || value === 0 ? 0 : 1)} %`;
  return value >= 0.01 ? `${Number(value.toPrecision(2))} %` : "< 0.01 %";
}

/** The shown step in one line: "step 7: 12 nodes, accepted 3". */
export function caption(run: Run, step: number): string {
  const shown = run.steps[step];
  if (shown === undefined) return "";
  if (shown.numNodes === 0 || step === 0) return "prefill: the first token";
  const name = `step ${step}`;
  if (shown.numNodes === 1) return `${name}: nothing drafted, a plain decoding step`;
  const what = `${name}: ${count(shown.numNodes - 1, "node")}, accepted ${shown.numAccepted}`;
  return shown.tree === null ? `${what}; its tree is no longer kept` : what;
}

/** The shown step with its tokens, for who cannot see it. */
export function summary(run: Run, step: number): string {
  const shown = run.steps[step];
  if (shown === undefined) return "";
  const tokens = run.tokens.slice(shown.firstToken, shown.firstToken + shown.numTokens);
  const labels = (some: typeof tokens) => some.map((token) => `'${tokenLabel(token.text)}'`).join(" ");
  const accepted = tokens.slice(0, shown.numAccepted);
  const own = tokens.slice(shown.numAccepted);
  const drafts = accepted.length === 0 ? "" : `: ${labels(accepted)}`;
  return `${caption(run, step)}${drafts}${own.length === 0 ? "" : `; the backbone's own: ${labels(own)}`}`;
}

function count(number: number, noun: string): string {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}
