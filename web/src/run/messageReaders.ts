// Readers of the wire's messages out of files. Each has the generated type: a field that the wire gains fails to compile.

import type {
  ChatMessage,
  ErrorMessage,
  FinishedMessage,
  GenerateRequest,
  GenerationMetrics,
  Speculation,
  SpeculativeDecodingMetrics,
  StepSeconds,
  TreeDebug,
  Usage,
} from "../wire/messages";
import {
  either,
  fail,
  flag,
  integer,
  list,
  nullable,
  number,
  object,
  oneOf,
  optional,
  type Reader,
  table,
  text,
} from "./guards";

/** Nodes of a tree; engines verify 128 rows at most. */
const MAX_NODES = 4096;
const MAX_ENTRIES = 1 << 18;

export const count = integer(0);
export const seconds = number(0);
/** Of 63 bits on the wire: more than a number here is exact to. */
export const seed = number(0);

function nonEmpty<T>(read: Reader<T>): Reader<[T, ...T[]]> {
  const readList = list(read, MAX_ENTRIES);
  return (value, path) => {
    const [first, ...others] = readList(value, path);
    if (first === undefined) fail(path, "is empty");
    return [first, ...others];
  };
}

const chatMessage = object<ChatMessage>({
  role: oneOf("system", "user", "assistant", "tool"),
  content: text,
});

const speculation = object<Speculation>({
  enabled: optional(flag),
  max_nodes: optional(nullable(integer(1))),
  acceptance: optional(oneOf("lossless", "rejection", "typical")),
});

export const generateRequest = object<GenerateRequest>({
  max_tokens: optional(nullable(count)),
  temperature: optional(number(0)),
  top_p: optional(number(0, 1)),
  top_k: optional(count),
  min_p: optional(number(0, 1)),
  repetition_penalty: optional(number(0)),
  presence_penalty: optional(number()),
  frequency_penalty: optional(number()),
  logit_bias: optional(table(number(), MAX_ENTRIES)),
  seed: optional(nullable(seed)),
  stop: optional(list(text, 64)),
  stop_token_ids: optional(list(count, 64)),
  ignore_eos: optional(flag),
  logprobs: optional(nullable(count)),
  type: optional(oneOf("generate")),
  prompt: optional(nullable(text)),
  messages: optional(nullable(nonEmpty(chatMessage))),
  prompt_token_ids: optional(nullable(nonEmpty(count))),
  generated_token_ids: optional(list(count, MAX_ENTRIES)),
  model: optional(nullable(text)),
  speculation: optional(speculation),
  tree_debug: optional(flag),
  request_id: optional(nullable(text)),
});

const usage = object<Usage>({ prompt_tokens: count, completion_tokens: count, total_tokens: count });

const speculativeDecoding = object<SpeculativeDecodingMetrics>({
  mean_acceptance_length: number(0),
  draft_acceptance_rate: number(0, 1),
  acceptance_histogram: list(count, MAX_NODES),
  num_spec_steps: count,
  num_accepted_draft_tokens: count,
  num_draft_tokens: count,
  num_spec_tokens: count,
});

const metrics = object<GenerationMetrics>({
  speculative_decoding: speculativeDecoding,
  tokens_per_second: nullable(number(0)),
  speedup: nullable(number(0)),
  queue_seconds: seconds,
  prefill_seconds: nullable(seconds),
  ttft_seconds: nullable(seconds),
  decode_seconds: nullable(seconds),
  heads: nullable(text),
  num_resumptions: count,
});

export const finishedMessage = object<FinishedMessage>({
  type: oneOf("finished"),
  finish_reason: oneOf("stop", "length", "cancelled"),
  text,
  stop: nullable(either((value) => typeof value === "string", text, count)),
  usage,
  metrics,
  request_id: nullable(text),
  seed: nullable(seed),
});

export const errorMessage = object<ErrorMessage>({
  type: oneOf("error"),
  code: text,
  message: text,
  retry_after_seconds: nullable(seconds),
  request_id: nullable(text),
});

export const stepSeconds = object<StepSeconds>({ draft: seconds, verify: seconds, accept: seconds, commit: seconds });

const treeLists = object<TreeDebug>({
  candidates: list(text, MAX_NODES),
  token_ids: list(count, MAX_NODES),
  accepted: list(flag, MAX_NODES),
  parents: list(integer(-1), MAX_NODES),
  depths: list(integer(1), MAX_NODES),
  probabilities: list(number(0, 1), MAX_NODES),
  ranks: list(count, MAX_NODES),
  sources: list(text, MAX_NODES),
  num_nodes: count,
  speedup: nullable(number(0)),
  tokens_per_second: nullable(number(0)),
  plain_tokens_per_second: nullable(number(0)),
  step: count,
  step_seconds: stepSeconds,
  batch_size: count,
});

/** A tree that is one: lists of equal length, parents first, depths theirs plus one, the accepted nodes one path. */
export const treeDebug: Reader<TreeDebug> = (value, path) => {
  const tree = treeLists(value, path);
  const size = tree.candidates.length;
  for (const name of ["token_ids", "accepted", "parents", "depths", "probabilities", "ranks", "sources"] as const) {
    const { length } = tree[name];
    if (length !== size) fail(`${path}.${name}`, `has ${length} entries, candidates has ${size}`);
  }
  let end = -1;
  for (let node = 0; node < size; node += 1) {
    const parent = tree.parents[node] ?? -1;
    if (parent >= node) fail(`${path}.parents[${node}]`, `must be below ${node}: parents come first`);
    const depth = 1 + (tree.depths[parent] ?? 0);
    if (tree.depths[node] !== depth) fail(`${path}.depths[${node}]`, `must be ${depth}, its parent's depth + 1`);
    if (!tree.accepted[node]) continue;
    if (parent !== end) fail(`${path}.accepted[${node}]`, "does not go on with the accepted path");
    end = node;
  }
  return tree;
};
