// Where in a run the page looks: at its end while it grows, or at a step of the past.

export class Player {
  /** Steps shown; null: all that there are, as they come. */
  #position: number | null = null;
  #version = 0;
  readonly #listeners = new Set<() => void>();
  readonly #numSteps: () => number;

  constructor(numSteps: () => number) {
    this.#numSteps = numSteps;
  }

  readonly version = (): number => this.#version;

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  get isLive(): boolean {
    return this.#position === null;
  }

  /** How many steps are shown: 0..number of steps. */
  get position(): number {
    return this.#position ?? this.#numSteps();
  }

  pause(): void {
    this.#move(this.position);
  }

  live(): void {
    this.#move(null);
  }

  seek(position: number): void {
    this.#move(Math.max(0, Math.min(Math.round(position), this.#numSteps())));
  }

  stepBy(count: number): void {
    this.seek(this.position + count);
  }

  #move(position: number | null): void {
    if (position === this.#position) return;
    this.#position = position;
    this.#version += 1;
    for (const listener of this.#listeners) listener();
  }
}
