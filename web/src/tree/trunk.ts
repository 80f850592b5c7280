// The trunk: every token of the run in a row. Only edges are kept, so that an hour of tokens is a few megabytes and
// any window of it is found by bisection.

import type { Token } from "../run/run";
import { nodeWidth, TRUNK_GAP } from "./geometry";
import { tokenLabel } from "./label";

const FIRST_CAPACITY = 1024;

export class TrunkAxis {
  /** [i] = left edge of token i; [length] = where the next one begins. */
  #edges = new Float64Array(FIRST_CAPACITY);
  #length = 0;

  get length(): number {
    return this.#length;
  }

  /** Take in the tokens that are new since the last call. Costs O(new tokens). */
  extend(tokens: readonly Token[]): void {
    if (tokens.length + 1 > this.#edges.length) this.#grow(tokens.length + 1);
    for (let i = this.#length; i < tokens.length; i += 1) {
      const width = nodeWidth(tokenLabel(tokens[i]?.text ?? ""));
      this.#edges[i + 1] = (this.#edges[i] ?? 0) + width + TRUNK_GAP;
    }
    this.#length = Math.max(this.#length, tokens.length);
  }

  /** Left edge of token `index`; of `length`: where the next one begins. */
  left(index: number): number {
    return this.#edges[Math.max(0, Math.min(index, this.#length))] ?? 0;
  }

  width(index: number): number {
    return this.left(index + 1) - this.left(index) - TRUNK_GAP;
  }

  /** The tokens that reach into `from`..`to`, of the first `limit`: [first, behind the last). */
  range(from: number, to: number, limit: number): readonly [number, number] {
    const first = Math.max(0, this.#numLeftOf(from) - 1);
    return [Math.min(first, limit), Math.min(this.#numLeftOf(to), limit)];
  }

  /** How many tokens begin left of `x` or at it. */
  #numLeftOf(x: number): number {
    let low = 0;
    let high = this.#length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.left(middle) <= x) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  #grow(capacity: number): void {
    const edges = new Float64Array(Math.max(capacity, 2 * this.#edges.length));
    edges.set(this.#edges);
    this.#edges = edges;
  }
}
