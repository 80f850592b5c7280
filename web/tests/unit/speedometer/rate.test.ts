import { describe, expect, it } from "vitest";
import { speedsAt } from "../../../src/view/speedometer/rate";
import { generatedRun } from "../tree/runs";

function runWith(intervals: readonly number[], numTokens: number) {
  const run = generatedRun(1, intervals.length + 1, { numNodes: 4 });
  let at = 0;
  run.steps.forEach((step, i) => {
    at += i === 0 ? 500 : (intervals[i - 1] ?? 0);
    step.at = at;
    step.numTokens = numTokens;
  });
  return run;
}

describe("speedsAt", () => {
  it("counts the tokens of the last second", () => {
    const run = runWith(
      Array.from({ length: 40 }, () => 100),
      3,
    );
    expect(speedsAt(run, 41).current).toBeCloseTo(30);
  });

  it("forgets what was before it", () => {
    const run = runWith([...Array.from({ length: 20 }, () => 10), ...Array.from({ length: 10 }, () => 200)], 2);
    expect(speedsAt(run, 31).current).toBeCloseTo(10);
    expect(speedsAt(run, 21).current).toBeCloseTo(200);
  });

  it("takes one slow step whole", () => {
    expect(speedsAt(runWith([4000], 2), 2).current).toBeCloseTo(0.5);
  });

  it("does not count what prefill gave: its time is not decoding", () => {
    expect(speedsAt(runWith([200, 200], 1), 3).current).toBeCloseTo(5);
  });

  it.each([0, 1, 2])("is measuring after %d steps", (position) => {
    expect(speedsAt(runWith([100, 100], 1), position).current).toBeNull();
  });

  it("takes the other figures from the step", () => {
    const run = generatedRun(1, 10);
    const step = run.steps[6];
    expect(speedsAt(run, 7)).toMatchObject({
      average: step?.tokensPerSecond,
      plain: step?.plainTokensPerSecond,
      speedup: step?.speedup,
    });
    expect(speedsAt(run, 0)).toEqual({ current: null, average: null, plain: null, speedup: null });
  });
});
