import type { Excerpt, LaneName, Result, Verdict } from "../../run/race";
import type { Stage } from "../../run/raceRunner";

interface Props {
  stage: Stage;
  result: Result | null;
  /** Why different tokens are no surprise. */
  reason: string | null;
  wasInterrupted: boolean;
  isTogether: boolean;
}

/** How the race ended, said once it has. */
export function ResultView({ stage, result, reason, wasInterrupted, isTogether }: Props) {
  return (
    <div className="race-result" role="status">
      {stage === "failed" && <p className="race-result__none">No result: a lane failed.</p>}
      {stage === "stopped" && <p className="race-result__none">Stopped: no result.</p>}
      {stage === "running" && <p className="race-result__none">Running…</p>}
      {result !== null && (
        <>
          <Headline result={result} isTogether={isTogether} />
          <VerdictView verdict={result.verdict} reason={reason} />
          {wasInterrupted && (
            <p className="race-result__note">A lane was interrupted and went on: its time holds the break.</p>
          )}
        </>
      )}
    </div>
  );
}

function Headline({ result: { ratio, acceptanceLength }, isTogether }: { result: Result; isTogether: boolean }) {
  return (
    <p className="race-headline">
      {ratio === null ? (
        <span className="race-result__none">The answers were too short to time.</span>
      ) : (
        <>
          <b className={ratio < 1 ? "race-headline__slower" : undefined}>{ratio.toFixed(2)}x</b>
          <span>
            {isTogether ? "wall clock of decoding, each slowing the other" : "wall clock of decoding"}
            {acceptanceLength !== null && (
              <>
                <br />
                {acceptanceLength.toFixed(2)} tokens a verification step
              </>
            )}
          </span>
        </>
      )}
    </p>
  );
}

function VerdictView({ verdict, reason }: { verdict: Verdict; reason: string | null }) {
  if (verdict.kind === "identical") {
    return (
      <p className="race-verdict race-verdict--identical">
        <span aria-hidden="true">✓ </span>
        identical: {verdict.numTokens} of {verdict.numTokens} tokens
      </p>
    );
  }
  const { position, numTokens, excerpts } = verdict;
  return (
    <div className="race-verdict race-verdict--different">
      <p>
        <span aria-hidden="true">✗ </span>
        different from token {position + 1} on (plain {numTokens.plain}, speculative {numTokens.speculative} tokens)
      </p>
      <dl className="race-difference">
        <Difference lane="plain" excerpt={excerpts.plain} />
        <Difference lane="speculative" excerpt={excerpts.speculative} />
      </dl>
      <p className="race-result__note">
        {reason ??
          "Lossless acceptance gives equal tokens, unless near-ties fall differently: a GPU may compute a row of a batch with other roundings."}
      </p>
    </div>
  );
}

function Difference({ lane, excerpt }: { lane: LaneName; excerpt: Excerpt }) {
  return (
    <div>
      <dt>{lane}</dt>
      <dd>
        {excerpt.lead}
        <mark>{excerpt.rest === "" ? "(its end)" : excerpt.rest}</mark>
      </dd>
    </div>
  );
}
