import { expect, test, vi } from "vitest";
import { startRun, textOf } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { failure, type GenerateOptions, makeGenerate, protocols } from "../../../src/wire/generate";
import type { GenerateRequest } from "../../../src/wire/messages";
import { error, finished, idOf, prefill, status, stepMessage } from "../run/messages";
import { ScriptedSocket } from "./socket";

const REQUEST: GenerateRequest = { prompt: "once", temperature: 0.7, tree_debug: true };

/** A generation under way, with a clock that only waiting moves. */
function begin(options: Partial<GenerateOptions> = {}, request: GenerateRequest = REQUEST) {
  const sockets: ScriptedSocket[] = [];
  const waits: number[] = [];
  let time = 0;
  const generate = makeGenerate({
    url: () => "ws://here/generate_stream",
    key: () => null,
    open: (url, names) => {
      const socket = new ScriptedSocket(url, names);
      sockets.push(socket);
      return socket as unknown as WebSocket;
    },
    now: () => time,
    wait: async (duration) => {
      waits.push(duration);
      time += duration;
    },
    random: () => 1,
    ...options,
  });
  const store = new RunStore(startRun(request, "2026-01-31T12:00:00Z"), () => undefined);
  const controller = new AbortController();
  const done = generate(request, store, controller.signal);
  const socket = async (index: number): Promise<ScriptedSocket> =>
    vi.waitFor(() => {
      const found = sockets[index];
      if (found === undefined) throw new Error(`no connection ${index} yet`);
      return found;
    });
  return { store, done, socket, sockets, waits, stop: () => controller.abort() };
}

test("a request, its messages, one end", async () => {
  const { store, done, socket } = begin();
  const connection = await socket(0);
  expect([connection.url, connection.protocols]).toEqual(["ws://here/generate_stream", ["gorgon"]]);
  connection.accept();
  expect(connection.sent).toEqual([REQUEST]);
  connection.say(status("queued", { position: 2 }), prefill("a"), stepMessage([" b"], " c"), finished({ text: "!" }));
  await done;
  expect([textOf(store.run), store.run.phase, connection.readyState]).toEqual(["a b c!", "finished", WebSocket.CLOSED]);
});

test("a lost connection goes on behind the received tokens, with the seed that the gateway drew", async () => {
  const { store, done, socket, waits } = begin();
  const first = await socket(0);
  first.accept();
  first.say(status("prefill", { seed: 42 }), prefill("a"), stepMessage([" b"], " c"));
  first.lose();
  await vi.waitFor(() => expect(store.run.phase).toBe("reconnecting"));
  const second = await socket(1);
  second.accept();
  const generated_token_ids = [idOf("a"), idOf(" b"), idOf(" c")];
  expect(second.sent).toEqual([{ ...REQUEST, seed: 42, generated_token_ids }]);
  first.say(stepMessage([], " lost"));
  second.say(prefill(" d"), finished());
  await done;
  expect([textOf(store.run), store.run.phase, waits]).toEqual(["a b c d", "finished", [250]]);
});

test("tokens that the request itself brought stay before the received ones", async () => {
  const { done, socket } = begin({}, { ...REQUEST, seed: 1, generated_token_ids: [7, 8] });
  const first = await socket(0);
  first.accept();
  first.say(prefill("a"));
  first.lose();
  const second = await socket(1);
  second.accept();
  expect(second.sent).toMatchObject([{ seed: 1, generated_token_ids: [7, 8, idOf("a")] }]);
  second.say(finished());
  await done;
});

test("waits grow up to a limit, then it is given up; tokens in between begin them anew", async () => {
  const { store, done, socket, sockets, waits } = begin();
  const first = await socket(0);
  first.accept();
  first.say(prefill("a"));
  for (let i = 0; i < 3; i += 1) (await socket(i)).lose();
  const fourth = await socket(3);
  fourth.accept();
  fourth.say(prefill(" b"));
  for (let i = 3; store.run.error === null; i += 1) {
    (await socket(i)).lose();
    await vi.waitFor(() => expect(store.run.error !== null || sockets.length > i + 1).toBe(true));
  }
  await done;
  expect(waits.slice(0, 9)).toEqual([250, 500, 1000, 250, 500, 1000, 2000, 4000, 5000]);
  expect(waits.slice(3).reduce((sum, wait) => sum + wait)).toBeGreaterThan(60_000);
  expect(store.run.error).toMatchObject({ code: "connection_lost" });
  expect(textOf(store.run)).toBe("a b");
});

test("waits are spread, so that many pages do not come back at once", async () => {
  const { done, socket, waits, stop } = begin({ random: () => 0 });
  (await socket(0)).lose();
  await socket(1);
  expect(waits).toEqual([125]);
  stop();
  await done;
});

test("why a handshake was refused is said at once", async () => {
  const refusal = failure("invalid_api_key", "The gateway does not know this API key.");
  const { store, done, socket, waits } = begin({ explain: async () => refusal });
  (await socket(0)).lose();
  await done;
  expect([store.run.error, waits]).toEqual([refusal, []]);
});

test.each(["queue_full", "unavailable", "rate_limit_exceeded"])("%s is shown, not asked again", async (code) => {
  const said = error({ code, retry_after_seconds: 2 });
  const { store, done, socket, sockets } = begin();
  const connection = await socket(0);
  connection.accept();
  connection.say(said);
  await done;
  expect([store.run.error, sockets.length]).toEqual([said, 1]);
});

test("an engine that is lost in the middle of the answer may come back", async () => {
  const { store, done, socket } = begin();
  const first = await socket(0);
  first.accept();
  first.say(
    status("prefill", { seed: 42 }),
    prefill("a"),
    status("resuming", { seed: 42 }),
    error({ code: "unavailable" }),
  );
  await vi.waitFor(() => expect(store.run.phase).toBe("reconnecting"));
  const second = await socket(1);
  second.accept();
  expect(second.sent).toEqual([{ ...REQUEST, seed: 42, generated_token_ids: [idOf("a")] }]);
  second.say(prefill(" b"), finished());
  await done;
  expect([textOf(store.run), store.run.phase]).toEqual(["a b", "finished"]);
});

test("a gateway that is back before its engines is asked again", async () => {
  const { store, done, socket } = begin();
  const first = await socket(0);
  first.accept();
  first.say(prefill("a"));
  first.lose();
  const second = await socket(1);
  second.accept();
  second.say(error({ code: "unavailable", retry_after_seconds: 1 }));
  const third = await socket(2);
  expect(store.run.phase).toBe("reconnecting");
  third.accept();
  third.say(prefill(" b"), finished());
  await done;
  expect(textOf(store.run)).toBe("a b");
});

test.each([
  ["not JSON", "{"],
  ["bytes", new ArrayBuffer(2)],
  ["an unknown type", '{"type": "surprise"}'],
  ["a list", "[]"],
  ["a token message without tokens", '{"type": "token", "text": "a"}'],
])("%s ends the run with an error", async (_, data) => {
  const { store, done, socket } = begin();
  const connection = await socket(0);
  connection.accept();
  connection.frame(data);
  await done;
  expect([store.run.error?.code, connection.readyState]).toEqual(["protocol_error", WebSocket.CLOSED]);
});

test("stop asks the gateway to cancel, and waits for its last word", async () => {
  const { store, done, socket, stop } = begin();
  const connection = await socket(0);
  connection.accept();
  connection.say(prefill("a"));
  stop();
  expect(connection.sent.at(-1)).toEqual({ type: "cancel" });
  connection.say(stepMessage([], " b"), finished({ finish_reason: "cancelled" }));
  await done;
  expect([textOf(store.run), store.run.finished?.finish_reason]).toEqual(["a b", "cancelled"]);
});

test("stop where nobody answers ends it all the same", async () => {
  vi.useFakeTimers();
  try {
    const { store, done, sockets, stop } = begin();
    sockets[0]?.accept();
    stop();
    await vi.runAllTimersAsync();
    await done;
    expect(store.run.error?.code).toBe("cancelled");
  } finally {
    vi.useRealTimers();
  }
});

test("stop before a connection is there opens no other", async () => {
  const { store, done, socket, sockets, stop } = begin();
  await socket(0);
  stop();
  await done;
  expect([store.run.error?.code, sockets.length]).toEqual(["cancelled", 1]);
});

test("stop in the middle of a wait ends the wait", async () => {
  const { store, done, socket, stop } = begin({ wait: undefined as never });
  (await socket(0)).lose();
  await vi.waitFor(() => expect(store.run.phase).toBe("reconnecting"));
  stop();
  await done;
  expect(store.run.error?.code).toBe("cancelled");
});

test("a key travels as base64url", () => {
  const decode = (name: string) => atob(name.slice("key.".length).replaceAll("-", "+").replaceAll("_", "/"));
  expect([protocols(null), protocols("")]).toEqual([["gorgon"], ["gorgon"]]);
  for (const key of ["gorgon_a?b>c~", "ab", "abc"]) {
    const [first, second = ""] = protocols(key);
    expect(first).toBe("gorgon");
    expect(second).toMatch(/^key\.[A-Za-z0-9_-]+$/);
    expect(decode(second)).toBe(key);
  }
  expect(protocols("ключ")[1]).toMatch(/^key\.[A-Za-z0-9_-]+$/);
});
