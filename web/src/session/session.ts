// A visit: the conversation, the run that is shown, and what is being generated.

import { Player } from "../run/player";
import { type Run, startRun, textOf } from "../run/run";
import { RunStore } from "../run/store";
import type { Generate } from "../wire/generate";
import type { GenerateRequest } from "../wire/messages";
import type { Turn } from "./settings";

/** Everything that a run is looked at with. */
export interface Shown {
  store: RunStore;
  player: Player;
  /** From a file: nothing of it runs. */
  isImported: boolean;
}

const MAX_TURNS = 100;

export function show(run: Run, isImported = false): Shown {
  const store = new RunStore(run);
  return { store, player: new Player(() => run.steps.length), isImported };
}

export class Session {
  #turns: readonly Turn[] = [];
  #shown: Shown | null = null;
  #prompt: string | null = null;
  /** Whether what is shown is a turn of a chat. */
  #isChat = false;
  #running: AbortController | null = null;
  #version = 0;
  readonly #listeners = new Set<() => void>();
  readonly #generate: Generate;

  constructor(generate: Generate) {
    this.#generate = generate;
  }

  readonly version = (): number => this.#version;

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  /** Turns before the one that is shown. */
  get turns(): readonly Turn[] {
    return this.#turns;
  }

  /** What was asked in the turn that is shown. */
  get prompt(): string | null {
    return this.#prompt;
  }

  get shown(): Shown | null {
    return this.#shown;
  }

  get isRunning(): boolean {
    return this.#running !== null;
  }

  /** Turns that the next request has to carry: all that were answered. */
  get history(): readonly Turn[] {
    const { shown } = this;
    if (this.#prompt === null || shown === null || !this.#isChat) return this.#turns;
    const answer = textOf(shown.store.run);
    if (answer === "") return this.#turns;
    return [...this.#turns, { role: "user", content: this.#prompt }, { role: "assistant", content: answer }];
  }

  /** Ask; what was shown becomes history where `isChat`. Resolves when the answer has ended. */
  async ask(request: GenerateRequest, prompt: string, model: string | null, isChat: boolean): Promise<void> {
    if (this.#running !== null) return;
    this.#turns = isChat ? this.history.slice(-MAX_TURNS) : [];
    this.#prompt = prompt;
    this.#isChat = isChat;
    const shown = show(startRun(request, new Date().toISOString(), model));
    this.#shown = shown;
    const controller = new AbortController();
    this.#running = controller;
    this.#changed();
    try {
      await this.#generate(request, shown.store, controller.signal);
    } finally {
      this.#running = null;
      this.#changed();
    }
  }

  stop(): void {
    this.#running?.abort();
  }

  /** Look at a run of a file. */
  open(run: Run): void {
    this.stop();
    this.#turns = [];
    this.#prompt = promptOf(run.request);
    this.#isChat = false;
    this.#shown = show(run, true);
    this.#changed();
  }

  clear(): void {
    this.stop();
    this.#turns = [];
    this.#prompt = null;
    this.#shown = null;
    this.#changed();
  }

  #changed(): void {
    this.#version += 1;
    for (const listener of this.#listeners) listener();
  }
}

/** What a request asks, in words. */
export function promptOf(request: GenerateRequest): string {
  if (typeof request.prompt === "string") return request.prompt;
  const last = request.messages?.at(-1);
  return last?.content ?? "";
}
