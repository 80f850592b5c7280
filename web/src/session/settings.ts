// What a person sets for the next generation: checked field by field, kept between visits.

import type { ChatMessage, GenerateRequest } from "../wire/messages";

/** As typed: a field that is being edited may be wrong for a while. */
export interface Settings {
  mode: "chat" | "completion";
  system: string;
  maxTokens: string;
  temperature: string;
  topP: string;
  topK: string;
  seed: string;
  stop: string;
  speculate: boolean;
  maxNodes: string;
  acceptance: "lossless" | "rejection" | "typical";
}

export const DEFAULTS: Settings = {
  mode: "chat",
  system: "",
  maxTokens: "256",
  temperature: "0",
  topP: "1",
  topK: "0",
  seed: "",
  stop: "",
  speculate: true,
  maxNodes: "",
  acceptance: "lossless",
};

export type Problems = Partial<Record<keyof Settings, string>>;

interface Range {
  low: number;
  high: number;
  isWhole: boolean;
  /** What an empty field means; null: it may not be empty. */
  empty: string | null;
}

const RANGES: Partial<Record<keyof Settings, Range>> = {
  maxTokens: { low: 1, high: 2 ** 31 - 1, isWhole: true, empty: "as many as the context holds" },
  temperature: { low: 0, high: 100, isWhole: false, empty: null },
  topP: { low: 0, high: 1, isWhole: false, empty: null },
  topK: { low: 0, high: 2 ** 31 - 1, isWhole: true, empty: null },
  seed: { low: 0, high: Number.MAX_SAFE_INTEGER, isWhole: true, empty: "a new one each time" },
  maxNodes: { low: 1, high: 128, isWhole: true, empty: "as many as pay" },
};

const MAX_STOPS = 64;
const MAX_STOP_LENGTH = 1024;

/** What is wrong, by field; nothing: a request can be made. */
export function problemsOf(settings: Settings): Problems {
  const problems: Problems = {};
  for (const [name, range] of Object.entries(RANGES) as [keyof Settings, Range][]) {
    const problem = problemOf(String(settings[name]).trim(), range);
    if (problem !== null) problems[name] = problem;
  }
  if (problems.topP === undefined && Number(settings.topP) === 0) problems.topP = "must be above 0: 1 keeps everything";
  if (stopsOf(settings).length > MAX_STOPS) problems.stop = `must be at most ${MAX_STOPS} lines`;
  if (stopsOf(settings).some((stop) => stop.length > MAX_STOP_LENGTH)) {
    problems.stop = `must be at most ${MAX_STOP_LENGTH} characters a line`;
  }
  return problems;
}

function problemOf(text: string, { low, high, isWhole, empty }: Range): string | null {
  if (text === "") return empty === null ? "must be a number" : null;
  const value = Number(text);
  if (!Number.isFinite(value)) return "must be a number";
  if (isWhole && !Number.isInteger(value)) return "must be a whole number";
  if (value < low || value > high) return high < 2 ** 31 - 1 ? `must be ${low} to ${high}` : `must be at least ${low}`;
  return null;
}

export interface Turn {
  role: "user" | "assistant";
  content: string;
}

/**
 * The request of a prompt behind earlier turns. A seed is drawn here where none was set: with it an answer can go on
 * after a lost connection, and be repeated.
 */
export function requestOf(
  settings: Settings,
  turns: readonly Turn[],
  prompt: string,
  draw: () => number = drawSeed,
): GenerateRequest {
  const request: GenerateRequest = {
    type: "generate",
    max_tokens: optional(settings.maxTokens),
    temperature: Number(settings.temperature),
    top_p: Number(settings.topP),
    top_k: Number(settings.topK),
    seed: optional(settings.seed) ?? draw(),
    speculation: {
      enabled: settings.speculate,
      max_nodes: optional(settings.maxNodes),
      acceptance: settings.acceptance,
    },
    tree_debug: true,
  };
  const stop = stopsOf(settings);
  if (stop.length > 0) request.stop = stop;
  if (settings.mode === "completion") return { ...request, prompt };
  const system: ChatMessage[] = settings.system.trim() === "" ? [] : [{ role: "system", content: settings.system }];
  const messages = [...system, ...turns, { role: "user" as const, content: prompt }];
  return { ...request, messages: messages as [ChatMessage, ...ChatMessage[]] };
}

function stopsOf({ stop }: Settings): string[] {
  return stop.split("\n").filter((line) => line !== "");
}

export function drawSeed(): number {
  const [high = 0, low = 0] = crypto.getRandomValues(new Uint32Array(2));
  return (high & 0x1fffff) * 2 ** 32 + low;
}

function optional(text: string): number | null {
  return text.trim() === "" ? null : Number(text);
}

const STORAGE_KEY = "gorgon-settings";

/** What was kept; fields that do not fit (an older page's) are the defaults. */
export function readSettings(storage: Pick<Storage, "getItem">): Settings {
  try {
    const kept: unknown = JSON.parse(storage.getItem(STORAGE_KEY) ?? "{}");
    if (typeof kept !== "object" || kept === null) return DEFAULTS;
    const settings = { ...DEFAULTS };
    for (const name of Object.keys(DEFAULTS) as (keyof Settings)[]) {
      const value = (kept as Record<string, unknown>)[name];
      if (typeof value === typeof DEFAULTS[name]) Object.assign(settings, { [name]: value });
    }
    if (settings.mode !== "completion") settings.mode = "chat";
    if (!["lossless", "rejection", "typical"].includes(settings.acceptance)) settings.acceptance = "lossless";
    const wrong = Object.keys(problemsOf(settings)) as (keyof Settings)[];
    for (const name of wrong) Object.assign(settings, { [name]: DEFAULTS[name] });
    return settings;
  } catch {
    return DEFAULTS;
  }
}

export function keepSettings(storage: Pick<Storage, "setItem">, settings: Settings): void {
  try {
    storage.setItem(STORAGE_KEY, JSON.stringify(settings));
  } catch {
    // Full or forbidden: they hold for this visit.
  }
}
