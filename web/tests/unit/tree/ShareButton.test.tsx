import { cleanup, fireEvent, render, screen, waitFor } from "@testing-library/react";
import { afterEach, describe, expect, it, vi } from "vitest";
import { Player } from "../../../src/run/player";
import { startRun } from "../../../src/run/run";
import { RunStore } from "../../../src/run/store";
import { ShareButton } from "../../../src/view/tree/ShareButton";
import { generatedRun } from "./runs";

afterEach(() => {
  cleanup();
  vi.restoreAllMocks();
});

function open(run = generatedRun(1, 10)) {
  const store = new RunStore(run);
  const player = new Player(() => run.steps.length);
  render(<ShareButton store={store} player={player} />);
  return player;
}

describe("ShareButton", () => {
  it("saves the shown step as SVG", async () => {
    const blobs: Blob[] = [];
    URL.createObjectURL = (blob: Blob) => {
      blobs.push(blob);
      return "blob:here";
    };
    const names: string[] = [];
    vi.spyOn(HTMLAnchorElement.prototype, "click").mockImplementation(function (this: HTMLAnchorElement) {
      names.push(this.download);
    });
    open().seek(4);
    fireEvent.click(screen.getByRole("button", { name: "SVG" }));
    await waitFor(() => expect(names).toEqual(["gorgon-2026-11-25-step-3.svg"]));
    expect(blobs[0]?.type).toBe("image/svg+xml");
    expect(blobs[0]?.size).toBeGreaterThan(5000);
  });

  it("says why a picture could not be made", async () => {
    URL.createObjectURL = () => "blob:here";
    URL.revokeObjectURL = () => {};
    Image.prototype.decode = () => Promise.reject(new Error("The source image cannot be decoded."));
    open();
    fireEvent.click(screen.getByRole("button", { name: "PNG" }));
    expect((await screen.findByRole("alert")).textContent).toBe("The source image cannot be decoded.");
  });

  it("has nothing to save before the first step", () => {
    open(startRun({ prompt: "x" }, ""));
    for (const button of screen.getAllByRole<HTMLButtonElement>("button")) expect(button.disabled).toBe(true);
  });
});
