import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { ServerStore } from "../../../src/server/server";
import type { EngineInfo, GatewayInfo } from "../../../src/wire/messages";

const ENGINE: EngineInfo = {
  engine_id: "e1",
  version: "0.1.0",
  model: "smollm2",
  backbone: "b",
  kernels: "native-int8",
  device: "cpu",
  context: 8192,
  vocab_size: 49152,
  num_slots: 8,
  max_nodes: 32,
  max_waiting: 64,
  heads: {
    current: "eagle@1",
    family: "eagle",
    num_heads: 8,
    loaded_at: 0,
    num_swaps: 0,
    last_error: null,
    refused: null,
  },
  plain: [{ batch_size: 1, tokens_per_second: 60 }],
  state: "ready",
  num_running: 0,
  num_waiting: 0,
  kv_cache_usage: 0,
  notices: [],
};
const INFO: GatewayInfo = { version: "0.1.0", models: ["smollm2"], engines: [ENGINE], num_running: 0 };

/** A gateway whose answers are functions of the path. */
class Gateway {
  health: () => Response = () => Response.json({ state: "ready" });
  info: () => Response = () => Response.json(INFO);
  readonly asked: { path: string; key: string | null }[] = [];

  readonly fetch: typeof fetch = async (input, init) => {
    const path = String(input);
    this.asked.push({ path, key: new Headers(init?.headers).get("Authorization") });
    return path === "/info" ? this.info() : this.health();
  };

  get numChecks(): number {
    return this.asked.filter(({ path }) => path === "/health/ready").length;
  }
}

let gateway: Gateway;
let hidden: boolean;

beforeEach(() => {
  gateway = new Gateway();
  hidden = false;
  vi.spyOn(document, "hidden", "get").mockImplementation(() => hidden);
  vi.useFakeTimers();
});

afterEach(() => {
  vi.useRealTimers();
  vi.restoreAllMocks();
});

const refused = (status: number, code: string, message: string) => () =>
  Response.json({ error: { code, message, retry_after_seconds: null } }, { status });

test("ready: models and engines are known", async () => {
  const server = new ServerStore(() => null, gateway.fetch);
  expect(server.state().phase).toBe("unknown");
  expect(await server.check()).toMatchObject({ phase: "ready", models: ["smollm2"], engines: [ENGINE] });
  expect(gateway.asked).toEqual([
    { path: "/health/ready", key: null },
    { path: "/info", key: null },
  ]);
});

test("loading: how far, and of what", async () => {
  gateway.health = () => Response.json({ state: "loading", progress: 0.4, stage: "weights" }, { status: 503 });
  const server = new ServerStore(() => null, gateway.fetch);
  expect(await server.check()).toMatchObject({ phase: "loading", progress: 0.4, stage: "weights", models: [] });
});

test.each([
  ["draining", "draining"],
  ["unavailable", "unavailable"],
] as const)("%s is said so", async (state, phase) => {
  gateway.health = () => Response.json({ state }, { status: 503 });
  expect((await new ServerStore(() => null, gateway.fetch).check()).phase).toBe(phase);
});

test("an engine that has failed is told from one that is not there", async () => {
  gateway.health = () => Response.json({ state: "unavailable" }, { status: 503 });
  gateway.info = () => Response.json({ ...INFO, engines: [{ ...ENGINE, state: "failed" }] });
  expect((await new ServerStore(() => null, gateway.fetch).check()).phase).toBe("failed");
});

test.each<[string, () => Response]>([
  [
    "no connection",
    () => {
      throw new TypeError("Failed to fetch");
    },
  ],
  ["a page of a proxy", () => new Response("<h1>502 Bad Gateway</h1>", { status: 502 })],
  ["somebody else's JSON", () => Response.json({ status: "ok" })],
])("%s: unreachable, and what was known stays", async (_, answer) => {
  const server = new ServerStore(() => null, gateway.fetch);
  await server.check();
  gateway.health = answer;
  expect(await server.check()).toMatchObject({ phase: "unreachable", models: ["smollm2"] });
});

test("a key is asked for, sent, and its refusal explained", async () => {
  let key: string | null = null;
  gateway.info = refused(401, "invalid_api_key", "no key");
  const server = new ServerStore(() => key, gateway.fetch);
  expect((await server.check()).needsKey).toBe(true);
  expect(await server.refusal()).toMatchObject({
    code: "invalid_api_key",
    message: "This gateway asks for an API key.",
  });
  key = "gorgon_wrong";
  expect((await server.refusal())?.message).toBe("The gateway does not know this API key.");
  expect(gateway.asked.at(-1)).toEqual({ path: "/info", key: "Bearer gorgon_wrong" });
  gateway.info = () => Response.json(INFO);
  expect(await server.refusal()).toBeNull();
  expect(server.state().needsKey).toBe(false);
});

test("another refusal is passed on in the gateway's words", async () => {
  gateway.info = refused(403, "forbidden", "the origin may not use this gateway");
  const state = await new ServerStore(() => null, gateway.fetch).check();
  expect([state.phase, state.reason]).toEqual(["refused", "the origin may not use this gateway"]);
});

test("listeners hear of changes alone", async () => {
  const server = new ServerStore(() => null, gateway.fetch);
  const listener = vi.fn();
  const leave = server.subscribe(listener);
  await server.check();
  await server.check();
  expect(listener).toHaveBeenCalledTimes(1);
  gateway.health = () => Response.json({ state: "draining" }, { status: 503 });
  await server.check();
  expect(listener).toHaveBeenCalledTimes(2);
  leave();
});

test("it asks often until it is ready, then seldom, and hardly at all while nobody looks", async () => {
  gateway.health = () => Response.json({ state: "loading", progress: null, stage: null }, { status: 503 });
  const server = new ServerStore(() => null, gateway.fetch);
  const stop = server.start();
  await vi.advanceTimersByTimeAsync(3_000);
  expect(gateway.numChecks).toBeGreaterThanOrEqual(4);
  gateway.health = () => Response.json({ state: "ready" });
  await vi.advanceTimersByTimeAsync(1_000);
  const ready = gateway.numChecks;
  await vi.advanceTimersByTimeAsync(30_000);
  expect(gateway.numChecks - ready).toBe(3);
  hidden = true;
  await vi.advanceTimersByTimeAsync(10_000);
  const left = gateway.numChecks;
  await vi.advanceTimersByTimeAsync(55_000);
  expect(gateway.numChecks).toBe(left);
  hidden = false;
  document.dispatchEvent(new Event("visibilitychange"));
  await vi.advanceTimersByTimeAsync(0);
  expect(gateway.numChecks).toBe(left + 1);
  stop();
  await vi.advanceTimersByTimeAsync(120_000);
  document.dispatchEvent(new Event("visibilitychange"));
  expect(gateway.numChecks).toBe(left + 1);
});
