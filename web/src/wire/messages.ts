// Generated from the gateway's schema by `make web-types`: change that, not this.

export interface Wire {
  sent: GenerateRequest | CancelRequest;
  received: StatusMessage | TokenMessage | FinishedMessage | ErrorMessage;
  info: GatewayInfo;
  health: Health;
  refused: ErrorAnswer;
}
/**
 * A generation: the payload of WebSocket `/generate_stream` and of `POST /generate`.
 *
 * Exactly one of `prompt` (a text to continue), `messages` (a chat) and `prompt_token_ids`.
 */
export interface GenerateRequest {
  /**
   * of the answer; null: up to the context's end
   */
  max_tokens?: number | null;
  temperature?: number;
  top_p?: number;
  /**
   * 0 = all
   */
  top_k?: number;
  min_p?: number;
  /**
   * over prompt and answer
   */
  repetition_penalty?: number;
  /**
   * over the answer, as OpenAI defines it
   */
  presence_penalty?: number;
  /**
   * over the answer, as OpenAI defines it
   */
  frequency_penalty?: number;
  /**
   * token id -> what is added to its logit
   */
  logit_bias?: {
    [k: string]: number;
  };
  /**
   * same seed, same tokens; null: drawn by the gateway
   */
  seed?: number | null;
  /**
   * the answer ends before any of them
   *
   * @maxItems 64
   */
  stop?: string[];
  /**
   * @maxItems 64
   */
  stop_token_ids?: number[];
  ignore_eos?: boolean;
  /**
   * report log-probabilities, with so many alternatives
   */
  logprobs?: number | null;
  type?: "generate";
  prompt?: string | null;
  messages?: [ChatMessage, ...ChatMessage[]] | null;
  prompt_token_ids?: [number, ...number[]] | null;
  /**
   * tokens of the answer that were already received: it goes on behind them, as if never interrupted (penalties, stops, limits and random numbers count them); text is sent from there on. Needs `seed`, except at temperature 0.
   */
  generated_token_ids?: number[];
  /**
   * name or alias; null: what is served
   */
  model?: string | null;
  speculation?: Speculation;
  /**
   * send the tree of every step
   */
  tree_debug?: boolean;
  /**
   * null: made by the gateway
   */
  request_id?: string | null;
}
export interface ChatMessage {
  role: "system" | "user" | "assistant" | "tool";
  content: string;
}
/**
 * How a request speculates. `lossless` gives the tokens of plain decoding, `rejection` its distribution, `typical`
 * is faster and changes the output.
 */
export interface Speculation {
  enabled?: boolean;
  /**
   * rows of a verification pass, root included; null: the engine's limit
   */
  max_nodes?: number | null;
  acceptance?: "lossless" | "rejection" | "typical";
}
/**
 * On a WebSocket: end the running generation; it finishes with reason `cancelled`.
 */
export interface CancelRequest {
  type: "cancel";
}
/**
 * Before the first token; none may come at all.
 */
export interface StatusMessage {
  type: "status";
  state: "loading" | "queued" | "prefill" | "resuming";
  /**
   * queued: requests in front of this one
   */
  position: number | null;
  /**
   * loading, prefill: share done
   */
  progress: number | null;
  request_id: string | null;
  /**
   * that the tokens are drawn with: what a client needs to go on
   */
  seed: number | null;
}
/**
 * One step's tokens. The first message carries the token that prefill gave, and an empty tree.
 */
export interface TokenMessage {
  type: "token";
  /**
   * that became certain; it may lag behind the tokens (UTF-8, held-back stop strings)
   */
  text: string;
  /**
   * the accepted drafts in path order, then the bonus token
   */
  token_ids: number[];
  /**
   * text that each token released; joined they are `text`
   */
  pieces: string[];
  /**
   * how many of the tokens were drafts: the first ones
   */
  num_accepted: number;
  /**
   * rows verified, root included
   */
  num_nodes: number;
  logprobs: TokenLogprob[] | null;
  tree_debug: TreeDebug | null;
}
/**
 * Natural logarithms, from the backbone's own distribution before any sampling parameter.
 */
export interface TokenLogprob {
  token_id: number;
  token: string;
  /**
   * the token's, where it is parts of characters, which `token` has as U+FFFD
   */
  bytes: number[] | null;
  logprob: number;
  top: TopLogprob[];
}
export interface TopLogprob {
  token_id: number;
  token: string;
  /**
   * the token's, where it is parts of characters, which `token` has as U+FFFD
   */
  bytes: number[] | null;
  logprob: number;
}
/**
 * The verified tree of one step, the root left out: lists of one entry a node, parents first.
 */
export interface TreeDebug {
  /**
   * each node's token as text
   */
  candidates: string[];
  token_ids: number[];
  accepted: boolean[];
  /**
   * index into the lists, -1 = child of the root
   */
  parents: number[];
  depths: number[];
  /**
   * of the whole path, by the drafters' estimate
   */
  probabilities: number[];
  /**
   * of the node among the drafter's guesses at its place, 0 the best
   */
  ranks: number[];
  /**
   * who drafted it: "head" or "lookup"
   */
  sources: string[];
  /**
   * rows verified, root included
   */
  num_nodes: number;
  /**
   * this request's decode speed so far over the engine's own plain decoding at the same batch size
   */
  speedup: number | null;
  /**
   * of this request, from its first token to here
   */
  tokens_per_second: number | null;
  /**
   * a stream's plain decoding at this batch size, measured
   */
  plain_tokens_per_second: number | null;
  step: number;
  step_seconds: StepSeconds;
  /**
   * sequences in the step
   */
  batch_size: number;
}
/**
 * Wall-clock time of a step's verbs; on a GPU the start-up calibration's, as measuring would mean waiting.
 */
export interface StepSeconds {
  draft: number;
  verify: number;
  accept: number;
  commit: number;
}
export interface FinishedMessage {
  type: "finished";
  finish_reason: "stop" | "length" | "cancelled";
  /**
   * what was held back; nothing after a stop string
   */
  text: string;
  /**
   * the stop string or token that ended it
   */
  stop: string | number | null;
  usage: Usage;
  metrics: GenerationMetrics;
  request_id: string | null;
  seed: number | null;
}
/**
 * Tokens of a request, as OpenAI counts them; the end-of-sequence token is a completion token.
 */
export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
}
/**
 * What one generation cost.
 */
export interface GenerationMetrics {
  speculative_decoding: SpeculativeDecodingMetrics;
  /**
   * decode speed, first token to last
   */
  tokens_per_second: number | null;
  /**
   * tokens_per_second over the engine's own plain decoding, same batch size
   */
  speedup: number | null;
  queue_seconds: number;
  prefill_seconds: number | null;
  /**
   * arrival at the engine to the first token
   */
  ttft_seconds: number | null;
  decode_seconds: number | null;
  /**
   * name@version that drafted last
   */
  heads: string | null;
  /**
   * times that the gateway went on with another engine
   */
  num_resumptions: number;
}
/**
 * A request's verification steps. The first token comes from prefill and is in none of them, so completion tokens =
 * 1 + num_spec_steps + num_accepted_draft_tokens.
 */
export interface SpeculativeDecodingMetrics {
  /**
   * tokens emitted per verification step
   */
  mean_acceptance_length: number;
  /**
   * accepted / drafted nodes
   */
  draft_acceptance_rate: number;
  /**
   * [i] = steps that accepted i drafts
   */
  acceptance_histogram: number[];
  /**
   * verification steps, plain ones (one node) included
   */
  num_spec_steps: number;
  num_accepted_draft_tokens: number;
  /**
   * nodes verified, roots not counted
   */
  num_draft_tokens: number;
  /**
   * most drafts verified in one step
   */
  num_spec_tokens: number;
}
/**
 * `code` is of `gorgon_protocol.errors`; `message` names the thing and the remedy.
 */
export interface ErrorMessage {
  type: "error";
  code: string;
  message: string;
  retry_after_seconds: number | null;
  request_id: string | null;
}
/**
 * What is served. Engines are as they described themselves last.
 */
export interface GatewayInfo {
  version: string;
  models: string[];
  engines: EngineInfo[];
  /**
   * generations of this gateway
   */
  num_running: number;
}
/**
 * `GET /info`.
 */
export interface EngineInfo {
  engine_id: string;
  version: string;
  model: string;
  /**
   * identity: hash of config, original weights and tokenizer
   */
  backbone: string;
  kernels: string;
  device: string;
  /**
   * positions, prompt and answer
   */
  context: number;
  vocab_size: number;
  num_slots: number;
  max_nodes: number;
  max_waiting: number;
  heads: HeadsInfo;
  plain: PlainSpeed[];
  state: "loading" | "ready" | "draining" | "failed";
  num_running: number;
  num_waiting: number;
  kv_cache_usage: number;
  notices: string[];
}
/**
 * The heads that an engine drafts with, and how the last attempt to change them ended.
 */
export interface HeadsInfo {
  /**
   * name@version; null: none
   */
  current: string | null;
  family: string | null;
  num_heads: number | null;
  /**
   * Unix time
   */
  loaded_at: number | null;
  num_swaps: number;
  /**
   * why the latest `latest` was refused; null: it was not
   */
  last_error: string | null;
  /**
   * name@version that was refused
   */
  refused: string | null;
}
/**
 * Plain decoding, measured at start-up.
 */
export interface PlainSpeed {
  batch_size: number;
  /**
   * of each stream
   */
  tokens_per_second: number;
}
export interface Health {
  state: "live" | "ready" | "loading" | "draining" | "unavailable";
  /**
   * loading: share done
   */
  progress?: number | null;
  /**
   * loading: of what
   */
  stage?: string | null;
}
export interface ErrorAnswer {
  error: ErrorFields;
}
export interface ErrorFields {
  code: string;
  message: string;
  retry_after_seconds: number | null;
}
