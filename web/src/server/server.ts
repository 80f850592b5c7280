// What the gateway says of itself and its engines: asked often while it is not ready, seldom else.

import { failure } from "../wire/generate";
import type { EngineInfo, ErrorMessage, Wire } from "../wire/messages";

export type ServerPhase =
  | "unknown"
  | "loading"
  | "ready"
  | "draining"
  | "failed"
  | "unavailable"
  | "unreachable"
  | "refused";

export interface ServerState {
  phase: ServerPhase;
  /** Loading: share done. */
  progress: number | null;
  /** Loading: of what. */
  stage: string | null;
  needsKey: boolean;
  /** Refused: the gateway's words. */
  reason: string | null;
  models: readonly string[];
  engines: readonly EngineInfo[];
  gatewayVersion: string | null;
}

const START: ServerState = {
  phase: "unknown",
  progress: null,
  stage: null,
  needsKey: false,
  reason: null,
  models: [],
  engines: [],
  gatewayVersion: null,
};

const SOON = 700;
const LATER = 10_000;
const HIDDEN = 60_000;
const TIMEOUT = 5_000;
const UNAUTHORIZED = 401;
const PHASES: Partial<Record<Wire["health"]["state"], ServerPhase>> = {
  loading: "loading",
  ready: "ready",
  draining: "draining",
  unavailable: "unavailable",
};

export class ServerStore {
  #state = START;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #isRunning = false;
  readonly #listeners = new Set<() => void>();
  readonly #key: () => string | null;
  readonly #fetch: typeof fetch;

  constructor(key: () => string | null, fetcher: typeof fetch = (input, init) => fetch(input, init)) {
    this.#key = key;
    this.#fetch = fetcher;
  }

  readonly state = (): ServerState => this.#state;

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  /** Ask from now on, and at once where the page is looked at again; the result stops it. */
  start(): () => void {
    this.#isRunning = true;
    const onVisible = () => {
      if (!document.hidden) void this.check();
    };
    document.addEventListener("visibilitychange", onVisible);
    void this.check();
    return () => {
      this.#isRunning = false;
      clearTimeout(this.#timer);
      document.removeEventListener("visibilitychange", onVisible);
    };
  }

  /** Ask once, now. */
  async check(): Promise<ServerState> {
    clearTimeout(this.#timer);
    const next = await this.#ask();
    if (JSON.stringify(next) !== JSON.stringify(this.#state)) {
      this.#state = next;
      for (const listener of this.#listeners) listener();
    }
    if (this.#isRunning) {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => void this.check(), pauseAfter(next));
    }
    return next;
  }

  /** Why a socket was refused, where it is the key. */
  async refusal(): Promise<ErrorMessage | null> {
    const { needsKey } = await this.check();
    if (!needsKey) return null;
    const isMissing = this.#key() === null;
    return failure(
      "invalid_api_key",
      isMissing ? "This gateway asks for an API key." : "The gateway does not know this API key.",
    );
  }

  async #ask(): Promise<ServerState> {
    try {
      const { state, progress = null, stage = null } = await this.#health();
      const phase = PHASES[state];
      if (phase === undefined) throw new TypeError("this is no gateway");
      const known = { ...START, phase, progress, stage };
      return phase === "loading" ? known : await this.#withInfo(known);
    } catch {
      // No connection, no answer in time, or another server's.
      return { ...this.#state, phase: "unreachable", progress: null, stage: null };
    }
  }

  async #health(): Promise<Wire["health"]> {
    return (await (await this.#get("/health/ready")).json()) as Wire["health"];
  }

  async #withInfo(known: ServerState): Promise<ServerState> {
    const response = await this.#get("/info");
    if (response.status === UNAUTHORIZED) return { ...known, needsKey: true };
    if (!response.ok) {
      const { error } = (await response.json()) as Wire["refused"];
      return { ...known, phase: "refused", reason: error.message };
    }
    const { models, engines, version } = (await response.json()) as Wire["info"];
    const hasFailed = known.phase === "unavailable" && engines.some((engine) => engine.state === "failed");
    return { ...known, phase: hasFailed ? "failed" : known.phase, models, engines, gatewayVersion: version };
  }

  #get(path: string): Promise<Response> {
    const key = this.#key();
    const headers: Record<string, string> = key === null ? {} : { Authorization: `Bearer ${key}` };
    return this.#fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
  }
}

function pauseAfter({ phase }: ServerState): number {
  if (document.hidden) return phase === "ready" ? HIDDEN : LATER;
  return phase === "ready" ? LATER : SOON;
}
