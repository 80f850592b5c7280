// A growing text in pieces that stay as they are: only the last one is drawn again.

import type { Run } from "../../run/run";

export const STEPS_A_CHUNK = 48;

export interface Chunk {
  /** Steps first..end - 1. */
  first: number;
  end: number;
}

/** The chunks of the first `position` steps: all but the last one are whole, and never change again. */
export function chunksOf(position: number): Chunk[] {
  const chunks: Chunk[] = [];
  for (let first = 0; first < position; first += STEPS_A_CHUNK) {
    chunks.push({ first, end: Math.min(first + STEPS_A_CHUNK, position) });
  }
  return chunks;
}

export interface Piece {
  /** Index into `run.tokens`. */
  token: number;
  text: string;
  isDraft: boolean;
}

/** The tokens of a chunk that released text. */
export function piecesOf(run: Run, { first, end }: Chunk): Piece[] {
  const from = run.steps[first]?.firstToken ?? run.tokens.length;
  const to = run.steps[end]?.firstToken ?? run.tokens.length;
  const pieces: Piece[] = [];
  for (let token = from; token < to; token += 1) {
    const found = run.tokens[token];
    if (found !== undefined && found.text !== "") {
      pieces.push({ token, text: found.text, isDraft: found.draft !== null });
    }
  }
  return pieces;
}

/** The token with text that an arrow key leads to among the first `position` steps' tokens; null: another key, or none. */
export function nextToken(run: Run, position: number, token: number | null, key: string): number | null {
  const end = run.steps[position]?.firstToken ?? run.tokens.length;
  const starts: Readonly<Record<string, readonly [number, number]>> = {
    ArrowRight: [(token ?? -1) + 1, 1],
    ArrowLeft: [(token ?? end) - 1, -1],
    Home: [0, 1],
    End: [end - 1, -1],
  };
  const [start, direction] = starts[key] ?? [end, 1];
  for (let at = start; at >= 0 && at < end; at += direction) {
    if (run.tokens[at]?.text) return at;
  }
  return null;
}
