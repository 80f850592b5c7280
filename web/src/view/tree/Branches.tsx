import { memo } from "react";
import { NODE_HEIGHT } from "../../tree/geometry";
import { LINK_STYLES, rejectedLinks } from "../../tree/links";
import type { PlacedStep } from "../../tree/scene";
import { boxesPath } from "../../tree/shapes";

interface Props {
  placed: PlacedStep;
  /** What the picture's x counts from. */
  origin: number;
}

/** The rejected nodes of one step. Few elements: links and boxes are paths over all nodes of a kind. */
export const Branches = memo(function Branches({ placed, origin }: Props) {
  const { x, step, rejected } = placed;
  return (
    <g transform={`translate(${x - origin} 0)`}>
      {rejectedLinks(placed).map((path, style) => {
        const { width, opacity } = LINK_STYLES[style] ?? { width: 1, opacity: 1 };
        // biome-ignore lint/suspicious/noArrayIndexKey: the index is the class of the link.
        return <path key={style} className="tree-link" d={path} strokeWidth={width} strokeOpacity={opacity} />;
      })}
      <path className="tree-box" d={boxesPath(rejected.filter((node) => !node.isLookup))} />
      <path className="tree-box tree-box--lookup" d={boxesPath(rejected.filter((node) => node.isLookup))} />
      {rejected.map((node) => (
        <text
          key={node.node}
          className="tree-text"
          x={node.x + node.width / 2}
          y={node.y + NODE_HEIGHT / 5}
          data-step={step}
          data-node={node.node}
          data-fate="rejected"
        >
          {node.label}
        </text>
      ))}
    </g>
  );
});

/** What is left of a step's rejected branches when steps come faster than one can see: their links in one path. */
export const Ember = memo(function Ember({ placed, origin }: Props) {
  return (
    <path className="tree-ember" transform={`translate(${placed.x - origin} 0)`} d={rejectedLinks(placed).join("")} />
  );
});
