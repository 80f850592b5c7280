// Listens to several stores, tells of their changes a few times a second at most. The last change is always told.

interface Source {
  version: () => number;
  subscribe: (listener: () => void) => () => void;
}

export interface Timers {
  set: (call: () => void, milliseconds: number) => number;
  clear: (timer: number) => void;
}

const windowTimers: Timers = {
  set: (call, milliseconds) => window.setTimeout(call, milliseconds),
  clear: (timer) => window.clearTimeout(timer),
};

/** A store in the shape of `useVersion`. The first change is told at once, those within `milliseconds` of it together. */
export class Throttle {
  #version = 0;
  #timer: number | null = null;
  #isDue = false;
  #leave: (() => void)[] = [];
  readonly #listeners = new Set<() => void>();
  readonly #sources: readonly Source[];
  readonly #milliseconds: number;
  readonly #timers: Timers;

  constructor(sources: readonly Source[], milliseconds: number, timers: Timers = windowTimers) {
    this.#sources = sources;
    this.#milliseconds = milliseconds;
    this.#timers = timers;
  }

  readonly version = (): number => this.#version;

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    if (this.#listeners.size === 1) this.#leave = this.#sources.map((source) => source.subscribe(this.#changed));
    return () => {
      this.#listeners.delete(listener);
      if (this.#listeners.size === 0) this.#rest();
    };
  };

  readonly #changed = (): void => {
    if (this.#timer !== null) {
      this.#isDue = true;
      return;
    }
    this.#tell();
  };

  #tell(): void {
    this.#isDue = false;
    this.#timer = this.#timers.set(() => {
      this.#timer = null;
      if (this.#isDue) this.#tell();
    }, this.#milliseconds);
    this.#version += 1;
    for (const listener of this.#listeners) listener();
  }

  #rest(): void {
    for (const leave of this.#leave.splice(0)) leave();
    if (this.#timer !== null) this.#timers.clear(this.#timer);
    this.#timer = null;
    this.#isDue = false;
  }
}
