// A growing text in pieces that stay as they are: only the last one is drawn again.

import type { Run } from "../../run/run";

/** At least; a chunk ends with the line then, so that it can be a block of its own in the layout. */
export const STEPS_A_CHUNK = 24;

export interface Chunk {
  /** Steps first..end - 1. */
  first: number;
  end: number;
}

/** Steps at which a new chunk begins, as far as a run was looked at. */
interface Cuts {
  at: number[];
  numSteps: number;
}

const CUTS = new WeakMap<Run, Cuts>();

/** The chunks of the first `position` steps: all but the last one are whole lines, and never change again. */
export function chunksOf(run: Run, position: number): Chunk[] {
  const chunks: Chunk[] = [];
  let first = 0;
  for (const cut of cutsOf(run).at) {
    if (cut >= position) break;
    chunks.push({ first, end: cut });
    first = cut;
  }
  if (first < position) chunks.push({ first, end: position });
  return chunks;
}

function cutsOf(run: Run): Cuts {
  const cuts = CUTS.get(run) ?? { at: [], numSteps: 0 };
  CUTS.set(run, cuts);
  for (; cuts.numSteps < run.steps.length; cuts.numSteps += 1) {
    const step = run.steps[cuts.numSteps];
    if (step === undefined || cuts.numSteps + 1 - (cuts.at.at(-1) ?? 0) < STEPS_A_CHUNK) continue;
    const last = run.tokens[step.firstToken + step.numTokens - 1];
    if (last?.text.endsWith("\n")) cuts.at.push(cuts.numSteps + 1);
  }
  return cuts;
}

/** A chunk in parts that React draws once: a text without lines is one chunk, however long. */
export function partsOf({ first, end }: Chunk): Chunk[] {
  const parts: Chunk[] = [];
  for (let start = first; start < end; start += STEPS_A_CHUNK) {
    parts.push({ first: start, end: Math.min(start + STEPS_A_CHUNK, end) });
  }
  return parts;
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
