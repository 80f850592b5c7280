// Where one token came from.

import type { Run, Token } from "../../run/run";
import { percent } from "../../tree/describe";
import { tokenLabel } from "../../tree/label";

interface Props {
  run: Run;
  token: number;
  /** Of the window: the token's first line. */
  x: number;
  top: number;
  bottom: number;
}

const WIDTH = 216;
/** About as high as it gets: with less room below its token it goes above. */
const HEIGHT = 170;
const GAP = 6;

export function TokenTooltip({ run, token, x, top, bottom }: Props) {
  const found = run.tokens[token];
  if (found === undefined) return null;
  const left = Math.max(GAP, Math.min(x, window.innerWidth - WIDTH - GAP));
  const isBelow = bottom + HEIGHT < window.innerHeight;
  const vertical = isBelow ? { top: bottom + GAP } : { bottom: window.innerHeight - top + GAP };
  const isDraft = found.draft !== null;
  return (
    <div className="stream-tooltip" role="tooltip" aria-live="polite" style={{ left, width: WIDTH, ...vertical }}>
      <code>{tokenLabel(found.text)}</code>
      <p className={isDraft ? "stream-tooltip-draft" : undefined}>{isDraft ? "accepted draft" : ownWords(found)}</p>
      <dl>
        {factsOf(found).map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
    </div>
  );
}

function ownWords({ step }: Token): string {
  return step === 0 ? "given by the prompt's pass" : "the backbone's own";
}

function factsOf({ id, step, draft }: Token): [string, string | number][] {
  const facts: [string, string | number][] = [
    ["Token id", id],
    ["Step", step],
  ];
  if (draft === null) return facts;
  const by = draft.source === "head" ? `head ${draft.depth}` : draft.source;
  return [
    ...facts,
    ["Drafted by", by],
    ["Depth", draft.depth],
    ["Rank", draft.rank],
    ["Path probability", percent(draft.probability)],
  ];
}
