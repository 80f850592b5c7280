import { describe, expect, it } from "vitest";
import { type Pace, paceAt } from "../../../src/tree/pace";
import { generatedRun } from "./runs";

function stepsEvery(milliseconds: number) {
  const { steps } = generatedRun(1, 30, { numNodes: 4 });
  steps.forEach((step, i) => {
    step.at = milliseconds * i;
  });
  return steps;
}

describe("paceAt", () => {
  it.each<[number, Pace]>([
    [1000, "calm"],
    [200, "brisk"],
    [10, "fast"],
    [0, "fast"],
  ])("steps every %d ms are %s", (milliseconds, pace) => {
    const steps = stepsEvery(milliseconds);
    expect(paceAt(steps, 30)).toBe(pace);
    expect(paceAt(steps, 30, pace)).toBe(pace);
  });

  it("is what it was until there are two steps", () => {
    const steps = stepsEvery(10);
    expect(paceAt(steps, 0, "brisk")).toBe("brisk");
    expect(paceAt(steps, 1, "brisk")).toBe("brisk");
    expect(paceAt(steps, 2, "brisk")).toBe("fast");
  });

  it("does not flicker between two paces", () => {
    expect(paceAt(stepsEvery(100), 30, "fast")).toBe("fast");
    expect(paceAt(stepsEvery(100), 30, "calm")).toBe("brisk");
    expect(paceAt(stepsEvery(500), 30, "brisk")).toBe("brisk");
    expect(paceAt(stepsEvery(500), 30, "calm")).toBe("calm");
  });

  it("goes by the last steps alone", () => {
    const steps = stepsEvery(10);
    steps.slice(20).forEach((step, i) => {
      step.at = 200 + 1000 * (i + 1);
    });
    expect(paceAt(steps, 30, "fast")).toBe("calm");
    expect(paceAt(steps, 15, "calm")).toBe("fast");
  });
});
