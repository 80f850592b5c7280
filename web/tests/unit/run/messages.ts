// Messages as the gateway sends them, for tests.

import type { ErrorMessage, FinishedMessage, StatusMessage, TokenMessage, TreeDebug } from "../../../src/wire/messages";

export interface NodeSpec {
  token: string;
  parent?: number;
  accepted?: boolean;
  source?: string;
  rank?: number;
  probability?: number;
}

/** Token ids are made of the text: equal text, equal id. */
export function idOf(token: string): number {
  return [...token].reduce((sum, char) => (31 * sum + (char.codePointAt(0) ?? 0)) % 49152, 7);
}

export function tree(nodes: NodeSpec[], rest: Partial<TreeDebug> = {}): TreeDebug {
  const parents = nodes.map((node) => node.parent ?? -1);
  const depths: number[] = [];
  for (const parent of parents) depths.push((depths[parent] ?? 0) + 1);
  return {
    candidates: nodes.map((node) => node.token),
    token_ids: nodes.map((node) => idOf(node.token)),
    accepted: nodes.map((node) => node.accepted ?? false),
    parents,
    depths,
    probabilities: nodes.map((node) => node.probability ?? 0.5),
    ranks: nodes.map((node) => node.rank ?? 0),
    sources: nodes.map((node) => node.source ?? "head"),
    num_nodes: nodes.length + 1,
    speedup: 1.8,
    tokens_per_second: 90,
    plain_tokens_per_second: 50,
    step: 1,
    step_seconds: { draft: 0.002, verify: 0.02, accept: 0.001, commit: 0.0005 },
    batch_size: 1,
    ...rest,
  };
}

export function tokenMessage(tokens: string[], rest: Partial<TokenMessage> = {}): TokenMessage {
  const nodes = rest.tree_debug?.candidates.length ?? 0;
  return {
    type: "token",
    text: tokens.join(""),
    token_ids: tokens.map(idOf),
    pieces: tokens,
    num_accepted: tokens.length - 1,
    num_nodes: nodes + 1,
    logprobs: null,
    tree_debug: null,
    ...rest,
  };
}

export function prefill(token: string): TokenMessage {
  return tokenMessage([token], {
    tree_debug: tree([], { step: 0, tokens_per_second: null, speedup: null }),
  });
}

/** A step of a straight tree whose first `accepted.length` nodes are taken, then `bonus`; `rejected` hang below the root. */
export function stepMessage(accepted: string[], bonus: string, rejected: string[] = []): TokenMessage {
  const nodes: NodeSpec[] = [
    ...accepted.map((token, i) => ({ token, parent: i - 1, accepted: true })),
    ...rejected.map((token, i) => ({ token, rank: i + 1 })),
  ];
  return tokenMessage([...accepted, bonus], { num_accepted: accepted.length, tree_debug: tree(nodes) });
}

export function status(state: StatusMessage["state"], rest: Partial<StatusMessage> = {}): StatusMessage {
  return { type: "status", state, position: null, progress: null, request_id: "r1", seed: 7, ...rest };
}

export function finished(rest: Partial<FinishedMessage> = {}): FinishedMessage {
  return {
    type: "finished",
    finish_reason: "length",
    text: "",
    stop: null,
    usage: { prompt_tokens: 10, completion_tokens: 20, total_tokens: 30 },
    metrics: {
      speculative_decoding: {
        mean_acceptance_length: 2.5,
        draft_acceptance_rate: 0.4,
        acceptance_histogram: [1, 2, 3],
        num_spec_steps: 8,
        num_accepted_draft_tokens: 12,
        num_draft_tokens: 30,
        num_spec_tokens: 7,
      },
      tokens_per_second: 100,
      speedup: 2,
      queue_seconds: 0.001,
      prefill_seconds: 0.05,
      ttft_seconds: 0.06,
      decode_seconds: 0.2,
      heads: "eagle@1",
      num_resumptions: 0,
    },
    request_id: "r1",
    seed: 7,
    ...rest,
  };
}

export function error(rest: Partial<ErrorMessage> = {}): ErrorMessage {
  return {
    type: "error",
    code: "internal",
    message: "it broke",
    retry_after_seconds: null,
    request_id: "r1",
    ...rest,
  };
}
