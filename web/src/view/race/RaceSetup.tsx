import type { LaneName } from "../../run/race";
import type { Race } from "../../run/raceRunner";
import { useVersion } from "../hooks";

interface Props {
  race: Race | null;
  first: LaneName;
  isTogether: boolean;
  onSwap: () => void;
  onTogether: (isTogether: boolean) => void;
  onStart: () => void;
}

const NO_RACE = { version: () => 0, subscribe: () => () => undefined };

/** In which order the lanes go; start and stop. */
export function RaceSetup({ race, first, isTogether, onSwap, onTogether, onStart }: Props) {
  useVersion(race ?? NO_RACE);
  const isRunning = race?.stage === "running";
  const second = first === "plain" ? "speculative" : "plain";
  return (
    <div className="race-setup">
      {isRunning ? (
        <button type="button" className="button" onClick={() => race.stop()}>
          Stop
        </button>
      ) : (
        <button type="button" className="button button--primary" onClick={onStart}>
          {race === null ? "Start the race" : "Race again"}
        </button>
      )}
      <fieldset className="race-modes" disabled={isRunning}>
        <legend className="visually-hidden">How the lanes run</legend>
        <label>
          <input type="radio" name="race-mode" checked={!isTogether} onChange={() => onTogether(false)} />
          One after the other
        </label>
        <label>
          <input type="radio" name="race-mode" checked={isTogether} onChange={() => onTogether(true)} />
          Together
        </label>
      </fieldset>
      {isTogether ? (
        <p className="race-note">Started together on one engine, each slows the other.</p>
      ) : (
        <p className="race-note">
          First {first}, then {second}: neither slows the other. The first may pay for a cold start.{" "}
          <button type="button" className="race-swap" disabled={isRunning} onClick={onSwap}>
            Swap the order
          </button>
        </p>
      )}
    </div>
  );
}
