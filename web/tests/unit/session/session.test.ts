import { expect, test, vi } from "vitest";
import { startRun } from "../../../src/run/run";
import type { RunStore } from "../../../src/run/store";
import { promptOf, Session } from "../../../src/session/session";
import type { Generate } from "../../../src/wire/generate";
import type { GenerateRequest } from "../../../src/wire/messages";
import { error, finished, prefill } from "../run/messages";

/** A session whose generations are ended by hand. */
function sessionByHand() {
  const calls: { store: RunStore; signal: AbortSignal; end: () => void }[] = [];
  const generate: Generate = (_, store, signal) =>
    new Promise((end) => {
      calls.push({ store, signal, end });
    });
  const session = new Session(generate);
  const call = (index: number) => {
    const found = calls[index];
    if (found === undefined) throw new Error(`no generation ${index}`);
    return found;
  };
  /** One whole turn of a chat. */
  const turn = async (prompt: string, answer: string) => {
    const done = session.ask(chat(prompt), prompt, "m", true);
    const { store, end } = call(calls.length - 1);
    store.receive(prefill(answer), 1);
    store.receive(finished(), 2);
    end();
    await done;
  };
  return { session, call, calls, turn };
}

const chat = (prompt: string): GenerateRequest => ({ messages: [{ role: "user", content: prompt }] });

test("an answer is shown at once, and followed by its end", async () => {
  const { session, call } = sessionByHand();
  const listener = vi.fn();
  session.subscribe(listener);
  const done = session.ask(chat("why?"), "why?", "smollm2", true);
  expect([session.prompt, session.isRunning, session.shown?.store.run.model]).toEqual(["why?", true, "smollm2"]);
  expect(listener).toHaveBeenCalledTimes(1);
  call(0).end();
  await done;
  expect([session.isRunning, listener.mock.calls.length]).toEqual([false, 2]);
});

test("one generation at a time", async () => {
  const { session, calls, call } = sessionByHand();
  const done = session.ask(chat("a"), "a", null, true);
  await session.ask(chat("b"), "b", null, true);
  expect([calls.length, session.prompt]).toEqual([1, "a"]);
  call(0).end();
  await done;
});

test("stop aborts what runs", async () => {
  const { session, call } = sessionByHand();
  const done = session.ask(chat("a"), "a", null, true);
  session.stop();
  expect(call(0).signal.aborted).toBe(true);
  call(0).end();
  await done;
});

test("a chat grows by what was asked and answered", async () => {
  const { session, turn } = sessionByHand();
  await turn("one?", "1");
  await turn("two?", "2");
  expect(session.turns).toEqual([
    { role: "user", content: "one?" },
    { role: "assistant", content: "1" },
  ]);
  expect(session.history.slice(2)).toEqual([
    { role: "user", content: "two?" },
    { role: "assistant", content: "2" },
  ]);
});

test("a question that got no answer is left out of what is sent on", async () => {
  const { session, call, turn } = sessionByHand();
  await turn("one?", "1");
  const done = session.ask(chat("two?"), "two?", null, true);
  call(1).store.receive(error(), 1);
  call(1).end();
  await done;
  expect(session.history.map(({ content }) => content)).toEqual(["one?", "1"]);
});

test("a completion is no turn of a chat", async () => {
  const { session, call } = sessionByHand();
  const done = session.ask({ prompt: "once" }, "once", null, false);
  call(0).store.receive(prefill(" upon"), 1);
  call(0).end();
  await done;
  expect([session.turns, session.history]).toEqual([[], []]);
});

test("a run of a file takes the place of what was shown, and of what runs", async () => {
  const { session, call } = sessionByHand();
  const done = session.ask(chat("a"), "a", null, true);
  const imported = startRun({ messages: [{ role: "user", content: "from a file" }] }, "2026-01-31T12:00:00Z");
  session.open(imported);
  expect(call(0).signal.aborted).toBe(true);
  call(0).end();
  await done;
  expect(session.shown?.store.run).toBe(imported);
  expect([session.shown?.isImported, session.prompt, session.history]).toEqual([true, "from a file", []]);
});

test("clear forgets everything", async () => {
  const { session, turn } = sessionByHand();
  await turn("one?", "1");
  session.clear();
  expect([session.turns, session.prompt, session.shown, session.history]).toEqual([[], null, null, []]);
});

test.each<[GenerateRequest, string]>([
  [{ prompt: "once" }, "once"],
  [
    {
      messages: [
        { role: "system", content: "s" },
        { role: "user", content: "u" },
      ],
    },
    "u",
  ],
  [{ prompt_token_ids: [1] }, ""],
])("what %j asks, in words", (request, words) => {
  expect(promptOf(request)).toBe(words);
});
