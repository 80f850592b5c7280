import { describe, expect, test } from "vitest";
import { Playback, positionAt, timeAt } from "../../../src/run/playback";
import { Player } from "../../../src/run/player";
import { record, startRun } from "../../../src/run/run";
import { prefill, stepMessage } from "./messages";

function playerOf(numSteps: number) {
  const steps = { count: numSteps };
  return { steps, player: new Player(() => steps.count) };
}

describe("player", () => {
  test("live goes along with the run, paused stays", () => {
    const { player, steps } = playerOf(3);
    expect([player.isLive, player.position]).toEqual([true, 3]);
    steps.count = 5;
    expect(player.position).toBe(5);
    player.pause();
    steps.count = 9;
    expect([player.isLive, player.position]).toEqual([false, 5]);
    player.live();
    expect([player.isLive, player.position]).toEqual([true, 9]);
  });

  test.each([
    [-3, 0],
    [2.4, 2],
    [99, 5],
  ])("seek(%d) ends at %i", (to, position) => {
    const { player } = playerOf(5);
    player.seek(to);
    expect(player.position).toBe(position);
  });

  test("listeners hear of moves alone", () => {
    const { player } = playerOf(5);
    let calls = 0;
    player.subscribe(() => {
      calls += 1;
    });
    player.live();
    player.seek(3);
    player.seek(3);
    player.stepBy(-1);
    expect([calls, player.version(), player.position]).toEqual([2, 2, 2]);
  });
});

describe("playback", () => {
  function recorded() {
    const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
    record(run, prefill("a"), 100);
    for (const at of [150, 150, 200, 400]) record(run, stepMessage([], " b"), at);
    return { run, player: new Player(() => run.steps.length) };
  }

  test("times and positions", () => {
    const { steps } = recorded().run;
    expect([0, 1, 3, 5, 9].map((position) => timeAt(steps, position))).toEqual([0, 100, 150, 400, 400]);
    expect([0, 99, 100, 150, 399, 400, 1e9].map((time) => positionAt(steps, time))).toEqual([0, 0, 1, 3, 4, 5, 5]);
  });

  test("plays in recorded time, at a rate, and is live at the end", () => {
    const { run, player } = recorded();
    player.seek(1);
    const playback = new Playback(player, run.steps);
    expect(playback.tick(1000, 1)).toBe(true);
    expect(player.position).toBe(1);
    playback.tick(1050, 1);
    expect(player.position).toBe(3);
    playback.tick(1150, 0.25);
    expect(player.position).toBe(3);
    playback.tick(1160, 4);
    expect(player.position).toBe(4);
    expect(playback.tick(2000, 1)).toBe(false);
    expect(player.isLive).toBe(true);
  });

  test("goes on from where somebody sought", () => {
    const { run, player } = recorded();
    player.seek(4);
    const playback = new Playback(player, run.steps);
    playback.tick(0, 1);
    player.seek(1);
    playback.tick(10, 1);
    expect(player.position).toBe(1);
    playback.tick(50, 1);
    expect(player.position).toBe(3);
  });

  test("from the end it starts over", () => {
    const { run, player } = recorded();
    expect(new Playback(player, run.steps).tick(0, 1)).toBe(true);
    expect([player.isLive, player.position]).toEqual([false, 1]);
  });
});
