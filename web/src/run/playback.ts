// Plays a recorded run in its own time, at a rate. Whoever draws calls `tick` once a frame.

import type { Player } from "./player";
import type { Step } from "./run";

export const RATES = [0.25, 1, 4] as const;

/** Milliseconds at which the first `position` steps had come; 0: none. */
export function timeAt(steps: readonly Step[], position: number): number {
  return steps[Math.min(position, steps.length) - 1]?.at ?? 0;
}

/** How many steps had come after so many milliseconds. */
export function positionAt(steps: readonly Step[], milliseconds: number): number {
  let [low, high] = [0, steps.length];
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((steps[middle]?.at ?? 0) <= milliseconds) low = middle + 1;
    else high = middle;
  }
  return low;
}

export class Playback {
  #time: number;
  #ticked: number | null = null;
  #position: number;
  readonly #player: Player;
  readonly #steps: readonly Step[];

  /** From where the player stands; from the first step where that is the end. */
  constructor(player: Player, steps: readonly Step[]) {
    this.#player = player;
    this.#steps = steps;
    if (player.position >= steps.length) player.seek(Math.min(1, steps.length));
    this.#position = player.position;
    this.#time = timeAt(steps, this.#position);
  }

  /** `now`: milliseconds of any steady clock. Whether there is more to play; at the end the player is live. */
  tick(now: number, rate: number): boolean {
    // Somebody sought elsewhere: it goes on from there.
    if (this.#player.position !== this.#position) this.#time = timeAt(this.#steps, this.#player.position);
    this.#time += this.#ticked === null ? 0 : (now - this.#ticked) * rate;
    this.#ticked = now;
    this.#position = positionAt(this.#steps, this.#time);
    if (this.#position >= this.#steps.length) {
      this.#player.live();
      return false;
    }
    this.#player.seek(this.#position);
    return true;
  }
}
