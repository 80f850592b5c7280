import { describe, expect, test } from "vitest";
import { exportRun, fileName, importRun, MAX_FILE_BYTES, readRunFile } from "../../../src/run/exchange";
import { InvalidFileError } from "../../../src/run/guards";
import { MAX_TREES, type Run, record, startRun } from "../../../src/run/run";
import { error, finished, prefill, stepMessage, tokenMessage, tree } from "./messages";

function recorded(): Run {
  const request = {
    messages: [{ role: "user" as const, content: "<b>hi</b>" }] as [{ role: "user"; content: string }],
    max_tokens: null,
    logit_bias: { "7": -1.5 },
    speculation: { enabled: true, max_nodes: 32 },
    seed: 2 ** 60,
    tree_debug: true,
  };
  const run = startRun(request, "2026-01-31T12:00:00.123Z", "smollm2");
  record(run, prefill("The"), 100.25);
  record(run, stepMessage([" sea", " is"], " a", [" sun", "\u{1f30a}"]), 130);
  record(run, tokenMessage([" b"], { tree_debug: tree([]) }), 150);
  record(run, tokenMessage([" c"]), 150);
  return run;
}

/** A file of the run, after `change` was at it. */
// biome-ignore lint/suspicious/noExplicitAny: reaches into any place of a file.
function tampered(change: (file: any) => void): string {
  const run = recorded();
  record(run, finished(), 200);
  const file = JSON.parse(exportRun(run));
  change(file);
  return JSON.stringify(file);
}

describe("round trip", () => {
  test.each([finished({ text: "!", stop: 7 }), finished({ stop: "\n\n" }), error({ retry_after_seconds: 1.5 })])(
    "of a run that ended with $type",
    (terminal) => {
      const run = recorded();
      record(run, terminal, 200.5);
      expect(importRun(exportRun(run))).toEqual({ ...run, status: null });
    },
  );

  test("of a run that had not ended: it ends at its last step", () => {
    expect(importRun(exportRun(recorded()))).toMatchObject({ phase: "finished", finished: null, endedAt: 150 });
  });

  test("of an empty run", () => {
    const run = startRun({ prompt: "" }, "2026-01-31T12:00:00Z");
    expect(importRun(exportRun(run))).toMatchObject({ steps: [], tokens: [], endedAt: 0, model: null });
  });

  test("of a run whose oldest trees are gone: their counts stay", () => {
    const run = recorded();
    for (let i = 0; i < MAX_TREES; i += 1) record(run, stepMessage([" x"], " y"), 200 + i);
    record(run, finished(), 9999);
    const again = importRun(exportRun(run));
    expect(again.steps[1]).toMatchObject({ tree: null, drafted: { depths: [3, 1], sources: { head: 4 } } });
    expect(again).toEqual(run);
  });

  test("the file is compact and named by its time", () => {
    const json = exportRun(recorded());
    expect(json).not.toMatch(/\n/);
    expect(json).not.toContain("firstToken");
    expect(fileName(recorded())).toBe("gorgon-run-2026-01-31T12-00-00.json");
  });

  test("through a file", async () => {
    const run = await readRunFile(new Blob([exportRun(recorded())]));
    expect(run.tokens).toEqual(recorded().tokens);
  });
});

describe("what is refused, by the name of its field", () => {
  test.each([
    ["", "the file is not JSON"],
    ["{", "the file is not JSON"],
    ["null", "the file must be an object"],
    ["[]", "the file must be an object"],
    ["{}", "the file.format is missing"],
    ['{"format": "other", "version": 1, "run": {}}', 'the file.format must be "gorgon-run"'],
    ['{"format": "gorgon-run", "version": 2, "run": {}}', "the file has version 2: this page reads version 1"],
    ['{"format": "gorgon-run", "version": 1, "run": {"__proto__": {"request": {}}}}', "run.request is missing"],
  ])("%s", (json, message) => {
    expect(() => importRun(json)).toThrow(InvalidFileError);
    expect(() => importRun(json)).toThrow(message);
  });

  // biome-ignore lint/suspicious/noExplicitAny: as `tampered`.
  test.each<[string, (run: any) => void]>([
    ["run.startedAt must be a time", (run) => (run.startedAt = "<img src=x>")],
    ["run.model must be a text", (run) => (run.model = { toString: 1 })],
    ["run.steps must be a list", (run) => (run.steps = { length: 1e9 })],
    ["run.steps has 131073 entries", (run) => (run.steps = new Array(131073).fill(null))],
    ["run.steps[0] must be an object", (run) => (run.steps[0] = null)],
    ["run.steps[1].at must be a number", (run) => (run.steps[1].at = "130")],
    ["run.steps[1].at must be a number", (run) => (run.steps[1].at = null)],
    ["run.steps[1].at must be at least 0", (run) => (run.steps[1].at = -1)],
    ["run.steps[1].at goes back in time, from 100.25 to 99", (run) => (run.steps[1].at = 99)],
    ["run.steps[1].numAccepted is more than", (run) => (run.steps[1].numAccepted = 4)],
    ["run.steps[1].numPasses is more than", (run) => (run.steps[1].numPasses = 4)],
    ["run.steps[1].numNodes must be a whole number", (run) => (run.steps[1].numNodes = 1.5)],
    ["run.steps[1].tree has 4 nodes and a root, numNodes is 4", (run) => (run.steps[1].numNodes = 4)],
    ["run.steps[1].tokens[0].id must be at least 0", (run) => (run.steps[1].tokens[0].id = -1)],
    ["run.steps[1].tokens[0].text must be a text", (run) => (run.steps[1].tokens[0].text = ["a"])],
    ["run.steps[1].tokens[0].draft.depth must be at least 1", (run) => (run.steps[1].tokens[0].draft.depth = 0)],
    ["run.steps[1].tokens[0].draft.probability must be", (run) => (run.steps[1].tokens[0].draft.probability = 2)],
    ["run.steps[1].tokens has 8193 entries", (run) => (run.steps[1].tokens = new Array(8193).fill(0))],
    ["run.steps[1].tree.parents[1] must be below 1", (run) => (run.steps[1].tree.parents[1] = 1)],
    ["run.steps[1].tree.parents[0] must be at least -1", (run) => (run.steps[1].tree.parents[0] = -2)],
    ["run.steps[1].tree.depths[1] must be 2", (run) => (run.steps[1].tree.depths[1] = 1e9)],
    ["run.steps[1].tree.ranks has 3 entries, candidates has 4", (run) => run.steps[1].tree.ranks.pop()],
    ["run.steps[1].tree.accepted[2] does not go on", (run) => (run.steps[1].tree.accepted[2] = true)],
    [
      "run.steps[1].tree.candidates has 4097 entries",
      (run) => (run.steps[1].tree.candidates = new Array(4097).fill("")),
    ],
    ["run.steps[1].tree.step_seconds.draft is missing", (run) => delete run.steps[1].tree.step_seconds.draft],
    ["run.steps[1].seconds.verify must be at least 0", (run) => (run.steps[1].seconds.verify = -1)],
    ["run.steps[2].tree is empty", (run) => (run.steps[2].tree = tree([]))],
    ["run.steps[1].drafted.depths has 65 entries", (run) => (run.steps[1].drafted.depths = new Array(65).fill(1))],
    ["run.endedAt is before the last step's 150", (run) => (run.endedAt = 10)],
    ["run.error stands beside run.finished", (run) => (run.error = error())],
    ["run.finished.finish_reason must be", (run) => (run.finished.finish_reason = "tired")],
    ["run.finished.metrics.speculative_decoding is missing", (run) => delete run.finished.metrics.speculative_decoding],
    ["run.request.messages[0].role must be", (run) => (run.request.messages[0].role = "root")],
    ["run.request.messages is empty", (run) => (run.request.messages = [])],
    ["run.request.logit_bias.7 must be a number", (run) => (run.request.logit_bias["7"] = "x")],
  ])("%s", (message, change) => {
    const json = tampered((file) => change(file.run));
    expect(() => importRun(json)).toThrow(InvalidFileError);
    expect(() => importRun(json)).toThrow(message);
  });

  test("numbers that are none in JSON's eyes", () => {
    const json = tampered(() => undefined).replace('"at":130', '"at":1e999');
    expect(() => importRun(json)).toThrow("run.steps[1].at must be a number");
  });

  test("more trees than a run keeps", () => {
    const json = tampered((file) => {
      file.run.steps = new Array(MAX_TREES + 1).fill(file.run.steps[1]);
    });
    expect(() => importRun(json)).toThrow(`run.steps[${MAX_TREES}].tree is one too many`);
  });

  test("a file that is too large, unread", async () => {
    const file = { size: MAX_FILE_BYTES + 1, text: () => Promise.reject(new Error("was read")) } as unknown as Blob;
    await expect(readRunFile(file)).rejects.toThrow(`at most ${MAX_FILE_BYTES} are read`);
  });
});

test("what a file says beyond the format is left out", () => {
  const run = importRun(
    tampered((file) => {
      file.run.evil = "x";
      file.run.steps[1].tree.evil = "x";
      file.run.steps[1].tokens[0].step = 99;
    }),
  );
  expect(JSON.stringify(run)).not.toContain("evil");
  expect(run.tokens.map((token) => token.step)).toEqual([0, 1, 1, 1, 2, 3]);
});

test("counts of a tree are the tree's own, whatever the file says", () => {
  const run = importRun(tampered((file) => (file.run.steps[1].drafted = { depths: [9], ranks: [9], sources: {} })));
  expect(run.steps[1]?.drafted).toEqual({ depths: [3, 1], ranks: [2, 1, 1], sources: { head: 4 } });
});
