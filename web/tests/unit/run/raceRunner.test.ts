import { describe, expect, test } from "vitest";
import { Race, type RaceSettings } from "../../../src/run/raceRunner";
import type { RunStore } from "../../../src/run/store";
import type { Generate } from "../../../src/wire/generate";
import type { GenerateRequest, Wire } from "../../../src/wire/messages";
import { error, finished, prefill, status } from "./messages";

interface Call {
  request: GenerateRequest;
  store: RunStore;
  signal: AbortSignal;
  end: (...messages: Wire["received"][]) => Promise<void>;
  reject: (error: Error) => Promise<void>;
}

function setUp(settings: Partial<RaceSettings> = {}) {
  const calls: Call[] = [];
  const generate: Generate = (request, store, signal) =>
    new Promise((resolve, reject) => {
      const settle = async () => {
        for (let i = 0; i < 5; i += 1) await Promise.resolve();
      };
      calls.push({
        request,
        store,
        signal,
        end: (...messages) => {
          for (const message of messages) store.receive(message, 10);
          resolve();
          return settle();
        },
        reject: (reason) => {
          reject(reason);
          return settle();
        },
      });
    });
  const race = new Race(
    { request: { prompt: "x" }, seed: 5, model: "smollm2", first: "plain", isTogether: false, ...settings },
    { generate, now: () => 1000, date: () => "2026-01-31T12:00:00Z", schedule: (flush) => flush() },
  );
  return { race, calls, done: race.run() };
}

function call(calls: Call[], index: number): Call {
  const found = calls[index];
  if (found === undefined) throw new Error(`no call ${index}`);
  return found;
}

describe("one after the other", () => {
  test("plain first, then speculative, same seed", async () => {
    const { race, calls, done } = setUp();
    expect(calls).toHaveLength(1);
    expect(call(calls, 0).request).toMatchObject({ seed: 5, speculation: { enabled: false } });
    expect(race.lane("speculative").sentAt).toBeNull();
    await call(calls, 0).end(prefill("a"), finished());
    expect(calls).toHaveLength(2);
    expect(call(calls, 1).request).toMatchObject({ seed: 5, speculation: { enabled: true } });
    expect(race.stage).toBe("running");
    await call(calls, 1).end(prefill("a"), finished());
    await done;
    expect(race.stage).toBe("over");
  });

  test("or speculative first", () => {
    const { race, calls } = setUp({ first: "speculative" });
    expect(call(calls, 0).store).toBe(race.lane("speculative").store);
  });

  test("a lane that fails ends the race: the other is not sent", async () => {
    const { race, calls, done } = setUp();
    await call(calls, 0).end(prefill("a"), error({ code: "unavailable" }));
    await done;
    expect([race.stage, calls.length]).toEqual(["failed", 1]);
  });

  test("stopping cancels what runs and sends nothing more", async () => {
    const { race, calls, done } = setUp();
    race.stop();
    expect(call(calls, 0).signal.aborted).toBe(true);
    await call(calls, 0).end(finished({ finish_reason: "cancelled" }));
    await done;
    expect([race.stage, calls.length]).toEqual(["stopped", 1]);
    expect(race.lane("plain").store.run.error).toBeNull();
  });
});

describe("together", () => {
  test("both are sent at once", async () => {
    const { race, calls, done } = setUp({ isTogether: true });
    expect(calls).toHaveLength(2);
    await call(calls, 1).end(prefill("a"), finished());
    expect(race.stage).toBe("running");
    await call(calls, 0).end(prefill("a"), finished());
    await done;
    expect(race.stage).toBe("over");
  });

  test("a lane that fails cancels the other", async () => {
    const { race, calls, done } = setUp({ isTogether: true });
    await call(calls, 0).end(error());
    expect([race.stage, call(calls, 1).signal.aborted]).toEqual(["failed", true]);
    await call(calls, 1).end(finished({ finish_reason: "cancelled" }));
    await done;
    expect(race.stage).toBe("failed");
  });
});

describe("a lane", () => {
  test("of which the connection throws has an error", async () => {
    const { race, calls, done } = setUp();
    await call(calls, 0).reject(new Error("no route"));
    await done;
    expect(race.lane("plain").store.run.error).toMatchObject({ message: "no route" });
    expect(race.stage).toBe("failed");
  });

  test("that ends without a terminal message has an error", async () => {
    const { race, calls, done } = setUp();
    await call(calls, 0).end(prefill("a"));
    await done;
    expect(race.lane("plain").store.run.error).toMatchObject({ message: "the answer broke off" });
  });

  test("remembers that it was interrupted", async () => {
    const { race, calls } = setUp({ isTogether: true });
    await call(calls, 0).end(prefill("a"), status("resuming"), prefill("b"), finished());
    expect(race.lane("plain").wasInterrupted).toBe(true);
    const metrics = finished().metrics;
    await call(calls, 1).end(prefill("a"), finished({ metrics: { ...metrics, num_resumptions: 1 } }));
    expect(race.lane("speculative").wasInterrupted).toBe(true);
  });
});

test("listeners hear of every stage", async () => {
  const { race, calls, done } = setUp();
  let told = 0;
  race.subscribe(() => {
    told += 1;
  });
  await call(calls, 0).end(prefill("a"), finished());
  await call(calls, 1).end(prefill("a"), finished());
  await done;
  expect(told).toBe(4);
  expect(race.version()).toBe(5);
});
