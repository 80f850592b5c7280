import type { Bar } from "../../insight/charts";

/** Further ones stand in the table. */
const MAX_BARS = 10;

interface Props {
  label: string;
  bars: readonly Bar[];
}

/** Horizontal bars, each a share of the whole. */
export function Bars({ label, bars }: Props) {
  if (bars.length === 0) return <p className="insight-empty">Nothing was drafted yet.</p>;
  const numHidden = bars.length - MAX_BARS;
  return (
    <>
      <ul className="insight-bars" aria-label={label}>
        {bars.slice(0, MAX_BARS).map((bar) => (
          <li key={bar.label} title={bar.detail}>
            <span className="insight-bars__label">{bar.label}</span>
            <BarTrack bar={bar} />
            <span className="insight-bars__value">{bar.value}</span>
          </li>
        ))}
      </ul>
      {numHidden > 0 && <p className="insight-empty">{numHidden} more in the table</p>}
    </>
  );
}

function BarTrack({ bar }: { bar: Bar }) {
  let from = 0;
  return (
    <svg className="insight-bars__track" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
      <rect className="insight-bars__ground" width="100" height="10" />
      {bar.segments.map(({ kind, share }) => {
        const x = from;
        from += 100 * share;
        return <rect key={x} className={`insight-fill--${kind}`} x={x} width={100 * share} height="10" />;
      })}
    </svg>
  );
}
