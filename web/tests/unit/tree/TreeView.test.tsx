import { act, cleanup, fireEvent, render, screen } from "@testing-library/react";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { MessageGenerator, SHAPE } from "../../../bench/generator";
import { Player } from "../../../src/run/player";
import { startRun } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { TreeView } from "../../../src/view/tree/TreeView";
import type { Wire } from "../../../src/wire/messages";
import { firstMessage, messageOf } from "./runs";

const SIZE = { width: 1200, height: 400 };

class FixedSize {
  constructor(readonly report: (entries: { contentRect: typeof SIZE }[]) => void) {}
  observe() {
    this.report([{ contentRect: SIZE }]);
  }
  disconnect() {}
}

let prefersReducedMotion = false;

beforeEach(() => {
  prefersReducedMotion = false;
  vi.stubGlobal("ResizeObserver", FixedSize);
  vi.stubGlobal("matchMedia", () => ({
    matches: prefersReducedMotion,
    addEventListener: () => {},
    removeEventListener: () => {},
  }));
});

afterEach(() => {
  cleanup();
  vi.unstubAllGlobals();
  vi.restoreAllMocks();
});

function open(...messages: Wire["received"][]) {
  const store = new RunStore(startRun({ prompt: "x" }, "2026-11-25T09:00:00.000Z"), (flush) => flush());
  const player = new Player(() => store.run.steps.length);
  messages.forEach((message, i) => {
    store.receive(message, 1000 * i);
  });
  const { container } = render(<TreeView store={store} player={player} />);
  return { store, player, container };
}

const STORY = [
  firstMessage("The"),
  messageOf(
    [
      { text: " cat", parent: -1, isAccepted: true, probability: 0.6 },
      { text: " dog", parent: -1, rank: 1, source: "lookup", probability: 0.2 },
      { text: " sat", parent: 0, isAccepted: true },
      { text: "<script>x", parent: 0, rank: 1 },
    ],
    " on",
  ),
];

const textsWith = (container: Element, fate: string) =>
  [...container.querySelectorAll(`[data-fate="${fate}"]`)].map(({ textContent }) => textContent);
const surface = () => screen.getByRole("application");
const camera = (container: Element) => container.querySelector(".tree-camera")?.getAttribute("style");
const isFollowing = () => screen.getByRole("button", { name: "Follow" }).getAttribute("aria-pressed");

describe("TreeView", () => {
  it("says what will be here before a run, and that it waits", () => {
    const { store } = open();
    expect(screen.getByText(/the tree of drafts grows/)).toBeTruthy();
    act(() => store.setPhase("prefill"));
    expect(screen.getByText("Waiting for the first token.")).toBeTruthy();
  });

  it("shows accepted, rejected and the backbone's own tokens as such", () => {
    const { container } = open(...STORY);
    expect(textsWith(container, "accepted")).toEqual(["·cat", "·sat"]);
    expect(textsWith(container, "rejected")).toEqual(["·dog", "<script>x"]);
    expect(textsWith(container, "backbone")).toEqual(["The", "·on"]);
    expect(container.querySelector("script")).toBeNull();
  });

  it("tells it in words", () => {
    const { container } = open(...STORY);
    const words = container.querySelector(".tree-summary");
    expect(words?.textContent).toBe("step 1: 4 nodes, accepted 2: '·cat' '·sat'; the backbone's own: '·on'");
    expect(words?.getAttribute("aria-live")).toBe("off");
    expect(surface().getAttribute("aria-describedby")).toBe(words?.id);
  });

  it("grows with the run: what was new is trunk with the next step, an accepted node keeps its element", () => {
    const { store, container } = open(...STORY);
    const cat = container.querySelector('[data-token="1"]');
    expect(cat?.classList.contains("tree-token--new")).toBe(true);
    act(() => store.receive(messageOf([{ text: " the", parent: -1 }], " a"), 3000));
    expect(container.querySelector('[data-token="1"]')).toBe(cat);
    expect(cat?.classList.contains("tree-token--new")).toBe(false);
    expect(textsWith(container, "rejected")).toEqual(["·dog", "<script>x", "·the"]);
    expect(container.querySelectorAll(".tree-branches--gone")).toHaveLength(1);
  });

  it("shows a paused step as it was, without what fades", () => {
    const { store, player, container } = open(...STORY);
    act(() => store.receive(messageOf([{ text: " the", parent: -1 }], " a"), 3000));
    act(() => player.seek(3));
    expect(textsWith(container, "rejected")).toEqual(["·the"]);
    act(() => player.seek(2));
    expect(textsWith(container, "rejected")).toEqual(["·dog", "<script>x"]);
    expect(container.querySelectorAll("[data-token]")).toHaveLength(4);
    expect(container.querySelector(".tree-svg--still")).toBeTruthy();
    act(() => player.seek(1));
    expect(container.querySelectorAll("[data-token]")).toHaveLength(1);
    expect(screen.getByText("prefill: the first token")).toBeTruthy();
  });

  it("says that a tree is no longer kept", () => {
    const { store, player } = open(...STORY);
    const step = store.run.steps[1];
    if (step === undefined) throw new Error("no such step");
    step.tree = null;
    act(() => player.pause());
    expect(screen.getByText(/its tree is no longer kept$/, { selector: ".tree-caption" })).toBeTruthy();
  });

  it("moves nothing for who asked for less motion", () => {
    prefersReducedMotion = true;
    const { container } = open(...STORY);
    expect(container.querySelector(".tree-svg--still")).toBeTruthy();
    expect(container.querySelector(".tree-branches--gone")).toBeNull();
  });

  it("reuses its elements when steps come fast", () => {
    const { store, container } = open();
    const generator = new MessageGenerator(1, SHAPE);
    for (let i = 0; i < 20; i += 1) act(() => store.receive(generator.next(), 10 * i));
    const before = container.querySelector(".tree-branches");
    act(() => store.receive(generator.next(), 200));
    expect(before).not.toBeNull();
    expect(container.querySelector(".tree-branches")).toBe(before);
    expect(container.querySelectorAll(".tree-branches--gone")).toHaveLength(0);
    expect(container.querySelectorAll(".tree-ember").length).toBeGreaterThan(0);
  });

  it("holds a bounded number of elements however long the run is", () => {
    const { store, container } = open();
    const generator = new MessageGenerator(1, SHAPE);
    const counts: number[] = [];
    for (let i = 0; i < 300; i += 1) {
      if (i % 100 === 99) act(() => store.receive(generator.next(), 10 * i));
      else
        store.run.steps.length === 0
          ? act(() => store.receive(generator.next(), 0))
          : store.receive(generator.next(), 10 * i);
      if (i % 100 === 99) counts.push(container.querySelectorAll("*").length);
    }
    expect(Math.max(...counts)).toBeLessThan(1000);
    expect(store.run.tokens.length).toBeGreaterThan(600);
  });

  it("paints on a canvas where there are more than a thousand nodes", () => {
    vi.spyOn(HTMLCanvasElement.prototype, "getContext").mockReturnValue(null);
    const { container } = open(
      firstMessage("The"),
      messageOf(
        Array.from({ length: 1100 }, () => ({ text: "x", parent: -1 })),
        ".",
      ),
    );
    expect(container.querySelector("canvas")).toBeTruthy();
    expect(container.querySelector(".tree-svg")).toBeNull();
  });
});

describe("the tree's tooltip", () => {
  it("opens with the arrow keys, goes from node to node, and closes", () => {
    open(...STORY);
    fireEvent.keyDown(surface(), { key: "ArrowRight" });
    expect(screen.getByRole("tooltip").textContent).toContain("the backbone's own token");
    fireEvent.keyDown(surface(), { key: "ArrowLeft" });
    expect(screen.getByRole("tooltip").textContent).toMatch(
      /·sataccepted draftToken id102Step1Drafted byhead 2Depth2Rank0/,
    );
    fireEvent.keyDown(surface(), { key: "Escape" });
    expect(screen.queryByRole("tooltip")).toBeNull();
  });

  it("opens under the pointer and tells who drafted the node", () => {
    const { container } = open(...STORY);
    const dog = [...container.querySelectorAll("text")].find(({ textContent }) => textContent === "·dog");
    const [, x, y, k] = /translate\((.+)px, (.+)px\) scale\((.+)\)/.exec(camera(container) ?? "")?.map(Number) ?? [];
    const shift = Number(/translate\((\S+) /.exec(dog?.parentElement?.getAttribute("transform") ?? "")?.[1]);
    const clientX = (Number(dog?.getAttribute("x")) + shift) * (k ?? 1) + (x ?? 0);
    const clientY = (Number(dog?.getAttribute("y")) - 4) * (k ?? 1) + (y ?? 0);
    fireEvent.mouseMove(surface(), { clientX, clientY });
    expect(screen.getByRole("tooltip").textContent).toMatch(
      /·dogrejected draft.*Drafted bylookup.*Rank1Path probability20.0 %/,
    );
    fireEvent.mouseMove(surface(), { clientX, clientY: clientY + 150 });
    expect(screen.queryByRole("tooltip")).toBeNull();
  });
});

describe("the tree's camera", () => {
  it("follows until the user moves it, and again when asked to", () => {
    const { store, container } = open(...STORY);
    expect(isFollowing()).toBe("true");
    fireEvent.click(screen.getByRole("button", { name: "Zoom in" }));
    expect(isFollowing()).toBe("false");
    const own = camera(container);
    act(() => store.receive(messageOf([{ text: " the", parent: -1 }], " a"), 3000));
    expect(camera(container)).toBe(own);
    fireEvent.click(screen.getByRole("button", { name: "Follow" }));
    expect(isFollowing()).toBe("true");
    expect(camera(container)).not.toBe(own);
  });

  it.each([
    ["+", {}],
    ["-", {}],
    ["0", {}],
    ["ArrowLeft", { shiftKey: true }],
    ["ArrowDown", { shiftKey: true }],
  ])("is moved by %s, and follows again by f", (key, modifiers) => {
    const { container } = open(...STORY);
    const before = camera(container);
    fireEvent.keyDown(surface(), { key, ...modifiers });
    expect(camera(container)).not.toBe(before);
    fireEvent.keyDown(surface(), { key: "f" });
    expect(camera(container)).toBe(before);
  });

  it("goes along from step to step of a paused run", () => {
    const { store, player, container } = open(...STORY);
    act(() => store.receive(messageOf([{ text: " the", parent: -1, isAccepted: true }], " a"), 3000));
    act(() => player.seek(2));
    fireEvent.keyDown(surface(), { key: "+" });
    const before = camera(container);
    act(() => player.seek(3));
    expect(camera(container)).not.toBe(before);
    act(() => player.seek(2));
    expect(camera(container)).toBe(before);
  });

  it("leaves keys alone that are not its own", () => {
    open(...STORY);
    for (const key of ["a", "Tab", "Escape"]) expect(fireEvent.keyDown(surface(), { key })).toBe(true);
    expect(fireEvent.keyDown(surface(), { key: "f", ctrlKey: true })).toBe(true);
    expect(fireEvent.keyDown(surface(), { key: "f" })).toBe(false);
  });
});
