// What there is to draw of a run: the part of the trunk that is in view, the tree of the step that is shown, and the
// trees of the steps before it, which fade. Pure of the run and the position: the model only remembers what it computed.

import type { Run, Step } from "../run/run";
import type { TreeDebug } from "../wire/messages";
import { type Bounds, type Box, isInside, NODE_HEIGHT, TRUNK_GAP } from "./geometry";
import { tokenLabel } from "./label";
import { layoutStep, type PlacedNode, type StepLayout } from "./stepLayout";
import { TrunkAxis } from "./trunk";

/** Steps before the shown one whose rejected branches are still drawn. */
export const NUM_FADING = 2;

/** In front of the first token: where the prompt ends. */
export const START: Box = { x: -NODE_HEIGHT - TRUNK_GAP, y: 0, width: NODE_HEIGHT };

export interface TrunkToken extends Box {
  /** Index into `Run.tokens`. */
  index: number;
  label: string;
  /** false: the backbone's own token. */
  isDraft: boolean;
  isLookup: boolean;
  /** Given by the step that is shown: it still stands in that step's columns. */
  isNew: boolean;
}

export interface PlacedStep {
  /** Index into `Run.steps`. */
  step: number;
  /** Left edge of its root. */
  x: number;
  layout: StepLayout;
  /** The accepted nodes that became tokens, root's child first. */
  emitted: readonly PlacedNode[];
  /** The other nodes. */
  rejected: readonly PlacedNode[];
}

/** The step at a position, whatever part of the picture is in view. */
export interface Shown {
  /** Index of the step; -1: none yet. */
  step: number;
  /** null: the step has no tree, or it is no longer kept. */
  current: PlacedStep | null;
  /** Left edge of the step's root: what the camera holds on to. */
  anchor: number;
  /** Of root, tree and tokens. */
  bounds: Bounds;
}

export interface Scene extends Shown {
  tokens: readonly TrunkToken[];
  /** The latest first. */
  fading: readonly PlacedStep[];
}

export type Target = { token: number } | { step: number; node: number };

export class TreeModel {
  readonly axis = new TrunkAxis();
  readonly #run: Run;
  // Neither a step's tree nor its tokens change. Weak: a tree that the run lets go takes its layout along.
  readonly #placed = new WeakMap<TreeDebug, PlacedStep>();

  constructor(run: Run) {
    this.#run = run;
  }

  shown(position: number): Shown {
    const { steps, tokens } = this.#run;
    this.axis.extend(tokens);
    const step = Math.min(position, steps.length) - 1;
    const current = this.#place(step);
    if (current !== null) {
      const { x, layout } = current;
      const bounds = { left: x, right: x + layout.width, top: layout.top, bottom: layout.bottom };
      return { step, current, anchor: x, bounds };
    }
    const numTokens = numTokensOf(steps[step]);
    const [left, right] = [this.axis.left(numTokens - 1), this.axis.left(numTokens)];
    return { step, current, anchor: left, bounds: { left, right, top: -NODE_HEIGHT / 2, bottom: NODE_HEIGHT / 2 } };
  }

  /** The first `position` steps, with the trunk between `left` and `right`. */
  scene(position: number, left: number, right: number): Scene {
    const shown = this.shown(position);
    const { step, current } = shown;
    const numTokens = numTokensOf(this.#run.steps[step]);
    const path = current === null ? [] : pathBoxes(current);
    const numOld = numTokens - path.length;
    const [first, end] = this.axis.range(left, right, numOld);
    const tokens: TrunkToken[] = [];
    for (let index = first; index < end; index += 1) tokens.push(this.#token(index, null));
    path.forEach((box, i) => {
      tokens.push(this.#token(numOld + i, box));
    });
    const fading: PlacedStep[] = [];
    for (let before = step - 1; before >= Math.max(0, step - NUM_FADING); before -= 1) {
      const placed = this.#place(before);
      if (placed !== null) fading.push(placed);
    }
    return { ...shown, tokens, fading };
  }

  #token(index: number, place: Box | null): TrunkToken {
    const token = this.#run.tokens[index];
    const draft = token?.draft ?? null;
    const box = place ?? { x: this.axis.left(index), y: 0, width: this.axis.width(index) };
    return {
      x: box.x,
      y: box.y,
      width: box.width,
      index,
      label: tokenLabel(token?.text ?? ""),
      isDraft: draft !== null,
      isLookup: draft?.source === "lookup",
      isNew: place !== null,
    };
  }

  /** The tree of step `index`, laid out once; null: it has none, or it is no longer kept. */
  #place(index: number): PlacedStep | null {
    const step = this.#run.steps[index];
    if (step === undefined || step.tree === null) return null;
    let placed = this.#placed.get(step.tree);
    if (placed === undefined) {
      placed = this.#layOut(index, step, step.tree);
      this.#placed.set(step.tree, placed);
    }
    return placed;
  }

  #layOut(index: number, step: Step, tree: TreeDebug): PlacedStep {
    const { tokens } = this.#run;
    const numPath = tree.accepted.filter(Boolean).length;
    // The path and the token behind it are the step's last tokens: steps may have been merged into it, and an answer's
    // end may have cut it short.
    const numOwn = Math.min(step.numTokens, numPath + 1);
    const root = step.firstToken + step.numTokens - numOwn - 1;
    const bonus = numOwn > numPath ? tokens[root + numOwn] : undefined;
    const layout = layoutStep(tree, {
      root: root < 0 ? "" : tokenLabel(tokens[root]?.text ?? ""),
      bonus: bonus === undefined ? null : tokenLabel(bonus.text),
    });
    const emitted = layout.path.slice(0, Math.min(numOwn, numPath));
    const rejected = layout.nodes.filter((node) => !emitted.includes(node));
    return { step: index, x: root < 0 ? START.x : this.axis.left(root), layout, emitted, rejected };
  }
}

/** Tokens up to a step's end. */
function numTokensOf(step: Step | undefined): number {
  return step === undefined ? 0 : step.firstToken + step.numTokens;
}

/** Where the tokens that a step gave stand, in their order: its accepted path, then the bonus token. */
function pathBoxes({ x, layout, emitted }: PlacedStep): Box[] {
  const boxes: Box[] = layout.bonus === null ? [...emitted] : [...emitted, layout.bonus];
  return boxes.map((box) => ({ x: x + box.x, y: box.y, width: box.width }));
}

/** What lies at a point of the picture. */
export function targetAt(scene: Scene, x: number, y: number): Target | null {
  const token = scene.tokens.find((box) => isInside(box, x, y));
  if (token !== undefined) return { token: token.index };
  const { current } = scene;
  const node = current?.rejected.find((box) => isInside(box, x - current.x, y));
  return current === null || node === undefined ? null : { step: current.step, node: node.node };
}

/** Where a target stands; null: it is not in the scene. */
export function boxOf(scene: Scene, target: Target): Box | null {
  if ("token" in target) return scene.tokens.find((token) => token.index === target.token) ?? null;
  const { current } = scene;
  const node = current?.step === target.step ? current.layout.nodes[target.node] : undefined;
  return current === null || node === undefined ? null : { x: current.x + node.x, y: node.y, width: node.width };
}

export type Direction = "left" | "right" | "up" | "down";

/** The neighbour of a target: left = towards the root, right = away from it, up and down within a column. */
export function neighbour(scene: Scene, target: Target, direction: Direction): Target | null {
  const from = boxOf(scene, target);
  if (from === null) return null;
  let best: { target: Target; distance: number } | null = null;
  for (const [other, box] of allTargets(scene)) {
    const [dx, dy] = [box.x - from.x, box.y - from.y];
    const isHorizontal = direction === "left" || direction === "right";
    const along = isHorizontal ? dx : dy;
    const isAhead = direction === "left" || direction === "up" ? along < 0 : along > 0;
    if (!isAhead || (!isHorizontal && dx !== 0)) continue;
    const distance = Math.abs(along) + 3 * Math.abs(isHorizontal ? dy : dx);
    if (best === null || distance < best.distance) best = { target: other, distance };
  }
  return best?.target ?? null;
}

function allTargets({ tokens, current }: Scene): [Target, Box][] {
  const all: [Target, Box][] = tokens.map((token) => [{ token: token.index }, token]);
  if (current === null) return all;
  const { step, x, rejected } = current;
  return all.concat(
    rejected.map((node): [Target, Box] => [
      { step, node: node.node },
      { x: x + node.x, y: node.y, width: node.width },
    ]),
  );
}

/** How many nodes the scene has: beyond a thousand, SVG is too slow. */
export function numNodes(scene: Scene): number {
  const trees = scene.current === null ? scene.fading : [scene.current, ...scene.fading];
  return trees.reduce((sum, { rejected }) => sum + rejected.length, scene.tokens.length);
}
