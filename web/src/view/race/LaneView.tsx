import { clocksOf, outcomeOf } from "../../run/race";
import type { Lane, Race } from "../../run/raceRunner";
import type { Run } from "../../run/run";
import { useVersion } from "../hooks";
import { Clock } from "./Clock";
import { LaneText } from "./LaneText";

interface Props {
  race: Race;
  lane: Lane;
  rival: Lane;
}

const TITLES = { plain: "Plain decoding", speculative: "Speculative decoding" } as const;

/** One lane: its clocks, its speed, its text as it comes. */
export function LaneView({ race, lane, rival }: Props) {
  useVersion(lane.store);
  useVersion(rival.store);
  const { run } = lane.store;
  const state = laneState(race, lane);
  const clocks = clocksOf(run);
  const length = expectedLength(run, rival.store.run);
  return (
    <article className={`race-lane race-lane--${lane.name}`} aria-label={TITLES[lane.name]}>
      <header className="race-lane__head">
        <h3>{TITLES[lane.name]}</h3>
        <span className="race-lane__state">{STATE_WORDS[state]}</span>
      </header>
      <progress
        className="race-lane__progress"
        max={length ?? 1}
        value={length === null ? 0 : Math.min(clocks.numTokens, length)}
        aria-label={`${TITLES[lane.name]}: ${clocks.numTokens} tokens`}
      />
      <dl className="race-clocks">
        <Clock
          name="First token"
          isRunning={state === "waiting-for-token"}
          since={lane.sentAt}
          value={clocks.firstToken}
        />
        <Clock
          name="Decoding"
          isRunning={state === "decoding"}
          since={lane.sentAt === null || clocks.firstToken === null ? null : lane.sentAt + clocks.firstToken}
          value={clocks.decode}
        />
        <Figure name="Tokens" value={String(clocks.numTokens)} />
        <Figure name="Speed, wall clock" value={speed(clocks.tokensPerSecond)} />
        <Figure name="Speed, engine" value={speed(run.finished?.metrics.tokens_per_second ?? null)} />
      </dl>
      {run.error !== null && (
        <p className="race-problem" role="alert">
          {run.error.message} <code>{run.error.code}</code>
        </p>
      )}
      <LaneText run={run} label={`${TITLES[lane.name]}: the answer`} />
    </article>
  );
}

function Figure({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

type LaneState = "waiting" | "waiting-for-token" | "decoding" | "done" | "failed" | "stopped" | "not-run";

const STATE_WORDS: Record<LaneState, string> = {
  waiting: "waits for its turn",
  "waiting-for-token": "reading the prompt",
  decoding: "decoding",
  done: "done",
  failed: "failed",
  stopped: "stopped",
  "not-run": "not run",
};

function laneState(race: Race, lane: Lane): LaneState {
  const { run } = lane.store;
  const outcome = outcomeOf(run);
  if (outcome === "complete") return "done";
  if (outcome === "failed" && race.stage !== "stopped") return "failed";
  if (lane.sentAt === null) return race.stage === "running" ? "waiting" : "not-run";
  if (outcome !== "running" || race.stage !== "running") return "stopped";
  return run.tokens.length === 0 ? "waiting-for-token" : "decoding";
}

/** How long the answer gets: as long as the rival's, once that is known; else the most that was asked for. */
function expectedLength(run: Run, rival: Run): number | null {
  if (outcomeOf(run) === "complete") return run.tokens.length;
  if (outcomeOf(rival) === "complete") return rival.tokens.length;
  return run.request.max_tokens ?? null;
}

function speed(tokensPerSecond: number | null): string {
  return tokensPerSecond === null ? "–" : `${tokensPerSecond.toFixed(1)} tokens/s`;
}
