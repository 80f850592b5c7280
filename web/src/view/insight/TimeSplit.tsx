import { timeShares } from "../../insight/charts";
import type { Figures } from "../../insight/figures";
import { percent } from "../../insight/format";

/** All steps' time in one bar. */
export function TimeSplit({ figures }: { figures: Figures }) {
  const shares = timeShares(figures);
  let from = 0;
  return (
    <div className="insight-split">
      <svg className="insight-bars__track" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
        <rect className="insight-bars__ground" width="100" height="10" />
        {shares.map(({ verb, share }) => {
          const x = from;
          from += 100 * share;
          return <rect key={verb} className={`insight-fill--${verb}`} x={x} width={100 * share} height="10" />;
        })}
      </svg>
      <p>In all: {shares.map(({ verb, share }) => `${verb} ${percent(share)}`).join(", ")}</p>
    </div>
  );
}
