// One generation as it was received: plain data, which is what is exported and replayed.

import type {
  ErrorMessage,
  FinishedMessage,
  GenerateRequest,
  StatusMessage,
  StepSeconds,
  TreeDebug,
  Wire,
} from "../wire/messages";
import { countDrafted, type Drafted } from "./drafted";

/** Trees of older steps are let go: memory stays flat however long a stream runs. Tokens and figures stay. */
export const MAX_TREES = 1024;

/** "finished" without a `Run.finished`: a run that was exported before its end. */
export type Phase = "connecting" | StatusMessage["state"] | "streaming" | "reconnecting" | "finished" | "failed";

export interface Token {
  id: number;
  /** The text that it released: empty while a character or a stop string is incomplete. */
  text: string;
  /** Index into `Run.steps`. */
  step: number;
  /** Of an accepted draft; null: the backbone's own token (prefill's, a bonus token, a plain step's). */
  draft: Draft | null;
}

export interface Draft {
  /** 1 = behind the root: what head number `depth` guesses. */
  depth: number;
  rank: number;
  probability: number;
  source: string;
}

export interface Step {
  /** When it was received: milliseconds since the request was sent. */
  at: number;
  /** Index into `Run.tokens` of its first token. */
  firstToken: number;
  numTokens: number;
  numAccepted: number;
  /** Rows verified, root included: 1 = plain decoding, 0 = the token that prefill gave. */
  numNodes: number;
  /**
   * Verification steps of the engine that came in this message: 1, 0 where it is prefill's token alone, more where a
   * slow reader got several as one. Tokens, accepted and nodes are their sums, `seconds` and `tree` are the last one's.
   */
  numPasses: number;
  tokensPerSecond: number | null;
  speedup: number | null;
  plainTokensPerSecond: number | null;
  seconds: StepSeconds | null;
  /** null: it drafted nothing, trees were not asked for, or it is more than `MAX_TREES` steps old. */
  tree: TreeDebug | null;
  /** What `tree` had drafted, which stays when it is let go. */
  drafted: Drafted | null;
}

export interface Run {
  request: GenerateRequest;
  /** Of the wall clock, ISO 8601. */
  startedAt: string;
  model: string | null;
  phase: Phase;
  status: StatusMessage | null;
  seed: number | null;
  steps: Step[];
  tokens: Token[];
  finished: FinishedMessage | null;
  error: ErrorMessage | null;
  /** When the terminal message came: milliseconds since the request was sent. */
  endedAt: number | null;
}

export function startRun(request: GenerateRequest, startedAt: string, model: string | null = null): Run {
  return {
    request,
    startedAt,
    model,
    phase: "connecting",
    status: null,
    seed: request.seed ?? null,
    steps: [],
    tokens: [],
    finished: null,
    error: null,
    endedAt: null,
  };
}

/**
 * Take in one message that came `at` milliseconds after the request was sent. Changes `run`; nothing comes behind a
 * terminal message, so nothing is taken in there.
 */
export function record(run: Run, message: Wire["received"], at: number): void {
  if (hasEnded(run)) return;
  switch (message.type) {
    case "status":
      run.status = message;
      run.phase = message.state;
      run.seed = message.seed ?? run.seed;
      return;
    case "token":
      recordStep(run, message, at);
      run.phase = "streaming";
      return;
    case "finished":
      run.finished = message;
      run.phase = "finished";
      run.seed = message.seed ?? run.seed;
      run.endedAt = at;
      return;
    case "error":
      run.error = message;
      run.phase = "failed";
      run.endedAt = at;
      return;
  }
}

type TokenMessage = Extract<Wire["received"], { type: "token" }>;

function recordStep(run: Run, message: TokenMessage, at: number): void {
  // The gateway leaves fields out that have nothing to say.
  const tree = message.tree_debug ?? null;
  const hasTree = tree !== null && tree.candidates.length > 0;
  // The first tokens, and the first ones of another engine, come from a prefill, which verifies nothing.
  const numPrefills = run.phase === "streaming" ? 0 : 1;
  const step = run.steps.length;
  run.steps.push({
    at,
    firstToken: run.tokens.length,
    numTokens: message.token_ids.length,
    numAccepted: message.num_accepted,
    numNodes: Math.max(0, message.num_nodes - numPrefills),
    numPasses: numPasses(message, numPrefills),
    tokensPerSecond: tree?.tokens_per_second ?? null,
    speedup: tree?.speedup ?? null,
    plainTokensPerSecond: tree?.plain_tokens_per_second ?? null,
    seconds: tree?.step_seconds ?? null,
    tree: hasTree ? tree : null,
    drafted: hasTree ? countDrafted(tree) : null,
  });
  const drafts = hasTree ? draftsOf(tree, message.token_ids) : [];
  message.token_ids.forEach((id, i) => {
    run.tokens.push({ id, text: message.pieces[i] ?? "", step, draft: drafts[i] ?? null });
  });
  const forgotten = run.steps[step - MAX_TREES];
  if (forgotten !== undefined) forgotten.tree = null;
}

/** Each pass gives one token besides its accepted drafts, unless the answer's end cuts it off. */
function numPasses(message: TokenMessage, numPrefills: number): number {
  const numTokens = message.token_ids.length - numPrefills;
  return numTokens <= 0 ? 0 : Math.max(1, numTokens - message.num_accepted);
}

/** Which of the tokens the tree had drafted. In a merged message it is the last step's: its tokens stand at the end. */
function draftsOf(tree: TreeDebug, tokenIds: readonly number[]): (Draft | null)[] {
  const path = acceptedPath(tree);
  const first = Math.max(0, tokenIds.length - path.length - 1);
  return tokenIds.map((id, i) => {
    const node = path[i - first];
    return node !== undefined && tree.token_ids[node] === id ? draftOf(tree, node) : null;
  });
}

/** The accepted nodes of a tree, root's child first: indices into its lists. */
export function acceptedPath(tree: TreeDebug): number[] {
  const path: number[] = [];
  tree.accepted.forEach((isAccepted, node) => {
    if (isAccepted) path.push(node);
  });
  return path.sort((a, b) => (tree.depths[a] ?? 0) - (tree.depths[b] ?? 0));
}

function draftOf(tree: TreeDebug, node: number): Draft {
  return {
    depth: tree.depths[node] ?? 0,
    rank: tree.ranks[node] ?? 0,
    probability: tree.probabilities[node] ?? 0,
    source: tree.sources[node] ?? "",
  };
}

export function hasEnded(run: Run): boolean {
  return run.phase === "finished" || run.phase === "failed";
}

/** The whole text, or what the first `numSteps` steps gave; what was held back to the end belongs to the whole. */
export function textOf(run: Run, numSteps: number = run.steps.length): string {
  const step = run.steps[numSteps];
  const tokens = step === undefined ? run.tokens : run.tokens.slice(0, step.firstToken);
  const text = tokens.map((token) => token.text).join("");
  return step === undefined ? text + (run.finished?.text ?? "") : text;
}
