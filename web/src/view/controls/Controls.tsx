// Everything that can be set for the next generation.

import { DEFAULTS, type Problems, type Settings } from "../../session/settings";
import { Area, Choice, Field } from "./fields";
import "./controls.css";

interface Props {
  settings: Settings;
  problems: Problems;
  change: (settings: Settings) => void;
}

type TextName = "maxTokens" | "temperature" | "topP" | "topK" | "seed" | "maxNodes";
const MODES = { chat: "Chat", completion: "Completion" } as const;
const RULES = {
  lossless: "lossless: the tokens of plain decoding",
  rejection: "rejection: their distribution",
  typical: "typical: changes the output",
} as const;

export function Controls({ settings, problems, change }: Props) {
  const set = <Name extends keyof Settings>(name: Name, value: Settings[Name]) =>
    change({ ...settings, [name]: value });
  const field = (name: TextName, label: string, hint: string, empty?: string) => (
    <Field
      label={label}
      value={settings[name]}
      problem={problems[name]}
      hint={hint}
      empty={empty}
      change={(value) => set(name, value)}
    />
  );
  return (
    <div className="controls">
      <ModeSwitch mode={settings.mode} choose={(mode) => set("mode", mode)} />
      <details className="controls-more">
        <summary>
          Settings <span className="controls-summary">{summaryOf(settings)}</span>
        </summary>
        {settings.mode === "chat" && (
          <Area label="System message" value={settings.system} change={(value) => set("system", value)} />
        )}
        <fieldset>
          <legend>Sampling</legend>
          <div className="controls-grid">
            {field("maxTokens", "Max tokens", "of the answer", "to the end")}
            {field("temperature", "Temperature", "0: greedy")}
            {field("seed", "Seed", "repeats a text", "a new one")}
            {field("topP", "Top p", "1: all")}
            {field("topK", "Top k", "0: all")}
          </div>
          <Area
            label="Stop strings, one a line"
            value={settings.stop}
            problem={problems.stop}
            change={(value) => set("stop", value)}
          />
        </fieldset>
        <fieldset>
          <legend>Speculation</legend>
          <div className="controls-speculation">
            <label className="controls-check">
              <input
                type="checkbox"
                checked={settings.speculate}
                onChange={(event) => set("speculate", event.target.checked)}
              />
              Draft and verify trees
            </label>
            {field("maxNodes", "Max nodes", "rows of a pass", "as many as pay")}
          </div>
          <Choice
            label="Acceptance"
            value={settings.acceptance}
            options={RULES}
            change={(value) => set("acceptance", value)}
          />
        </fieldset>
        <button type="button" className="button" onClick={() => change({ ...DEFAULTS, mode: settings.mode })}>
          Back to the defaults
        </button>
      </details>
    </div>
  );
}

function ModeSwitch({ mode, choose }: { mode: Settings["mode"]; choose: (mode: Settings["mode"]) => void }) {
  return (
    <fieldset className="controls-modes">
      <legend className="visually-hidden">What the prompt is</legend>
      {(Object.keys(MODES) as Settings["mode"][]).map((name) => (
        <label key={name}>
          <input
            type="radio"
            name="mode"
            className="visually-hidden"
            checked={mode === name}
            onChange={() => choose(name)}
          />
          <span>{MODES[name]}</span>
        </label>
      ))}
    </fieldset>
  );
}

/** The settings that matter most, in a few words: "greedy · 256 tokens · speculating". */
function summaryOf({ temperature, maxTokens, speculate, maxNodes }: Settings): string {
  const heat = Number(temperature) === 0 ? "greedy" : `T ${temperature}`;
  const length = maxTokens.trim() === "" ? "no limit" : `${maxTokens} tokens`;
  const nodes = maxNodes.trim() === "" ? "trees" : `trees of ${maxNodes}`;
  return [heat, length, speculate ? nodes : "no speculation"].join(" · ");
}
