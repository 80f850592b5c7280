import { act, cleanup, fireEvent, render, screen, within } from "@testing-library/react";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import type { RunStore } from "../../../src/run/store";
import { RacePanel } from "../../../src/view/race/RacePanel";
import type { Generate } from "../../../src/wire/generate";
import type { GenerateRequest, Wire } from "../../../src/wire/messages";
import { error, finished, prefill, stepMessage } from "../run/messages";

interface Call {
  request: GenerateRequest;
  store: RunStore;
  signal: AbortSignal;
  end: () => void;
}

let calls: Call[] = [];

beforeEach(() => {
  calls = [];
  // Frames are drawn by hand: clocks run on them, and stores tell of their messages.
  vi.useFakeTimers({ toFake: ["requestAnimationFrame", "cancelAnimationFrame", "performance"] });
});

afterEach(() => {
  cleanup();
  vi.useRealTimers();
});

function setUp(request: GenerateRequest | null = { prompt: "x", max_tokens: 8 }) {
  const generate: Generate = (asked, store, signal) =>
    new Promise((resolve) => {
      calls.push({ request: asked, store, signal, end: resolve });
    });
  return render(<RacePanel request={() => request} generate={generate} model="smollm2" />);
}

/** The messages of a lane, each at its time; its end where a terminal one is among them. */
async function send(index: number, ...messages: [number, Wire["received"]][]): Promise<void> {
  const call = calls[index];
  if (call === undefined) throw new Error(`no call ${index}`);
  await act(async () => {
    for (const [at, message] of messages) {
      call.store.receive(message, at);
      if (message.type === "finished" || message.type === "error") call.end();
    }
    await Promise.resolve();
    vi.advanceTimersToNextFrame();
  });
}

const start = async (name = "Start the race") => {
  await act(async () => fireEvent.click(screen.getByRole("button", { name })));
};
const lane = (name: string) => screen.getByRole("article", { name });
const result = () => screen.getByRole("status").textContent;

const PLAIN: [number, Wire["received"]][] = [
  [50, prefill("a")],
  [150, stepMessage([], " b")],
  [250, stepMessage([], " c")],
  [350, stepMessage([], " d")],
  [351, finished({ metrics: { ...finished().metrics, tokens_per_second: 11 } })],
];
const speculative = (last = " d"): [number, Wire["received"]][] => [
  [60, prefill("a")],
  [260, stepMessage([" b", " c"], last)],
  [261, finished({ metrics: { ...finished().metrics, tokens_per_second: 22 } })],
];

test("a race to its end: equal answers, both speeds, the ratio", async () => {
  setUp();
  await start();
  expect(calls).toHaveLength(1);
  expect(lane("Plain decoding").textContent).toContain("reading the prompt");
  expect(lane("Speculative decoding").textContent).toContain("waits for its turn");
  await send(0, ...PLAIN);
  expect(calls).toHaveLength(2);
  expect(calls.map((call) => call.request.speculation?.enabled)).toEqual([false, true]);
  expect(calls[0]?.request.seed).toBe(calls[1]?.request.seed);
  await send(1, ...speculative());
  expect(result()).toContain("identical: 4 of 4 tokens");
  expect(result()).toContain("1.50x");
  expect(result()).toContain("wall clock");
  expect(result()).toContain("2.50 tokens a verification step");
  expect(lane("Plain decoding").textContent).toMatch(/0\.05 s.*0\.30 s.*10\.0 tokens\/s.*11\.0 tokens\/s/);
  expect(lane("Speculative decoding").textContent).toMatch(/0\.06 s.*0\.20 s.*15\.0 tokens\/s.*22\.0 tokens\/s/);
});

test("accepted drafts are marked in the text, and what the model says is text", async () => {
  setUp();
  await start();
  await send(0, [10, prefill("a")], [20, stepMessage([" <b>x</b>"], " c")]);
  const text = within(lane("Plain decoding")).getByRole("region", { name: /answer/ });
  expect(text.textContent).toBe("a <b>x</b> c");
  expect(text.querySelector("mark")?.textContent).toBe(" <b>x</b>");
  expect(text.querySelector("b")).toBeNull();
});

test("the first difference is shown, and why it may be", async () => {
  setUp({ prompt: "x", temperature: 1, speculation: { acceptance: "typical" } });
  await start();
  await send(0, ...PLAIN);
  await send(1, ...speculative(" X"));
  expect(result()).toContain("different from token 4 on");
  expect(screen.getAllByRole("definition").map((entry) => entry.textContent)).toContain("a b c X");
  expect(result()).toContain("Typical acceptance changes the output");
});

describe("no result", () => {
  test("where a lane fails, whose error is shown", async () => {
    setUp();
    await start();
    await send(0, [50, prefill("a")], [60, error({ code: "unavailable", message: "the engine was lost" })]);
    expect(within(lane("Plain decoding")).getByRole("alert").textContent).toBe("the engine was lost unavailable");
    expect(lane("Speculative decoding").textContent).toContain("not run");
    expect(result()).toBe("No result: a lane failed.");
    expect(calls).toHaveLength(1);
  });

  test("where it was stopped; it can be run again", async () => {
    setUp();
    await start();
    await send(0, [50, prefill("a")]);
    await start("Stop");
    expect(calls[0]?.signal.aborted).toBe(true);
    await send(0, [70, finished({ finish_reason: "cancelled" })]);
    expect(result()).toBe("Stopped: no result.");
    expect(lane("Plain decoding").textContent).toContain("stopped");
    await start("Race again");
    expect(calls).toHaveLength(2);
  });

  test("without a prompt", async () => {
    setUp(null);
    await start();
    expect(screen.getByRole("alert").textContent).toContain("Write a prompt first");
    expect(calls).toHaveLength(0);
  });
});

test("the order is said and can be swapped", async () => {
  setUp();
  expect(screen.getByText(/First plain, then speculative/)).toBeTruthy();
  fireEvent.click(screen.getByRole("button", { name: "Swap the order" }));
  expect(screen.getByText(/First speculative, then plain/)).toBeTruthy();
  await start();
  expect(calls.map((call) => call.request.speculation?.enabled)).toEqual([true]);
});

test("together is labelled, and starts both", async () => {
  setUp();
  fireEvent.click(screen.getByRole("radio", { name: "Together" }));
  expect(screen.getByText(/each slows the other/)).toBeTruthy();
  await start();
  expect(calls.map((call) => call.request.speculation?.enabled)).toEqual([false, true]);
});

test("clocks run while they are waited for", async () => {
  setUp();
  await start();
  act(() => vi.advanceTimersByTime(1500));
  expect(lane("Plain decoding").textContent).toMatch(/First token1\.(4|5)\d s/);
});

test("leaving the panel stops the race", async () => {
  const { unmount } = setUp();
  await start();
  unmount();
  expect(calls[0]?.signal.aborted).toBe(true);
});
