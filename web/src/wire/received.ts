// What comes out of the socket: a message of the protocol, or nothing that the page may touch.

import type { TokenMessage, TreeDebug, Wire } from "./messages";

type Received = Wire["received"];
type Fields = Record<string, unknown>;

const STATES: readonly unknown[] = ["loading", "queued", "prefill", "resuming"];
const REASONS: readonly unknown[] = ["stop", "length", "cancelled"];
const TREE_LISTS = ["token_ids", "accepted", "parents", "depths", "probabilities", "ranks", "sources"] as const;

/** The message in a frame's data; null: it is none. Checks what the page relies on, and is cheap enough for every step. */
export function readMessage(data: unknown): Received | null {
  if (typeof data !== "string") return null;
  let value: unknown;
  try {
    value = JSON.parse(data);
  } catch {
    return null;
  }
  // An engine leaves out what was not asked for.
  if (isObject(value) && value.type === "token") value = { logprobs: null, tree_debug: null, ...value };
  return isMessage(value) ? value : null;
}

function isMessage(value: unknown): value is Received {
  if (!isObject(value)) return false;
  switch (value.type) {
    case "status":
      return STATES.includes(value.state);
    case "token":
      return isToken(value);
    case "finished":
      return isFinished(value);
    case "error":
      return typeof value.code === "string" && typeof value.message === "string";
    default:
      return false;
  }
}

function isToken(value: Fields): boolean {
  const { token_ids, pieces, num_accepted, num_nodes, tree_debug } = value satisfies Partial<
    Record<keyof TokenMessage, unknown>
  >;
  if (!areAll(token_ids, "number") || !areAll(pieces, "string") || pieces.length !== token_ids.length) return false;
  return isCount(num_accepted) && isCount(num_nodes) && (tree_debug === null || isTree(tree_debug));
}

/** Lists of one length, parents before their children. */
function isTree(value: unknown): boolean {
  if (!isObject(value)) return false;
  const tree: { [Name in keyof TreeDebug]?: unknown } = value;
  const { candidates, parents } = tree;
  if (!areAll(candidates, "string") || !areAll(parents, "number")) return false;
  const areLists = TREE_LISTS.every((name) => {
    const list = tree[name];
    return Array.isArray(list) && list.length === candidates.length;
  });
  return areLists && isObject(tree.step_seconds) && parents.every((parent, node) => parent >= -1 && parent < node);
}

function isFinished({ finish_reason, text, usage, metrics }: Fields): boolean {
  if (!REASONS.includes(finish_reason) || typeof text !== "string") return false;
  return isObject(usage) && isObject(metrics) && isObject(metrics.speculative_decoding);
}

function isObject(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isCount(value: unknown): value is number {
  return typeof value === "number" && value >= 0;
}

interface Types {
  string: string;
  number: number;
}

function areAll<Name extends keyof Types>(value: unknown, type: Name): value is Types[Name][] {
  return Array.isArray(value) && value.every((entry) => typeof entry === type);
}
