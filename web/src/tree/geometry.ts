// Sizes of the picture, in its own units: pixels at a zoom of 1.

import { textWidth } from "./label";

export const FONT_SIZE = 12;
/** Of the generic monospaced fonts (0.6 em, a little air). */
const CHARACTER_WIDTH = 7.25;
const PADDING = 7;
export const NODE_HEIGHT = 20;
/** From row to row of one step's tree. */
export const ROW_HEIGHT = 25;
/** Between the columns of one step's tree: room for the links. */
export const COLUMN_GAP = 38;
/** Between the tokens of the trunk. */
export const TRUNK_GAP = 5;

export interface Box {
  /** Left edge. */
  x: number;
  /** Centre. */
  y: number;
  width: number;
}

export interface Bounds {
  left: number;
  right: number;
  top: number;
  bottom: number;
}

export function nodeWidth(label: string): number {
  return Math.max(NODE_HEIGHT, Math.round(textWidth(label) * CHARACTER_WIDTH) + 2 * PADDING);
}

export function isInside(box: Box, x: number, y: number): boolean {
  return x >= box.x && x <= box.x + box.width && Math.abs(y - box.y) <= NODE_HEIGHT / 2;
}
