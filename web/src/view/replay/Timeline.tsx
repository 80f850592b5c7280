import { useId, useMemo } from "react";
import { columnsOf, positionLabel } from "../../run/timeline";
import { type RunProps, useVersion } from "../hooks";

const MAX_COLUMNS = 240;
const HEIGHT = 24;

interface Props extends RunProps {
  onSeek: (position: number) => void;
}

/** Every step as a bar as high as the tokens that it gave, over a slider through them. */
export function Timeline({ store, player, onSeek }: Props) {
  useVersion(store);
  useVersion(player);
  const { run } = store;
  const numSteps = run.steps.length;
  const past = useId();
  const bars = useMemo(() => barsPath(columnsOf(run.steps.slice(0, numSteps), MAX_COLUMNS)), [run, numSteps]);
  const { position } = player;
  const share = numSteps === 0 ? 0 : position / numSteps;
  const width = Math.min(numSteps, MAX_COLUMNS);
  return (
    <div className="replay-timeline">
      <svg
        className="replay-timeline__bars"
        viewBox={`0 0 ${Math.max(1, width)} ${HEIGHT}`}
        preserveAspectRatio="none"
        aria-hidden="true"
      >
        <clipPath id={past}>
          <rect width={share * width} height={HEIGHT} />
        </clipPath>
        <path className="replay-timeline__future" d={bars} />
        <path className="replay-timeline__past" d={bars} clipPath={`url(#${past})`} />
      </svg>
      <input
        className="replay-timeline__slider"
        type="range"
        min={1}
        max={Math.max(1, numSteps)}
        value={Math.max(1, position)}
        disabled={numSteps === 0}
        aria-label="Step"
        aria-valuetext={positionLabel(run, position)}
        onChange={(event) => onSeek(event.currentTarget.valueAsNumber)}
      />
    </div>
  );
}

function barsPath(columns: readonly number[]): string {
  const most = Math.max(2, ...columns);
  const gap = columns.length > MAX_COLUMNS / 2 ? 0 : 0.15;
  return columns
    .map((value, i) => {
      const height = Math.max(1, (HEIGHT * value) / most);
      return `M${i + gap} ${HEIGHT}v${-height}h${1 - 2 * gap}v${height}z`;
    })
    .join("");
}
