import { useEffect, useState } from "react";
import { drawSeed, type LaneName, reasonToDiffer, resultOf } from "../../run/race";
import { Race } from "../../run/raceRunner";
import type { Generate } from "../../wire/generate";
import type { GenerateRequest } from "../../wire/messages";
import { useVersion } from "../hooks";
import { LaneView } from "./LaneView";
import { RaceSetup } from "./RaceSetup";
import { ResultView } from "./ResultView";
import "./race.css";

interface Props {
  /** What is asked; null: nothing to ask yet. */
  request: () => GenerateRequest | null;
  generate: Generate;
  model: string | null;
}

/** The same request without speculation and with it, side by side. */
export function RacePanel({ request, generate, model }: Props) {
  const [race, setRace] = useState<Race | null>(null);
  const [first, setFirst] = useState<LaneName>("plain");
  const [isTogether, setIsTogether] = useState(false);
  const [problem, setProblem] = useState<string | null>(null);

  // What was begun here ends with the panel.
  useEffect(() => () => race?.stop(), [race]);

  const start = () => {
    const asked = request();
    setProblem(asked === null ? "Write a prompt first: both lanes answer the same one." : null);
    if (asked === null) return;
    const [high = 0, low = 0] = crypto.getRandomValues(new Uint32Array(2));
    const settings = { request: asked, seed: drawSeed([high, low]), model, first, isTogether };
    const environment = { generate, now: () => performance.now(), date: () => new Date().toISOString() };
    const next = new Race(settings, environment);
    setRace(next);
    void next.run();
  };

  return (
    <section className="race" aria-label="Race">
      <RaceSetup
        race={race}
        first={first}
        isTogether={isTogether}
        onSwap={() => setFirst(first === "plain" ? "speculative" : "plain")}
        onTogether={setIsTogether}
        onStart={start}
      />
      {problem !== null && (
        <p className="race-problem" role="alert">
          {problem}
        </p>
      )}
      {race === null ? <Introduction /> : <RaceView race={race} />}
    </section>
  );
}

function Introduction() {
  return (
    <p className="race-introduction">
      The same prompt, the same seed, answered twice: without speculation and with it. Both clocks run here, in the
      browser, and the answers are compared token by token.
    </p>
  );
}

function RaceView({ race }: { race: Race }) {
  useVersion(race);
  const [plain, speculative] = [race.lane("plain"), race.lane("speculative")];
  const result =
    race.stage === "over" ? resultOf({ plain: plain.store.run, speculative: speculative.store.run }) : null;
  return (
    <>
      <ResultView
        stage={race.stage}
        result={result}
        reason={reasonToDiffer(race.settings.request)}
        wasInterrupted={plain.wasInterrupted || speculative.wasInterrupted}
        isTogether={race.settings.isTogether}
      />
      <div className="race-lanes">
        <LaneView race={race} lane={plain} rival={speculative} />
        <LaneView race={race} lane={speculative} rival={plain} />
      </div>
    </>
  );
}
