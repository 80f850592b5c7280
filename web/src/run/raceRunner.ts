// Runs a race: two generations, one after the other or together, each recorded in a store of its own.

import type { Generate } from "../wire/generate";
import type { GenerateRequest } from "../wire/messages";
import { LANE_NAMES, type LaneName, laneRequest, outcomeOf } from "./race";
import { startRun } from "./run";
import { RunStore, type Schedule } from "./store";

export interface RaceSettings {
  request: GenerateRequest;
  /** Drawn here: used where the request has none. */
  seed: number;
  model: string | null;
  /** Who goes first. */
  first: LaneName;
  isTogether: boolean;
}

export interface Lane {
  readonly name: LaneName;
  readonly store: RunStore;
  /** By the clock given; null: not yet sent. */
  sentAt: number | null;
  /** Its time holds an interruption: the engine or the connection was lost. */
  wasInterrupted: boolean;
}

export type Stage = "running" | "over" | "failed" | "stopped";

export interface Environment {
  generate: Generate;
  /** Milliseconds of a steady clock. */
  now: () => number;
  /** Of the wall clock, ISO 8601. */
  date: () => string;
  schedule?: Schedule;
}

export class Race {
  readonly settings: RaceSettings;
  /** In the order in which they go. */
  readonly lanes: readonly Lane[];
  #stage: Stage = "running";
  #version = 0;
  readonly #listeners = new Set<() => void>();
  readonly #abort = new AbortController();
  readonly #environment: Environment;

  constructor(settings: RaceSettings, environment: Environment) {
    this.settings = settings;
    this.#environment = environment;
    const order = settings.first === "plain" ? LANE_NAMES : LANE_NAMES.toReversed();
    this.lanes = order.map((name) => this.#lane(name));
  }

  get stage(): Stage {
    return this.#stage;
  }

  lane(name: LaneName): Lane {
    return this.lanes.find((lane) => lane.name === name) as Lane;
  }

  readonly version = (): number => this.#version;

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  /** Resolves when the race is over, whatever way. Once only. */
  async run(): Promise<void> {
    if (this.settings.isTogether) {
      await Promise.all(this.lanes.map((lane) => this.#drive(lane)));
    } else {
      for (const lane of this.lanes) {
        if (this.#stage === "running") await this.#drive(lane);
      }
    }
    if (this.#stage === "running") this.#enter("over");
  }

  /** Cancels what runs. */
  stop(): void {
    if (this.#stage !== "running") return;
    this.#enter("stopped");
    this.#abort.abort();
  }

  #lane(name: LaneName): Lane {
    const { request, seed, model } = this.settings;
    const run = startRun(laneRequest(request, name, seed), this.#environment.date(), model);
    return { name, store: new RunStore(run, this.#environment.schedule), sentAt: null, wasInterrupted: false };
  }

  async #drive(lane: Lane): Promise<void> {
    const { generate, now, date } = this.#environment;
    const { run } = lane.store;
    run.startedAt = date();
    lane.sentAt = now();
    this.#tell();
    const leave = lane.store.subscribe(() => {
      if (run.phase === "resuming" || run.phase === "reconnecting") lane.wasInterrupted = true;
    });
    try {
      await generate(run.request, lane.store, this.#abort.signal);
      if (!this.#abort.signal.aborted) this.#fail(lane, "the answer broke off");
    } catch (error) {
      this.#fail(lane, error instanceof Error ? error.message : String(error));
    } finally {
      leave();
    }
    if ((run.finished?.metrics.num_resumptions ?? 0) > 0) lane.wasInterrupted = true;
    this.#ended(lane);
  }

  #ended(lane: Lane): void {
    if (this.#stage === "running" && outcomeOf(lane.store.run) !== "complete") {
      this.#enter(outcomeOf(lane.store.run) === "failed" ? "failed" : "stopped");
      this.#abort.abort();
      return;
    }
    this.#tell();
  }

  #enter(stage: Stage): void {
    this.#stage = stage;
    this.#tell();
  }

  #tell(): void {
    this.#version += 1;
    for (const listener of this.#listeners) listener();
  }

  /** A run that ended says itself how. */
  #fail(lane: Lane, message: string): void {
    const at = this.#environment.now() - (lane.sentAt ?? 0);
    lane.store.receive({ type: "error", code: "internal", message, retry_after_seconds: null, request_id: null }, at);
  }
}
