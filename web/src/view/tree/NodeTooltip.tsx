import type { Camera, Size } from "../../tree/camera";
import { type Fate, type NodeFacts, percent } from "../../tree/describe";
import { type Box, NODE_HEIGHT } from "../../tree/geometry";
import "./tooltip.css";

interface Props {
  facts: NodeFacts;
  box: Box;
  camera: Camera;
  size: Size;
}

const FATES: Record<Fate, string> = {
  accepted: "accepted draft",
  rejected: "rejected draft",
  backbone: "the backbone's own token",
};
const WIDTH = 208;
/** A tooltip is about this high, in pixels: with less room above its node it goes below. */
const HEIGHT = 190;
const GAP = 8;

export function NodeTooltip({ facts, box, camera, size }: Props) {
  const { token, tokenId, step, fate, draft } = facts;
  const middle = (box.x + box.width / 2) * camera.k + camera.x;
  const half = (NODE_HEIGHT / 2) * camera.k + GAP;
  const centre = box.y * camera.k + camera.y;
  const left = Math.max(GAP, Math.min(middle - WIDTH / 2, size.width - WIDTH - GAP));
  const isAbove = centre - half > HEIGHT || centre > size.height / 2;
  const vertical = isAbove
    ? { bottom: Math.max(GAP, size.height - centre + half) }
    : { top: Math.max(GAP, centre + half) };
  return (
    <div className="tree-tooltip" role="tooltip" style={{ left, width: WIDTH, ...vertical }}>
      <div className="tree-tooltip__token">{token === "" ? "(no text of its own)" : token}</div>
      <div className={`tree-tooltip__fate tree-tooltip__fate--${fate}`}>{FATES[fate]}</div>
      <dl>
        <dt>Token id</dt>
        <dd>{tokenId}</dd>
        <dt>Step</dt>
        <dd>{step}</dd>
        {draft !== null && (
          <>
            <dt>Drafted by</dt>
            <dd>{draft.source === "head" ? `head ${draft.depth}` : draft.source}</dd>
            <dt>Depth</dt>
            <dd>{draft.depth}</dd>
            <dt>Rank</dt>
            <dd>{draft.rank}</dd>
            <dt>Path probability</dt>
            <dd>{percent(draft.probability)}</dd>
          </>
        )}
      </dl>
    </div>
  );
}
