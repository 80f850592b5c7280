import { describe, expect, it } from "vitest";
import { FollowZoom, fitCamera, followCamera, viewOf, wantedZoom } from "../../../src/tree/camera";
import type { Bounds } from "../../../src/tree/geometry";

const SIZE = { width: 1200, height: 400 };

function boundsOf(width: number, top: number, bottom: number): Bounds {
  return { left: 1000, right: 1000 + width, top, bottom };
}

describe("followCamera", () => {
  it.each([
    ["small", boundsOf(300, -40, 60)],
    ["wide", boundsOf(800, -40, 40)],
    ["high", boundsOf(300, -300, 250)],
    ["lopsided", boundsOf(300, -20, 420)],
  ])("has all of a %s tree in view at the zoom that it wants", (_, bounds) => {
    const camera = followCamera(bounds.left, bounds, SIZE, FollowZoom.at(wantedZoom(bounds, SIZE)));
    const view = viewOf(camera, SIZE);
    expect(view.left).toBeLessThan(bounds.left);
    expect(view.right).toBeGreaterThan(bounds.right);
    expect(view.top).toBeLessThan(bounds.top);
    expect(view.bottom).toBeGreaterThan(bounds.bottom);
  });

  it("keeps the trunk in the middle while the tree leaves it there", () => {
    const bounds = boundsOf(300, -20, 90);
    expect(followCamera(bounds.left, bounds, SIZE, 1).y).toBe(SIZE.height / 2);
  });

  it("keeps a root where the one before stood", () => {
    const screenX = [1000, 54_321].map(
      (anchor) => followCamera(anchor, boundsOf(300, -20, 20), SIZE, 0.86).x + anchor * 0.86,
    );
    expect(screenX[0]).toBeCloseTo(screenX[1] ?? 0);
  });

  it("cuts a long chain off where it could not be read", () => {
    expect(FollowZoom.at(wantedZoom(boundsOf(2500, -40, 40), SIZE))).toBeGreaterThan(0.7);
  });

  it("does not make a tree unreadable on a phone", () => {
    expect(FollowZoom.at(wantedZoom(boundsOf(2000, -100, 100), { width: 360, height: 400 }))).toBeGreaterThan(0.7);
  });
});

describe("fitCamera", () => {
  it.each([boundsOf(3000, -900, 20), boundsOf(10, -10, 10), boundsOf(0, 0, 0)])("shows all of %j", (bounds) => {
    const view = viewOf(fitCamera(bounds, SIZE), SIZE);
    expect(view.left).toBeLessThan(bounds.left);
    expect(view.right).toBeGreaterThan(bounds.right);
    expect(view.top).toBeLessThan(bounds.top);
    expect(view.bottom).toBeGreaterThan(bounds.bottom);
  });
});

describe("FollowZoom", () => {
  it("gives way to a large tree at once", () => {
    const follow = new FollowZoom();
    const before = follow.next(2);
    expect(follow.next(0.5)).toBeLessThanOrEqual(0.5);
    expect(before).toBeGreaterThan(1);
  });

  it("does not breathe: trees that alternate keep the smaller zoom", () => {
    const follow = new FollowZoom();
    const zooms = Array.from({ length: 400 }, (_, i) => follow.next(i % 20 === 0 ? 0.5 : 1.2));
    expect(new Set(zooms)).toEqual(new Set([zooms[0]]));
  });

  it("comes back step by step when trees stay small", () => {
    const follow = new FollowZoom();
    follow.next(0.41);
    const zooms = Array.from({ length: 1000 }, () => follow.next(2));
    expect(zooms.at(-1)).toBe(FollowZoom.at(2));
    expect(zooms).toEqual(zooms.toSorted((a, b) => a - b));
  });

  it("begins anew in a view of another size", () => {
    const follow = new FollowZoom();
    follow.next(0.4);
    follow.reset(1);
    expect(follow.zoom).toBe(1);
  });
});
