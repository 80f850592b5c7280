// One generation on a WebSocket, through lost connections, to exactly one terminal message.
//
// A connection that ends before the terminal message is opened again: the same request, the same seed and the tokens
// that were received, so that the stream goes on with nothing lost and nothing repeated.

import { hasEnded } from "../run/run";
import type { RunStore } from "../run/store";
import type { ErrorMessage, GenerateRequest } from "./messages";
import { readMessage } from "./received";

/** Resolves when the run has its terminal message; aborting cancels the generation. Never rejects. */
export type Generate = (request: GenerateRequest, store: RunStore, signal: AbortSignal) => Promise<void>;

export interface GenerateOptions {
  /** Of the socket: ws://host/generate_stream. */
  url: () => string;
  key: () => string | null;
  /** Why connections are refused, where the gateway says: a browser does not. */
  explain?: () => Promise<ErrorMessage | null>;
  open?: (url: string, protocols: string[]) => WebSocket;
  /** Milliseconds of a steady clock. */
  now?: () => number;
  /** Milliseconds; resolves early when it is aborted. */
  wait?: (duration: number, signal: AbortSignal) => Promise<void>;
  random?: () => number;
}

const FIRST_WAIT = 250;
const LONGEST_WAIT = 5_000;
/** Without any sign of the gateway. */
const PATIENCE = 60_000;
const CANCEL_PATIENCE = 5_000;

export function makeGenerate(options: GenerateOptions): Generate {
  const { now = () => performance.now(), wait = sleep, random = Math.random } = options;

  return async (request, store, signal) => {
    const began = now();
    const fail = (error: ErrorMessage) => store.receive(error, now() - began);
    let failures = 0;
    let lostAt = began;
    while (!signal.aborted) {
      const numTokens = store.run.tokens.length;
      const said = await converse(options, resumed(request, store), store, () => now() - began, signal);
      if (hasEnded(store.run)) return;
      if (signal.aborted) break;
      if (store.run.tokens.length > numTokens) failures = 0;
      if (failures === 0) lostAt = now();
      const reason = (await options.explain?.()) ?? (now() - lostAt > PATIENCE ? (said ?? UNREACHABLE) : null);
      if (reason !== null) return fail(reason);
      store.setPhase("reconnecting");
      await wait(Math.min(FIRST_WAIT * 2 ** failures, LONGEST_WAIT) * (0.5 + random() / 2), signal);
      failures += 1;
    }
    fail(CANCELLED);
  };
}

/**
 * The subprotocols of the gateway's socket: browsers can send no header, so a key travels in one of them, as base64url
 * (RFC 4648, section 5) without padding.
 */
export function protocols(key: string | null): string[] {
  if (key === null || key === "") return ["gorgon"];
  const bytes = String.fromCharCode(...new TextEncoder().encode(key));
  const encoded = btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["gorgon", `key.${encoded}`];
}

export function failure(code: string, message: string): ErrorMessage {
  return { type: "error", code, message, retry_after_seconds: null, request_id: null };
}

const UNREACHABLE = failure("connection_lost", "The gateway cannot be reached: see that it runs, then ask again.");
const CANCELLED = failure("cancelled", "Stopped while there was no connection.");
const NOT_UNDERSTOOD = failure(
  "protocol_error",
  "The gateway sent something that this page does not understand: reload the page.",
);

function resumed(request: GenerateRequest, store: RunStore): GenerateRequest {
  const { tokens, seed } = store.run;
  if (tokens.length === 0) return request;
  const received = [...(request.generated_token_ids ?? []), ...tokens.map((token) => token.id)];
  return { ...request, seed, generated_token_ids: received };
}

/**
 * One connection: from the handshake to the run's terminal message, or to the connection's loss. Gives the error with
 * which the gateway has refused to go on for now: its engine was lost in the middle of the answer and may come back, or
 * it came back itself and has not found its engines yet.
 */
function converse(
  options: GenerateOptions,
  request: GenerateRequest,
  store: RunStore,
  at: () => number,
  signal: AbortSignal,
): Promise<ErrorMessage | null> {
  return new Promise((resolve) => {
    const open = options.open ?? ((url, names) => new WebSocket(url, names));
    const socket = open(options.url(), protocols(options.key()));
    const hasBegun = () => store.run.phase === "reconnecting" || store.run.tokens.length > 0;
    let timer: ReturnType<typeof setTimeout> | undefined;

    const end = (said: ErrorMessage | null) => {
      clearTimeout(timer);
      signal.removeEventListener("abort", cancel);
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
      resolve(said);
    };
    const cancel = () => {
      if (socket.readyState !== WebSocket.OPEN) {
        end(null);
        return;
      }
      socket.send(JSON.stringify({ type: "cancel" }));
      timer = setTimeout(() => end(null), CANCEL_PATIENCE);
    };

    socket.onopen = () => socket.send(JSON.stringify(request));
    socket.onmessage = ({ data }) => {
      const message = readMessage(data) ?? NOT_UNDERSTOOD;
      if (message.type === "error" && message.code === "unavailable" && hasBegun() && !signal.aborted) {
        end(message);
        return;
      }
      store.receive(message, at());
      if (hasEnded(store.run)) end(null);
    };
    socket.onclose = () => end(null);
    signal.addEventListener("abort", cancel);
  });
}

function sleep(duration: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) {
      resolve();
      return;
    }
    const timer = setTimeout(done, duration);
    function done(): void {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    }
    signal.addEventListener("abort", done);
  });
}
