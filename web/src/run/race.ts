// The same request with speculation off and on: what is asked, what the clocks say, and how it ended. Pure.

import type { GenerateRequest } from "../wire/messages";
import { hasEnded, type Run } from "./run";

export type LaneName = "plain" | "speculative";
export const LANE_NAMES = ["plain", "speculative"] as const satisfies readonly LaneName[];

/** Tokens of an answer that are shown from the first difference on, and those before it. */
const NUM_SHOWN = 8;
const NUM_LEAD = 6;
const SEED_BITS = 53;

export interface Clocks {
  /** Milliseconds from sending to the first token; null: none yet. */
  firstToken: number | null;
  /** Milliseconds from the first token to the last one so far. */
  decode: number | null;
  numTokens: number;
  /** Tokens a second over `decode`, which begins with the first token; null: too short to tell. */
  tokensPerSecond: number | null;
}

export interface Excerpt {
  lead: string;
  /** From the first difference on; empty: the answer had ended. */
  rest: string;
}

export type Verdict =
  | { kind: "identical"; numTokens: number }
  /** `position`: index of the first token that differs. */
  | { kind: "different"; position: number; numTokens: Record<LaneName, number>; excerpts: Record<LaneName, Excerpt> };

export interface Result {
  verdict: Verdict;
  /** Speed with speculation over speed without, both by the clock here; null: too short to tell. */
  ratio: number | null;
  acceptanceLength: number | null;
}

/** A seed of as many bits as a number here is exact to, from 64 random ones. */
export function drawSeed([high, low]: readonly [number, number]): number {
  return ((high >>> 0) % 2 ** (SEED_BITS - 32)) * 2 ** 32 + (low >>> 0);
}

/** What a lane asks. Trees are left out: they would only weigh on the lane that has them. */
export function laneRequest(request: GenerateRequest, lane: LaneName, seed: number): GenerateRequest {
  const { request_id: _, ...shared } = request;
  return {
    ...shared,
    seed: request.seed ?? seed,
    speculation: { ...request.speculation, enabled: lane === "speculative" },
    tree_debug: false,
  };
}

export function clocksOf(run: Run): Clocks {
  const [first, last] = [run.steps[0], run.steps.at(-1)];
  const numTokens = run.tokens.length;
  if (first === undefined || last === undefined) {
    return { firstToken: null, decode: null, numTokens, tokensPerSecond: null };
  }
  const decode = last.at - first.at;
  // The first message's tokens were there when the clock of decoding began.
  const numDecoded = numTokens - first.numTokens;
  const tokensPerSecond = decode > 0 && numDecoded > 0 ? (1000 * numDecoded) / decode : null;
  return { firstToken: first.at, decode, numTokens, tokensPerSecond };
}

export type Outcome = "complete" | "failed" | "cancelled" | "running";

export function outcomeOf(run: Run): Outcome {
  if (!hasEnded(run)) return "running";
  if (run.error !== null) return "failed";
  return run.finished?.finish_reason === "cancelled" ? "cancelled" : "complete";
}

/** null: not both lanes came to their end. */
export function resultOf(runs: Record<LaneName, Run>): Result | null {
  if (LANE_NAMES.some((name) => outcomeOf(runs[name]) !== "complete")) return null;
  const plain = clocksOf(runs.plain).tokensPerSecond;
  const speculative = clocksOf(runs.speculative).tokensPerSecond;
  return {
    verdict: compare(runs),
    ratio: plain === null || speculative === null ? null : speculative / plain,
    acceptanceLength: runs.speculative.finished?.metrics.speculative_decoding.mean_acceptance_length ?? null,
  };
}

export function compare({ plain, speculative }: Record<LaneName, Run>): Verdict {
  const longest = Math.max(plain.tokens.length, speculative.tokens.length);
  for (let position = 0; position < longest; position += 1) {
    if (plain.tokens[position]?.id === speculative.tokens[position]?.id) continue;
    return {
      kind: "different",
      position,
      numTokens: { plain: plain.tokens.length, speculative: speculative.tokens.length },
      excerpts: { plain: excerpt(plain, position), speculative: excerpt(speculative, position) },
    };
  }
  return { kind: "identical", numTokens: longest };
}

function excerpt(run: Run, position: number): Excerpt {
  const join = (from: number, to: number) =>
    run.tokens
      .slice(Math.max(0, from), to)
      .map((token) => token.text)
      .join("");
  return { lead: join(position - NUM_LEAD, position), rest: join(position, position + NUM_SHOWN) };
}

/** Why different tokens are no surprise; null: they are one. */
export function reasonToDiffer(request: GenerateRequest): string | null {
  const acceptance = request.speculation?.acceptance ?? "lossless";
  if (acceptance === "typical") return "Typical acceptance changes the output: that is what it is faster for.";
  if (acceptance === "rejection" && (request.temperature ?? 0) > 0) {
    return "Rejection keeps the distribution, not the tokens: two draws of it differ.";
  }
  return null;
}
