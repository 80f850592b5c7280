import { describe, expect, it } from "vitest";
import { DialScale, degreesOf, shortNumber, ticksOf } from "../../../src/view/speedometer/scale";

describe("DialScale", () => {
  it.each([
    [3, 10],
    [9.5, 20],
    [35, 40],
    [38, 100],
    [180, 200],
    [350, 400],
    [1200, 2000],
    [1e9, 400_000],
  ])("for %d ends at %d", (largest, end) => {
    expect(new DialScale().fit(largest)).toBe(end);
  });

  it("does not change with a speed that swings about its bound", () => {
    const scale = new DialScale();
    scale.fit(95);
    const ends = [85, 93, 70, 99, 64].map((value) => scale.fit(value));
    expect(new Set(ends)).toEqual(new Set([200]));
  });

  it("shrinks once most of it is empty", () => {
    const scale = new DialScale();
    scale.fit(350);
    expect(scale.fit(130)).toBe(400);
    expect(scale.fit(100)).toBe(200);
  });
});

describe("the dial", () => {
  it("turns from left to right, and no further", () => {
    expect([0, 50, 100, 250, -3].map((value) => degreesOf(value, 100))).toEqual([-120, 0, 120, 120, -120]);
  });

  it("has nice figures on it", () => {
    expect(ticksOf(400)).toEqual([0, 100, 200, 300, 400]);
  });

  it.each([
    [0, "0"],
    [2.5, "2.5"],
    [7.46, "7.5"],
    [9.96, "10"],
    [84.4, "84"],
    [999.4, "999"],
    [1234, "1.2k"],
    [12_345, "12.3k"],
    [400_000, "400k"],
  ])("writes %d as %s", (value, expected) => {
    expect(shortNumber(value)).toBe(expected);
  });
});
