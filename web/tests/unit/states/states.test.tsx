import { act, cleanup, fireEvent, render, screen } from "@testing-library/react";
import { afterEach, expect, test, vi } from "vitest";
import { record, startRun } from "../../../src/run/run";
import type { ServerState } from "../../../src/server/server";
import { KeyPanel } from "../../../src/view/KeyPanel";
import { statusOf } from "../../../src/view/states/RunStatus";
import { ServerBadge } from "../../../src/view/states/ServerBadge";
import { prefill, status } from "../run/messages";

afterEach(cleanup);

const STATE: ServerState = {
  phase: "ready",
  progress: null,
  stage: null,
  needsKey: false,
  reason: null,
  models: ["smollm2"],
  engines: [],
  gatewayVersion: "0.1.0",
};

test.each<[Partial<ServerState>, string]>([
  [{}, "smollm2"],
  [{ needsKey: true }, "an API key is needed"],
  [{ phase: "loading", progress: 0.42, stage: "reading the model" }, "the model loads 42 % (reading the model) …"],
  [{ phase: "loading" }, "the model loads …"],
  [{ phase: "failed" }, "the engine has failed: see its log"],
  [{ phase: "unreachable" }, "the server does not answer"],
  [{ phase: "refused", reason: "not from there" }, "not from there"],
])("the server as %j", (change, words) => {
  render(<ServerBadge state={{ ...STATE, ...change }} />);
  expect(screen.getByRole("status").textContent).toBe(words);
});

test("loading is a bar as well", () => {
  render(<ServerBadge state={{ ...STATE, phase: "loading", progress: 0.42 }} />);
  expect(screen.getByRole("progressbar", { name: "Loading" }).getAttribute("value")).toBe("0.42");
});

test.each([
  [status("loading", { progress: 0.4 }), "The model loads 40 % …"],
  [status("queued", { position: 3 }), "Waiting: 3 in front of you …"],
  [status("queued", { position: 0 }), "Waiting for a free slot …"],
  [status("prefill", { progress: 0.5 }), "Reading the prompt 50 % …"],
  [status("resuming"), "An engine was lost: another one goes on …"],
  [prefill("a"), ""],
])("a run after %j", (message, words) => {
  const run = startRun({ prompt: "x" }, "2026-01-31T12:00:00Z");
  expect(statusOf(run)).toBe("Connecting …");
  record(run, message, 1);
  expect(statusOf(run)).toBe(words);
});

test("what is wrong with a key is said beside its field", async () => {
  const submit = vi.fn(async (key: string) => (key === "good" ? null : "no key"));
  render(<KeyPanel submit={submit} />);
  const field = screen.getByLabelText("This gateway asks for an API key:");
  for (const [key, problem] of [
    ["bad key", "no key"],
    ["good", ""],
  ] as const) {
    fireEvent.change(field, { target: { value: key } });
    await act(async () => {
      fireEvent.click(screen.getByRole("button"));
    });
    expect(submit).toHaveBeenLastCalledWith(key);
    expect([field.getAttribute("aria-invalid"), screen.getByRole("alert").textContent]).toEqual([
      String(problem !== ""),
      problem,
    ]);
  }
});
