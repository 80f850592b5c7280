import { cleanup, fireEvent, render, screen } from "@testing-library/react";
import { useState } from "react";
import { afterEach, expect, test, vi } from "vitest";
import { DEFAULTS, problemsOf, type Settings } from "../../../src/session/settings";
import { Controls } from "../../../src/view/controls/Controls";

afterEach(cleanup);

function Form({ changed }: { changed: (settings: Settings) => void }) {
  const [settings, setSettings] = useState(DEFAULTS);
  const change = (next: Settings) => {
    changed(next);
    setSettings(next);
  };
  return <Controls settings={settings} problems={problemsOf(settings)} change={change} />;
}

function controls() {
  const changed = vi.fn<(settings: Settings) => void>();
  render(<Form changed={changed} />);
  return changed;
}

test("what is wrong stands beside its field, and goes when it is right", () => {
  controls();
  const field = screen.getByLabelText("Temperature");
  fireEvent.change(field, { target: { value: "hot" } });
  const note = document.getElementById(field.getAttribute("aria-describedby") ?? "");
  expect([field.getAttribute("aria-invalid"), note?.textContent]).toEqual(["true", "must be a number"]);
  fireEvent.change(field, { target: { value: "0.7" } });
  expect([field.getAttribute("aria-invalid"), note?.textContent]).toEqual(["false", "0: greedy"]);
});

test.each<[string, Partial<Settings>]>([
  ["Max tokens", { maxTokens: "7" }],
  ["Seed", { seed: "7" }],
  ["Top p", { topP: "7" }],
  ["Top k", { topK: "7" }],
  ["Max nodes", { maxNodes: "7" }],
  ["System message", { system: "7" }],
  ["Stop strings, one a line", { stop: "7" }],
])("%s", (label, change) => {
  const changed = controls();
  fireEvent.change(screen.getByLabelText(label), { target: { value: "7" } });
  expect(changed).toHaveBeenCalledWith({ ...DEFAULTS, ...change });
});

test("mode, speculation and rule", () => {
  const changed = controls();
  fireEvent.click(screen.getByLabelText("Completion"));
  expect(screen.queryByLabelText("System message")).toBeNull();
  fireEvent.click(screen.getByLabelText("Draft and verify trees"));
  fireEvent.change(screen.getByLabelText("Acceptance"), { target: { value: "typical" } });
  const chosen = { ...DEFAULTS, mode: "completion", speculate: false, acceptance: "typical" };
  expect(changed).toHaveBeenLastCalledWith(chosen);
  expect(screen.getByText("greedy · 256 tokens · no speculation")).toBeDefined();
  fireEvent.click(screen.getByRole("button", { name: "Back to the defaults" }));
  expect(changed).toHaveBeenLastCalledWith({ ...DEFAULTS, mode: "completion" });
});
