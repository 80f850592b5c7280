import { describe, expect, it } from "vitest";
import { LINK_STYLES, linkClass, pathLinks, rejectedLinks } from "../../../src/tree/links";
import { TreeModel } from "../../../src/tree/scene";
import { generatedRun } from "./runs";

describe("links", () => {
  const { current } = new TreeModel(generatedRun(2, 30)).shown(30);
  if (current === null) throw new Error("the run has no tree");

  it("lead to every rejected node once", () => {
    const starts = rejectedLinks(current).join("").match(/M/g) ?? [];
    expect(starts).toHaveLength(current.rejected.length);
    for (const node of current.rejected) {
      expect(rejectedLinks(current)[linkClass(node.probability)]).toMatch(new RegExp(`[ H]${node.x}( ${node.y})?`));
    }
  });

  it("lead along the accepted path to the bonus token", () => {
    const links = pathLinks(current);
    expect(links.map(({ isDraft }) => isDraft)).toEqual([...current.emitted.map(() => true), false]);
    expect(links.every(({ path }) => /^M[\d.]+ 0H[\d.]+$/.test(path))).toBe(true);
  });

  it("are the wider the more probable their node is", () => {
    const widths = [0, 0.02, 0.1, 0.3, 0.9].map((probability) => LINK_STYLES[linkClass(probability)]?.width ?? 0);
    expect(widths).toEqual(widths.toSorted((a, b) => a - b));
    expect(new Set(widths).size).toBe(5);
    expect(linkClass(Number.NaN)).toBe(LINK_STYLES.length - 1);
  });
});
