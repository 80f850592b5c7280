// Which part of the picture is seen: screen = world * k + (x, y).

import type { Bounds } from "./geometry";

export interface Camera {
  readonly x: number;
  readonly y: number;
  readonly k: number;
}

export interface Size {
  width: number;
  height: number;
}

export const MIN_ZOOM = 0.1;
export const MAX_ZOOM = 4;

/** Zooms that following chooses from: steps, so that the picture does not breathe with every tree. */
const FOLLOW_ZOOMS = [1.35, 1.15, 1, 0.86, 0.74, 0.63, 0.54, 0.46, 0.4] as const;
/** Trees in a row that would have fitted the next larger zoom before it is taken. */
const NUM_CALM = 48;
/** Where the root of the step stands, as a share of the view's width: left of it is past, right of it the tree. */
const ANCHOR_SHARE = 0.3;
const NARROW_ANCHOR_SHARE = 0.16;
const NARROW_BELOW = 640;
/**
 * What is wider is cut off rather than made too small to read: a long chain, a lookup's mostly, is seen whole if it holds.
 * On a narrow view a high tree is cut off as well.
 */
const MIN_READABLE_ZOOM = 0.74;
const MARGIN = 16;

/** The part of the world that a camera sees. */
export function viewOf({ x, y, k }: Camera, { width, height }: Size): Bounds {
  return { left: -x / k, right: (width - x) / k, top: -y / k, bottom: (height - y) / k };
}

function anchorShare(size: Size): number {
  return size.width < NARROW_BELOW ? NARROW_ANCHOR_SHARE : ANCHOR_SHARE;
}

/** The zoom at which a step's tree fits behind its root, as far as it can be read then. */
export function wantedZoom(bounds: Bounds, size: Size): number {
  const horizontal = (size.width * (1 - anchorShare(size)) - MARGIN) / (bounds.right - bounds.left);
  const vertical = (size.height - 2 * MARGIN) / Math.max(bounds.bottom - bounds.top, 1);
  const wanted = Math.min(Math.max(horizontal, MIN_READABLE_ZOOM), vertical);
  return size.width < NARROW_BELOW ? Math.max(wanted, MIN_READABLE_ZOOM) : wanted;
}

/** The camera that has a step's root at its place and the tree in the middle. */
export function followCamera(anchor: number, bounds: Bounds, size: Size, k: number): Camera {
  const middle = (bounds.top + bounds.bottom) / 2;
  // The trunk stays where it is unless the tree would leave the view.
  const room = Math.max(0, (size.height - 2 * MARGIN) / k - (bounds.bottom - bounds.top)) / 2;
  const shift = Math.sign(middle) * Math.max(0, Math.abs(middle) - room);
  return { x: size.width * anchorShare(size) - anchor * k, y: size.height / 2 - shift * k, k };
}

/** The camera that shows all of `bounds`. */
export function fitCamera(bounds: Bounds, size: Size): Camera {
  const width = Math.max(bounds.right - bounds.left, 1);
  const height = Math.max(bounds.bottom - bounds.top, 1);
  const k = Math.min((size.width - 2 * MARGIN) / width, (size.height - 2 * MARGIN) / height, 2);
  const zoom = Math.max(MIN_ZOOM, k);
  return {
    x: size.width / 2 - ((bounds.left + bounds.right) / 2) * zoom,
    y: size.height / 2 - ((bounds.top + bounds.bottom) / 2) * zoom,
    k: zoom,
  };
}

/** The zoom of following: gives way to a large tree at once, comes back when trees have been small for a while. */
export class FollowZoom {
  #level = 0;
  #numCalm = 0;

  get zoom(): number {
    return FOLLOW_ZOOMS[this.#level] ?? 1;
  }

  /** Take in what the next tree wants. */
  next(wanted: number): number {
    const level = levelFor(wanted);
    this.#numCalm = level < this.#level ? this.#numCalm + 1 : 0;
    if (level > this.#level) this.#level = level;
    else if (this.#numCalm >= NUM_CALM) {
      this.#level -= 1;
      this.#numCalm = 0;
    }
    return this.zoom;
  }

  /** Begin anew: the view has another size. */
  reset(wanted: number): void {
    this.#level = levelFor(wanted);
    this.#numCalm = 0;
  }

  /** What one tree on its own gets: a paused step looks the same however one came to it. */
  static at(wanted: number): number {
    return FOLLOW_ZOOMS[levelFor(wanted)] ?? 1;
  }
}

function levelFor(wanted: number): number {
  const level = FOLLOW_ZOOMS.findIndex((zoom) => zoom <= wanted);
  return level < 0 ? FOLLOW_ZOOMS.length - 1 : level;
}
