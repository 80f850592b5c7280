import { act, cleanup, fireEvent, render, screen } from "@testing-library/react";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Player } from "../../../src/run/player";
import { startRun } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { piecesOf, STEPS_A_CHUNK } from "../../../src/view/chat/chunks";
import { StreamText } from "../../../src/view/chat/StreamText";
import { finished, prefill, stepMessage, tokenMessage } from "../run/messages";

vi.mock("../../../src/view/chat/chunks", async (load) => {
  const chunks = await load<typeof import("../../../src/view/chat/chunks")>();
  return { ...chunks, piecesOf: vi.fn(chunks.piecesOf) };
});

beforeEach(() => {
  // No layout here: every element has one box at the origin.
  vi.spyOn(Element.prototype, "getClientRects").mockReturnValue([new DOMRect(0, 0, 10, 10)] as unknown as DOMRectList);
  Element.prototype.scrollIntoView = () => undefined;
});

afterEach(() => {
  cleanup();
  vi.restoreAllMocks(); // of spies; piecesOf stays what it is
});

function shown() {
  const frames: (() => void)[] = [];
  const store = new RunStore(startRun({ prompt: "x" }, "2026-01-31T12:00:00Z"), (flush) => {
    frames.push(flush);
  });
  const player = new Player(() => store.run.steps.length);
  render(<StreamText store={store} player={player} />);
  const receive = (...messages: Parameters<RunStore["receive"]>[0][]) =>
    act(() => {
      for (const message of messages) store.receive(message, 1);
      for (const flush of frames.splice(0)) flush();
    });
  return { store, player, receive, text: screen.getByRole("group", { name: "Answer" }) };
}

test("text comes token by token, accepted drafts marked", () => {
  const { receive, text } = shown();
  receive(prefill("The"), stepMessage([" sky", " is"], " blue"));
  expect(text.textContent).toBe("The sky is blue");
  expect([...text.querySelectorAll(".stream-draft")].map((draft) => draft.textContent)).toEqual([" sky", " is"]);
  receive(finished({ text: "." }));
  expect(text.textContent).toBe("The sky is blue.");
});

test("what the model writes is text, whatever it is", () => {
  const { receive, text } = shown();
  const hostile = '<img src="x" onerror="alert(1)"><script>alert(2)</script>';
  receive(prefill(hostile), stepMessage([hostile], hostile), finished({ text: hostile }));
  expect(text.textContent).toBe(hostile.repeat(4));
  expect(text.querySelectorAll("img, script")).toHaveLength(0);
});

test("the player's position bounds the text", () => {
  const { receive, player, text } = shown();
  receive(prefill("a"), tokenMessage([" b"]), tokenMessage([" c"]), finished({ text: "!" }));
  act(() => player.seek(2));
  expect(text.textContent).toBe("a b");
  act(() => player.live());
  expect(text.textContent).toBe("a b c!");
});

test.each([
  ["lines", "\n"],
  ["one long line", " a"],
])("%s: what is complete is not drawn again", (_, token) => {
  const { receive, text } = shown();
  receive(...Array.from({ length: 3 * STEPS_A_CHUNK }, () => tokenMessage([token])));
  const before = [...text.querySelectorAll("[data-token]")];
  vi.mocked(piecesOf).mockClear();
  receive(stepMessage([" b"], " c"));
  expect(piecesOf).toHaveBeenCalledTimes(1);
  receive(...Array.from({ length: 100 }, () => stepMessage([" b"], " c")));
  const after = [...text.querySelectorAll("[data-token]")];
  expect(after.length).toBe(before.length + 202);
  expect(after.slice(0, before.length).every((element, i) => element === before[i])).toBe(true);
});

test("a token under the mouse tells where it came from", () => {
  const { receive, text } = shown();
  receive(prefill("The"), stepMessage([" sky"], " is\n"));
  const [own, draft, bonus] = text.querySelectorAll<HTMLElement>("[data-token]");
  for (const [element, words] of [
    [own, ["The", "given by the prompt's pass"]],
    [draft, ["·sky", "accepted draft", "head 1", "50.0 %"]],
    [bonus, ["·is⏎", "the backbone's own"]],
  ] as const) {
    if (element === undefined) throw new Error("a token is not there");
    fireEvent.mouseMove(element);
    for (const word of words) expect(screen.getByRole("tooltip").textContent).toContain(word);
  }
  fireEvent.mouseLeave(text);
  expect(screen.queryByRole("tooltip")).toBeNull();
});

test("the arrow keys go from token to token", async () => {
  const { receive, text } = shown();
  receive(prefill("The"), stepMessage([" sky"], " is"));
  for (const [key, word] of [
    ["ArrowRight", "The"],
    ["ArrowRight", "·sky"],
    ["End", "·is"],
    ["ArrowLeft", "·sky"],
  ] as const) {
    fireEvent.keyDown(text, { key });
    await vi.waitFor(() => expect(screen.getByRole("tooltip").textContent).toContain(word));
  }
  fireEvent.scroll(window);
  expect(screen.queryByRole("tooltip")).toBeNull();
});
