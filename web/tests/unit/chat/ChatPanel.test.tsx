import { act, cleanup, fireEvent, render, screen, within } from "@testing-library/react";
import { afterEach, expect, test, vi } from "vitest";
import type { RunStore } from "../../../src/run/store";
import { Session } from "../../../src/session/session";
import { ChatPanel } from "../../../src/view/chat/ChatPanel";
import { error, finished, prefill } from "../run/messages";

afterEach(cleanup);

interface Options {
  prompt?: string;
  isChat?: boolean;
  obstacle?: string | null;
}

function panel({ prompt = "why?", isChat = true, obstacle = null }: Options = {}) {
  let answering: { store: RunStore; signal: AbortSignal; end: () => void } | undefined;
  const session = new Session(
    (_, store, signal) =>
      new Promise((end) => {
        answering = { store, signal, end };
      }),
  );
  const ask = vi.fn((text: string) => void session.ask({ prompt: text }, text, null, isChat));
  const setPrompt = vi.fn();
  render(
    <ChatPanel
      session={session}
      prompt={prompt}
      setPrompt={setPrompt}
      isChat={isChat}
      obstacle={obstacle}
      ask={(text) => act(() => ask(text))}
    />,
  );
  const answer = () => {
    if (answering === undefined) throw new Error("nothing was asked");
    return answering;
  };
  const box = screen.getByRole("textbox");
  return { session, ask, setPrompt, answer, box };
}

test.each([
  ["Enter", { key: "Enter" }, true, 1],
  ["Ctrl+Enter", { key: "Enter", ctrlKey: true }, true, 1],
  ["Cmd+Enter", { key: "Enter", metaKey: true }, false, 1],
  ["Shift+Enter", { key: "Enter", shiftKey: true }, true, 0],
  ["Enter in a text to continue", { key: "Enter" }, false, 0],
  ["a letter", { key: "a" }, true, 0],
])("%s", (_, key, isChat, times) => {
  const { ask, box } = panel({ isChat });
  fireEvent.keyDown(box, key);
  expect(ask).toHaveBeenCalledTimes(times);
});

test("an example is asked with one click", () => {
  const { ask } = panel({ prompt: "" });
  fireEvent.click(screen.getByRole("button", { name: /why the sky is blue/ }));
  expect(ask).toHaveBeenCalledWith("Explain to a child why the sky is blue.");
});

test("where nothing can be asked an example is only written down, and the reason said", () => {
  const { ask, setPrompt } = panel({ obstacle: "the server does not answer" });
  expect(screen.getByRole("button", { name: "Send" }).hasAttribute("disabled")).toBe(true);
  expect(screen.getByText("the server does not answer")).toBeDefined();
  fireEvent.click(screen.getByRole("button", { name: /why the sky is blue/ }));
  expect([ask.mock.calls.length, setPrompt.mock.calls.length]).toEqual([0, 1]);
});

test("stop stands where send stood, until the end", async () => {
  const { box, answer } = panel();
  fireEvent.keyDown(box, { key: "Enter" });
  fireEvent.click(screen.getByRole("button", { name: "Stop" }));
  expect(answer().signal.aborted).toBe(true);
  await act(async () => answer().end());
  expect(screen.getByRole("button", { name: "Send" })).toBeDefined();
});

test("an error is shown with its code and what can be done", async () => {
  const { box, answer } = panel();
  fireEvent.keyDown(box, { key: "Enter" });
  await act(async () => {
    answer().store.receive(error({ code: "queue_full", message: "64 wait already", retry_after_seconds: 1.2 }), 1);
    await new Promise(requestAnimationFrame);
  });
  const said = screen.getByRole("alert").textContent;
  for (const word of ["queue_full", "64 wait already", "Try again in 2 s", "add an engine"])
    expect(said).toContain(word);
});

test("a question is text, and what it cost is said at the end", async () => {
  const { box, answer } = panel({ prompt: "<b>bold?</b>" });
  fireEvent.keyDown(box, { key: "Enter" });
  await act(async () => {
    answer().store.receive(prefill("yes"), 1);
    answer().store.receive(finished(), 2);
    await new Promise(requestAnimationFrame);
  });
  expect(within(screen.getByRole("log")).getByText("<b>bold?</b>")).toBeDefined();
  expect(screen.getByText(/20 tokens · 100.0 tokens\/s · 2.00x plain decoding · 2.50 tokens a step/)).toBeDefined();
});
