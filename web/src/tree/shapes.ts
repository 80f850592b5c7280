// Nodes as SVG paths: a drafter's guess is a pill, what was looked up in the text is a box with sharp corners.

import { type Box, NODE_HEIGHT } from "./geometry";

const HEAD_RADIUS = NODE_HEIGHT / 2;
const LOOKUP_RADIUS = 3;

export function cornerRadius(isLookup: boolean): number {
  return isLookup ? LOOKUP_RADIUS : HEAD_RADIUS;
}

/** One path around all `boxes`. */
export function boxesPath(boxes: readonly (Box & { isLookup: boolean })[]): string {
  return boxes.map(boxPath).join("");
}

function boxPath({ x, y, width, isLookup }: Box & { isLookup: boolean }): string {
  const r = cornerRadius(isLookup);
  const [w, h] = [width - 2 * r, NODE_HEIGHT - 2 * r];
  const corner = (dx: number, dy: number) => `a${r} ${r} 0 0 1 ${dx} ${dy}`;
  return `M${x + r} ${y - NODE_HEIGHT / 2}h${w}${corner(r, r)}v${h}${corner(-r, r)}h${-w}${corner(-r, -r)}v${-h}${corner(r, -r)}z`;
}
