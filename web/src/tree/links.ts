// The links of a step's tree as SVG paths. A link's width and opacity tell the probability; they come in a few classes,
// each one path element: dozens of elements less in every frame.

import type { Box } from "./geometry";
import type { PlacedStep } from "./scene";
import type { PlacedNode } from "./stepLayout";

export interface LinkStyle {
  /** Smallest probability of the class. */
  from: number;
  width: number;
  opacity: number;
}

export const LINK_STYLES: readonly LinkStyle[] = [
  { from: 0.5, width: 3.5, opacity: 1 },
  { from: 0.2, width: 2.5, opacity: 0.85 },
  { from: 0.05, width: 1.75, opacity: 0.65 },
  { from: 0.01, width: 1.25, opacity: 0.5 },
  { from: 0, width: 1, opacity: 0.35 },
];

export function linkClass(probability: number): number {
  const found = LINK_STYLES.findIndex(({ from }) => probability >= from);
  return found < 0 ? LINK_STYLES.length - 1 : found;
}

/** A curve from the right edge of one box to the left edge of another. */
export function linkPath(from: Box, to: Box): string {
  const start = from.x + from.width;
  if (from.y === to.y) return `M${start} ${from.y}H${to.x}`;
  const middle = (start + to.x) / 2;
  return `M${start} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.x} ${to.y}`;
}

export function rootBox({ layout }: PlacedStep): Box {
  return { x: 0, y: 0, width: layout.rootWidth };
}

export function parentBox(placed: PlacedStep, node: PlacedNode): Box {
  return placed.layout.nodes[node.parent] ?? rootBox(placed);
}

/** One path a class of `LINK_STYLES` over the links to the nodes that were rejected; empty where there are none. */
export function rejectedLinks(placed: PlacedStep): string[] {
  const paths = LINK_STYLES.map(() => "");
  for (const node of placed.rejected) {
    const style = linkClass(node.probability);
    paths[style] += linkPath(parentBox(placed, node), node);
  }
  return paths;
}

export interface Link {
  path: string;
  style: LinkStyle;
  isDraft: boolean;
}

/** The links along the accepted path, and on to the bonus token. */
export function pathLinks(placed: PlacedStep): Link[] {
  const { layout, emitted } = placed;
  const links = emitted.map(
    (node): Link => ({
      path: linkPath(parentBox(placed, node), node),
      style: LINK_STYLES[linkClass(node.probability)] ?? { from: 0, width: 1, opacity: 1 },
      isDraft: true,
    }),
  );
  const tip = emitted.at(-1) ?? rootBox(placed);
  const plain = { from: 0, width: 1.5, opacity: 1 };
  if (layout.bonus !== null) links.push({ path: linkPath(tip, layout.bonus), style: plain, isDraft: false });
  return links;
}
