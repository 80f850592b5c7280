// One step's tree, laid out to the right of its root: d3-hierarchy places the rows, then each column is shifted as a
// whole so that the path that was accepted, and the backbone's own token behind it, lie on the trunk (y = 0).
// Shifting a column keeps order and distances in it, so that nothing that did not overlap can overlap afterwards.

import { type HierarchyPointNode, hierarchy, tree as tidyTree } from "d3-hierarchy";
import { acceptedPath } from "../run/run";
import type { TreeDebug } from "../wire/messages";
import { type Box, COLUMN_GAP, NODE_HEIGHT, nodeWidth, ROW_HEIGHT } from "./geometry";
import { tokenLabel } from "./label";

export interface PlacedNode extends Box {
  /** Index into the lists of `TreeDebug`. */
  node: number;
  /** Index of its parent, -1 = the root. */
  parent: number;
  label: string;
  isAccepted: boolean;
  isLookup: boolean;
  /** Of the whole path to it, by the drafters' estimate: 0..1. */
  probability: number;
}

/** Coordinates are relative to the root's left edge and to the trunk. */
export interface StepLayout {
  /** In the tree's own order. */
  nodes: readonly PlacedNode[];
  /** The accepted nodes, root's child first. */
  path: readonly PlacedNode[];
  /** The backbone's own token behind the accepted path; null: the answer ended before it. */
  bonus: Box | null;
  rootWidth: number;
  /** Right edge. */
  width: number;
  top: number;
  bottom: number;
}

export interface StepLabels {
  root: string;
  /** null: the step gave no token behind the accepted path. */
  bonus: string | null;
}

/** A place in the hierarchy: a node of the tree, the root or the bonus token. */
interface Place {
  node: number;
  rank: number;
  label: string;
  isOnPath: boolean;
  children: Place[];
}

const ROOT = -1;
const BONUS = -2;
/** Between neighbours that have different parents, in rows. */
const COUSIN_DISTANCE = 1.2;

/** Lay out `tree`. Costs O(its nodes). */
export function layoutStep(tree: TreeDebug, labels: StepLabels): StepLayout {
  const root = tidyTree<Place>()
    .nodeSize([ROW_HEIGHT, 1])
    .separation((a, b) => (a.parent === b.parent ? 1 : COUSIN_DISTANCE))(
    hierarchy(placesOf(tree, labels), (place) => place.children),
  );
  const shifts = shiftsByDepth(root);
  const columns = columnsOf(root);
  const nodes: PlacedNode[] = new Array(tree.candidates.length);
  let bonus: Box | null = null;
  const bounds = { width: 0, top: -NODE_HEIGHT / 2, bottom: NODE_HEIGHT / 2 };
  root.each((point) => {
    const { node, label } = point.data;
    const y = point.x - (shifts[Math.min(point.depth, shifts.length - 1)] ?? 0);
    const box = { x: columns[point.depth] ?? 0, y: Math.round(2 * y) / 2, width: nodeWidth(label) };
    bounds.width = Math.max(bounds.width, box.x + box.width);
    bounds.top = Math.min(bounds.top, box.y - NODE_HEIGHT / 2);
    bounds.bottom = Math.max(bounds.bottom, box.y + NODE_HEIGHT / 2);
    if (node === BONUS) bonus = box;
    if (node < 0) return;
    nodes[node] = {
      ...box,
      node,
      parent: Math.max(point.parent?.data.node ?? ROOT, ROOT),
      label,
      isAccepted: tree.accepted[node] ?? false,
      isLookup: tree.sources[node] === "lookup",
      probability: tree.probabilities[node] ?? 0,
    };
  });
  const path = acceptedPath(tree).flatMap((node) => nodes[node] ?? []);
  return { nodes, path, bonus, rootWidth: nodeWidth(labels.root), ...bounds };
}

function placesOf(tree: TreeDebug, labels: StepLabels): Place {
  const root: Place = { node: ROOT, rank: 0, label: labels.root, isOnPath: true, children: [] };
  const places: Place[] = [];
  let tip = root;
  tree.candidates.forEach((text, node) => {
    const isOnPath = tree.accepted[node] ?? false;
    const place: Place = { node, rank: tree.ranks[node] ?? 0, label: tokenLabel(text), isOnPath, children: [] };
    // Parents come first in the lists: what does not hold to that hangs off the root, and no cycle can arise.
    (places[tree.parents[node] ?? ROOT] ?? root).children.push(place);
    places.push(place);
    if (isOnPath) tip = place;
  });
  if (labels.bonus !== null) {
    tip.children.push({ node: BONUS, rank: 0, label: labels.bonus, isOnPath: true, children: [] });
  }
  for (const place of [root, ...places]) place.children = centreOut(place.children);
  return root;
}

/** What is on the path in the middle, then the best guesses: the tree is balanced around the trunk. */
function centreOut(places: Place[]): Place[] {
  const best = places.toSorted((a, b) => Number(b.isOnPath) - Number(a.isOnPath) || a.rank - b.rank);
  const above = best.filter((_, i) => i % 2 === 1).reverse();
  const below = best.filter((_, i) => i % 2 === 0);
  return [...above, ...below];
}

/** The rows' coordinate of what is on the path, by depth; behind the path's end its last one holds. */
function shiftsByDepth(root: HierarchyPointNode<Place>): number[] {
  const shifts: number[] = [];
  for (let point: HierarchyPointNode<Place> | undefined = root; point !== undefined; ) {
    shifts.push(point.x);
    point = point.children?.find((child) => child.data.isOnPath);
  }
  return shifts;
}

/** Left edges by depth: a column is as wide as its widest node. */
function columnsOf(root: HierarchyPointNode<Place>): number[] {
  const widths: number[] = [];
  root.each(({ depth, data }) => {
    widths[depth] = Math.max(widths[depth] ?? 0, nodeWidth(data.label));
  });
  const columns: number[] = [];
  let x = 0;
  for (const width of widths) {
    columns.push(x);
    x += width + COLUMN_GAP;
  }
  return columns;
}
