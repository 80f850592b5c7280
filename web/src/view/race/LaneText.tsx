import { memo, type UIEvent, useLayoutEffect, useRef } from "react";
import type { Run, Step } from "../../run/run";

/** As near to the end, in pixels, as counts for being there. */
const NEAR_END = 24;

/** The answer, with accepted drafts marked; it keeps its end in view while it grows, unless it was scrolled away. */
export function LaneText({ run, label }: { run: Run; label: string }) {
  const box = useRef<HTMLElement>(null);
  const isAtEnd = useRef(true);
  const numTokens = run.tokens.length;
  // biome-ignore lint/correctness/useExhaustiveDependencies: scrolls with each token
  useLayoutEffect(() => {
    if (isAtEnd.current && box.current !== null) box.current.scrollTop = box.current.scrollHeight;
  }, [numTokens]);
  const onScroll = ({ currentTarget: { scrollHeight, scrollTop, clientHeight } }: UIEvent) => {
    isAtEnd.current = scrollHeight - scrollTop - clientHeight < NEAR_END;
  };
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls has to be reachable by keyboard
    <section ref={box} className="race-text" tabIndex={0} aria-label={label} onScroll={onScroll}>
      {run.steps.map((step) => (
        <StepText key={step.firstToken} run={run} step={step} />
      ))}
      {run.finished?.text}
      {numTokens === 0 && <span className="race-text__empty">…</span>}
    </section>
  );
}

/** Drawn once: steps do not change. Of merged ones it is not known which of their tokens were drafts. */
const StepText = memo(function StepText({ run, step }: { run: Run; step: Step }) {
  const numDrafts = step.numTokens <= step.numAccepted + 1 ? step.numAccepted : 0;
  const text = (from: number, to: number) =>
    run.tokens
      .slice(step.firstToken + from, step.firstToken + to)
      .map((token) => token.text)
      .join("");
  const own = text(numDrafts, step.numTokens);
  if (numDrafts === 0) return own;
  return (
    <>
      <mark>{text(0, numDrafts)}</mark>
      {own}
    </>
  );
});
