import { expect, test } from "vitest";
import {
  DEFAULTS,
  drawSeed,
  keepSettings,
  problemsOf,
  readSettings,
  requestOf,
  type Settings,
} from "../../../src/session/settings";
import { MemoryStorage } from "./storage";

const settings = (change: Partial<Settings> = {}): Settings => ({ ...DEFAULTS, ...change });

test.each<[keyof Settings, string, RegExp]>([
  ["temperature", "", /number/],
  ["temperature", "warm", /number/],
  ["temperature", "-0.1", /0 to 100/],
  ["temperature", "Infinity", /number/],
  ["topP", "0", /above 0/],
  ["topP", "1.01", /0 to 1/],
  ["topK", "1.5", /whole/],
  ["topK", "-1", /at least 0/],
  ["maxTokens", "0", /at least 1/],
  ["maxTokens", "1e99", /at least 1|whole/],
  ["seed", "-1", /at least 0/],
  ["seed", "9007199254740993", /at least 0|whole/],
  ["maxNodes", "0", /1 to 128/],
  ["maxNodes", "129", /1 to 128/],
  ["stop", "x\n".repeat(65), /64 lines/],
  ["stop", "x".repeat(1025), /1024 characters/],
])("%s = %j is refused beside its field", (name, value, problem) => {
  const problems = problemsOf(settings({ [name]: value }));
  expect(Object.keys(problems)).toEqual([name]);
  expect(problems[name]).toMatch(problem);
});

test("the defaults, and fields that may be empty, are right", () => {
  expect(problemsOf(DEFAULTS)).toEqual({});
  expect(problemsOf(settings({ maxTokens: "", seed: " ", maxNodes: "" }))).toEqual({});
});

test("a chat carries the system message and what was said before", () => {
  const turns = [
    { role: "user", content: "hello" },
    { role: "assistant", content: "hi" },
  ] as const;
  const request = requestOf(settings({ system: "be brief" }), turns, "why?", () => 5);
  expect(request.messages).toEqual([
    { role: "system", content: "be brief" },
    ...turns,
    { role: "user", content: "why?" },
  ]);
  expect(request).toMatchObject({ seed: 5, tree_debug: true, max_tokens: 256, temperature: 0 });
  expect(request.prompt).toBeUndefined();
  expect(requestOf(settings({ system: "  " }), [], "why?").messages).toEqual([{ role: "user", content: "why?" }]);
});

test("a completion carries the text as it is typed", () => {
  const request = requestOf(settings({ mode: "completion", system: "be brief" }), [], " def f():\n");
  expect([request.prompt, request.messages]).toEqual([" def f():\n", undefined]);
});

test("every setting is in the request", () => {
  const request = requestOf(
    settings({
      maxTokens: "",
      temperature: "0.8",
      topP: "0.9",
      topK: "40",
      seed: "12",
      stop: "END\n\n two words ",
      speculate: false,
      maxNodes: "16",
      acceptance: "typical",
    }),
    [],
    "x",
  );
  expect(request).toMatchObject({
    max_tokens: null,
    temperature: 0.8,
    top_p: 0.9,
    top_k: 40,
    seed: 12,
    stop: ["END", " two words "],
    speculation: { enabled: false, max_nodes: 16, acceptance: "typical" },
  });
});

test("drawn seeds are whole, exact and not alike", () => {
  const seeds = new Set(Array.from({ length: 100 }, drawSeed));
  expect(seeds.size).toBe(100);
  for (const seed of seeds) expect(Number.isSafeInteger(seed) && seed >= 0).toBe(true);
  expect(Math.max(...seeds)).toBeGreaterThan(2 ** 32);
});

test("settings are kept between visits", () => {
  const storage = new MemoryStorage();
  const chosen = settings({ mode: "completion", temperature: "0.5", speculate: false });
  keepSettings(storage, chosen);
  expect(readSettings(storage)).toEqual(chosen);
});

test.each<[string, string]>([
  ["nothing", ""],
  ["no JSON", "{"],
  ["null", "null"],
  ["a list", "[1, 2]"],
  ["wrong types", '{"temperature": 0.5, "speculate": "yes", "mode": 3}'],
  ["values that are none", '{"temperature": "hot", "acceptance": "lucky", "mode": "poem"}'],
])("%s in the storage gives the defaults", (_, kept) => {
  const storage = new MemoryStorage();
  storage.entries.set("gorgon-settings", kept);
  expect(readSettings(storage)).toEqual(DEFAULTS);
});

test("what fits is kept beside what does not", () => {
  const storage = new MemoryStorage();
  storage.entries.set("gorgon-settings", '{"temperature": "0.5", "topP": "7", "colour": "red"}');
  expect(readSettings(storage)).toEqual(settings({ temperature: "0.5" }));
});

test("a storage that takes nothing is no reason to stop", () => {
  const full = {
    setItem: () => {
      throw new DOMException("full", "QuotaExceededError");
    },
  };
  const forbidden = {
    getItem: () => {
      throw new DOMException("no", "SecurityError");
    },
  };
  keepSettings(full, DEFAULTS);
  expect(readSettings(forbidden)).toEqual(DEFAULTS);
});
