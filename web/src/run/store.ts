// A run that grows outside React: messages change it at any rate, listeners hear of it once an animation frame.

import type { Wire } from "../wire/messages";
import { hasEnded, type Phase, type Run, record } from "./run";

export type Schedule = (flush: () => void) => void;

const nextFrame: Schedule = (flush) => {
  requestAnimationFrame(flush);
};

export class RunStore {
  /** Grows in place: read it in a listener or under `version`, never keep parts of it. */
  readonly run: Run;
  #version = 0;
  #isScheduled = false;
  readonly #listeners = new Set<() => void>();
  readonly #schedule: Schedule;

  constructor(run: Run, schedule: Schedule = nextFrame) {
    this.run = run;
    this.#schedule = schedule;
  }

  /** `useSyncExternalStore`'s snapshot: changes with every flush. */
  readonly version = (): number => this.#version;

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  receive(message: Wire["received"], at: number): void {
    record(this.run, message, at);
    this.#later();
  }

  /** What the page itself knows: connecting, reconnecting. A run that has ended stays so. */
  setPhase(phase: Phase): void {
    if (hasEnded(this.run)) return;
    this.run.phase = phase;
    this.#later();
  }

  #later(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    this.#schedule(() => {
      this.#isScheduled = false;
      this.#version += 1;
      for (const listener of this.#listeners) listener();
    });
  }
}
