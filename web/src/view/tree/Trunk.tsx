import { memo } from "react";
import { NODE_HEIGHT } from "../../tree/geometry";
import { pathLinks } from "../../tree/links";
import { type PlacedStep, type Scene, START, type TrunkToken } from "../../tree/scene";
import { cornerRadius } from "../../tree/shapes";

interface Props {
  scene: Scene;
  /** What the picture's x counts from. */
  origin: number;
}

/** The tokens of the run in a row, those of the shown step in its columns. */
export function Trunk({ scene, origin }: Props) {
  const { tokens, current, anchor, step } = scene;
  const start = Math.min(tokens[0]?.x ?? 0, anchor);
  const isStart = tokens[0]?.index === 0;
  return (
    <g>
      <path className="tree-trunk" d={`M${(isStart ? START.x : start) - origin} 0H${anchor - origin}`} />
      {current !== null && <AcceptedLinks placed={current} origin={origin} />}
      {isStart && <circle className="tree-start" cx={START.x + START.width / 2 - origin} r={5} />}
      {tokens.map((token) => (
        <TokenNode
          key={token.index}
          index={token.index}
          x={token.x - origin}
          width={token.width}
          label={token.label}
          isDraft={token.isDraft}
          isLookup={token.isLookup}
          isNew={token.isNew}
          step={token.isNew ? step : undefined}
        />
      ))}
    </g>
  );
}

const AcceptedLinks = memo(function AcceptedLinks({ placed, origin }: { placed: PlacedStep; origin: number }) {
  return (
    <g transform={`translate(${placed.x - origin} 0)`}>
      {pathLinks(placed).map(({ path, style, isDraft }) => (
        <path
          key={path}
          className={isDraft ? "tree-link tree-link--accepted" : "tree-link tree-link--own"}
          d={path}
          strokeWidth={style.width}
        />
      ))}
    </g>
  );
});

type TokenProps = Omit<TrunkToken, "y"> & { step: number | undefined };

const TokenNode = memo(function TokenNode({ index, x, width, label, isDraft, isLookup, isNew, step }: TokenProps) {
  const kind = isDraft ? "tree-token tree-token--draft" : "tree-token";
  return (
    <g
      className={isNew ? `${kind} tree-token--new` : kind}
      style={{ transform: `translate(${x}px, 0px)` }}
      data-token={index}
      data-step={step}
      data-fate={isDraft ? "accepted" : "backbone"}
    >
      <rect
        className={isLookup ? "tree-pill tree-pill--lookup" : "tree-pill"}
        y={-NODE_HEIGHT / 2}
        width={width}
        height={NODE_HEIGHT}
        rx={cornerRadius(isLookup)}
      />
      <text className="tree-text" x={width / 2} y={NODE_HEIGHT / 5}>
        {label}
      </text>
    </g>
  );
});
