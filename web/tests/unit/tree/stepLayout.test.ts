import { describe, expect, it } from "vitest";
import { NODE_HEIGHT } from "../../../src/tree/geometry";
import { layoutStep, type StepLayout } from "../../../src/tree/stepLayout";
import type { TreeDebug } from "../../../src/wire/messages";
import { generatedRun, treeOf } from "./runs";

const LABELS = { root: "·root", bonus: "·bonus" };

function generatedTrees(): TreeDebug[] {
  const shapes = [{ numNodes: 2 }, { numNodes: 17, maxDepth: 3 }, { numNodes: 64 }, { numNodes: 64, maxDepth: 12 }];
  return shapes.flatMap((shape, seed) => generatedRun(seed, 25, shape).steps.flatMap(({ tree }) => tree ?? []));
}

function boxes({ nodes, bonus, rootWidth }: StepLayout) {
  return [...nodes, { x: 0, y: 0, width: rootWidth }, ...(bonus === null ? [] : [bonus])];
}

describe("layoutStep", () => {
  const trees = generatedTrees();
  const layouts = trees.map((tree) => layoutStep(tree, LABELS));

  it("looks at about a hundred trees, of which some accept much and some nothing", () => {
    expect(trees.length).toBeGreaterThan(90);
    expect(layouts.some(({ path }) => path.length === 0)).toBe(true);
    expect(layouts.some(({ path }) => path.length >= 4)).toBe(true);
  });

  it("lets no two nodes overlap", () => {
    for (const layout of layouts) {
      const all = boxes(layout);
      all.forEach((a, i) => {
        for (const b of all.slice(i + 1)) {
          const isApart = a.x + a.width <= b.x || b.x + b.width <= a.x || Math.abs(a.y - b.y) >= NODE_HEIGHT;
          expect(isApart, `${JSON.stringify(a)} and ${JSON.stringify(b)}`).toBe(true);
        }
      });
    }
  });

  it("places parents left of their children, with room for the link", () => {
    for (const { nodes, rootWidth } of layouts) {
      for (const node of nodes) {
        const parent = nodes[node.parent] ?? { x: 0, width: rootWidth };
        expect(parent.x + parent.width).toBeLessThan(node.x);
      }
    }
  });

  it("lays the accepted path and the bonus token on the trunk, one column after another", () => {
    for (const { path, bonus } of layouts) {
      const trunk = [...path, ...(bonus === null ? [] : [bonus])];
      expect(trunk.every(({ y }) => y === 0)).toBe(true);
      const columns = trunk.map(({ x }) => x);
      expect(columns).toEqual(columns.toSorted((a, b) => a - b));
      expect(new Set(columns).size).toBe(columns.length);
    }
  });

  it("keeps every node within its bounds", () => {
    for (const layout of layouts) {
      for (const { x, y, width } of boxes(layout)) {
        expect(x).toBeGreaterThanOrEqual(0);
        expect(x + width).toBeLessThanOrEqual(layout.width);
        expect(y - NODE_HEIGHT / 2).toBeGreaterThanOrEqual(layout.top);
        expect(y + NODE_HEIGHT / 2).toBeLessThanOrEqual(layout.bottom);
      }
    }
  });

  it("keeps the tree's order and what is known of each node", () => {
    const tree = treeOf([
      { text: " a", parent: -1, isAccepted: true, probability: 0.75 },
      { text: " b", parent: 0, source: "lookup", probability: 0.25 },
    ]);
    const { nodes, path } = layoutStep(tree, LABELS);
    expect(
      nodes.map(({ node, parent, label, isAccepted, isLookup, probability }) => [
        node,
        parent,
        label,
        isAccepted,
        isLookup,
        probability,
      ]),
    ).toEqual([
      [0, -1, "·a", true, false, 0.75],
      [1, 0, "·b", false, true, 0.25],
    ]);
    expect(path).toEqual([nodes[0]]);
  });

  it("spreads the guesses at one place around the trunk, the best in the middle", () => {
    const tree = treeOf([0, 1, 2, 3].map((rank) => ({ text: `${rank}`, parent: -1, rank })));
    const { nodes } = layoutStep(tree, { root: "r", bonus: null });
    const order = nodes.toSorted((a, b) => a.y - b.y).map(({ label }) => label);
    expect(order).toEqual(["3", "1", "0", "2"]);
  });

  it.each([
    ["itself", [0, 1]],
    ["one that comes later", [1, -1]],
    ["one that does not exist", [-1, 99]],
  ])("hangs a node off the root whose parent is %s", (_, parents) => {
    const tree = { ...treeOf(parents.map((_parent, i) => ({ text: `${i}`, parent: -1 }))), parents };
    expect(layoutStep(tree, LABELS).nodes.map(({ parent }) => parent)).toEqual([-1, -1]);
  });
});
