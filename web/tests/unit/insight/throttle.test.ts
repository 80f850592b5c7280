import { expect, test } from "vitest";
import { Throttle, type Timers } from "../../../src/insight/throttle";
import { Player } from "../../../src/run/player";

function setUp() {
  const pending = new Map<number, () => void>();
  let next = 0;
  const timers: Timers = {
    set: (call) => {
      next += 1;
      pending.set(next, call);
      return next;
    },
    clear: (timer) => pending.delete(timer),
  };
  const elapse = () => {
    for (const [timer, call] of [...pending]) {
      pending.delete(timer);
      call();
    }
  };
  const first = new Player(() => 100);
  const second = new Player(() => 100);
  const throttle = new Throttle([first, second], 250, timers);
  return { first, second, throttle, elapse, pending };
}

test("the first change is told at once, later ones together, the last one surely", () => {
  const { first, second, throttle, elapse, pending } = setUp();
  const told: number[] = [];
  throttle.subscribe(() => told.push(throttle.version()));
  first.seek(1);
  expect(told).toEqual([1]);
  first.seek(2);
  second.seek(3);
  expect(told).toEqual([1]);
  elapse();
  expect(told).toEqual([1, 2]);
  elapse();
  expect([told.length, pending.size]).toEqual([2, 0]);
  second.seek(4);
  expect(told).toEqual([1, 2, 3]);
});

test("without listeners it rests", () => {
  const { first, throttle, pending } = setUp();
  const leave = throttle.subscribe(() => undefined);
  first.seek(1);
  first.seek(2);
  leave();
  expect(pending.size).toBe(0);
  first.seek(3);
  expect([throttle.version(), pending.size]).toEqual([1, 0]);
});
