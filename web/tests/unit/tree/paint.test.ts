import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { paintScene } from "../../../src/tree/paint";
import { TreeModel } from "../../../src/tree/scene";
import { generatedRun } from "./runs";

const PALETTE = {
  text: "text",
  surface: "surface",
  border: "border",
  accent: "accent",
  accepted: "accepted",
  rejected: "rejected",
  draft: "draft",
};

/** What jsdom has no canvas for: keeps the texts and where they were painted, relative to the shown step. */
class Recorder {
  readonly texts: { text: string; x: number; y: number; colour: string }[] = [];
  readonly strokes: { path: string | undefined; colour: string; alpha: number }[] = [];
  fillStyle = "";
  strokeStyle = "";
  globalAlpha = 1;
  #x = 0;
  readonly #saved: { x: number; alpha: number }[] = [];

  save() {
    this.#saved.push({ x: this.#x, alpha: this.globalAlpha });
  }
  restore() {
    const saved = this.#saved.pop();
    this.#x = saved?.x ?? 0;
    this.globalAlpha = saved?.alpha ?? 1;
  }
  translate(x: number) {
    this.#x += x;
  }
  fillText(text: string, x: number, y: number) {
    this.texts.push({ text, x: x + this.#x, y, colour: this.fillStyle });
  }
  stroke(path?: { d: string }) {
    this.strokes.push({ path: path?.d, colour: this.strokeStyle, alpha: this.globalAlpha });
  }
  setTransform() {}
  clearRect() {}
  beginPath() {}
  moveTo() {}
  lineTo() {}
  roundRect() {}
  fill() {}
  setLineDash() {}
}

beforeEach(() => {
  vi.stubGlobal(
    "Path2D",
    class {
      constructor(readonly d: string) {}
    },
  );
});
afterEach(() => {
  vi.unstubAllGlobals();
});

describe("paintScene", () => {
  it("paints every label in its place and colour, beside the step's root", () => {
    const scene = new TreeModel(generatedRun(1, 30)).scene(30, Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY);
    const recorder = new Recorder();
    const context = recorder as unknown as CanvasRenderingContext2D;
    paintScene(context, scene, { x: 0, y: 0, k: 1 }, { width: 800, height: 400 }, 2, PALETTE, "monospace");
    const { current, anchor } = scene;
    if (current === null) throw new Error("the run has no tree");
    const expected = [
      ...current.rejected.map((node) => ({ ...node, x: current.x + node.x, colour: "rejected" })),
      ...scene.tokens.map((token) => ({ ...token, colour: token.isDraft && token.isNew ? "surface" : "text" })),
    ].map(({ label, x, y, width, colour }) => ({ text: label, x: x + width / 2 - anchor, y: y + 0.5, colour }));
    expect(recorder.texts).toEqual(expected);
    expect(recorder.globalAlpha).toBe(1);
  });

  it("strokes what fades fainter than what is shown", () => {
    const scene = new TreeModel(generatedRun(1, 30)).scene(30, 0, 0);
    const recorder = new Recorder();
    const context = recorder as unknown as CanvasRenderingContext2D;
    paintScene(context, scene, { x: 0, y: 0, k: 1 }, { width: 800, height: 400 }, 1, PALETTE, "monospace");
    const faded = recorder.strokes.slice(0, scene.fading.length);
    const shown = recorder.strokes.slice(scene.fading.length).filter(({ colour }) => colour === "rejected");
    expect(faded.every(({ alpha, colour }) => alpha < 0.24 && colour === "rejected")).toBe(true);
    expect(shown.length).toBeGreaterThan(2);
    expect(shown.every(({ alpha }) => alpha > 0.24)).toBe(true);
  });
});
