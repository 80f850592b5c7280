// The answer as it comes, token by token: accepted drafts are tinted, and each token tells where it came from.

import { type KeyboardEvent, type MouseEvent, memo, useEffect, useRef, useState } from "react";
import type { Run } from "../../run/run";
import { type RunProps, useVersion } from "../hooks";
import { type Chunk, chunksOf, nextToken, partsOf, piecesOf } from "./chunks";
import { TokenTooltip } from "./TokenTooltip";
import "./stream.css";

interface Marked {
  token: number;
  /** Of the window: where the token's first line is. */
  x: number;
  top: number;
  bottom: number;
}

export function StreamText({ store, player }: RunProps) {
  useVersion(store);
  useVersion(player);
  const [marked, mark] = useState<Marked | null>(null);
  useEffect(() => {
    if (marked === null) return;
    const leave = () => mark(null);
    window.addEventListener("scroll", leave, { capture: true, passive: true });
    return () => window.removeEventListener("scroll", leave, { capture: true });
  }, [marked]);
  const text = useRef<HTMLDivElement>(null);
  const { run } = store;
  const { position } = player;
  const isWhole = position >= run.steps.length;
  const point = ({ target }: MouseEvent) => {
    const next = target instanceof HTMLElement ? markedAt(target) : null;
    if (next?.token !== marked?.token) mark(next);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    const token = nextToken(run, position, marked?.token ?? null, event.key);
    if (token === null) return;
    event.preventDefault();
    const element = text.current?.querySelector<HTMLElement>(`[data-token="${token}"]`);
    element?.scrollIntoView({ block: "nearest" });
    // Behind the scroll event, which takes the mark away.
    requestAnimationFrame(() => requestAnimationFrame(() => mark(element == null ? null : markedAt(element))));
  };
  return (
    // biome-ignore lint/a11y/useSemanticElements: there is no element for a text whose parts can be looked at.
    <div
      ref={text}
      className="stream"
      role="group"
      aria-label="Answer"
      aria-roledescription="text: the left and right arrow keys tell where each token came from"
      // biome-ignore lint/a11y/noNoninteractiveTabindex: it takes the arrow keys.
      tabIndex={0}
      // Not onMouseOver: that comes too where the text grows below a mouse at rest.
      onMouseMove={point}
      onClick={point}
      onMouseLeave={() => mark(null)}
      onBlur={() => mark(null)}
      onKeyDown={onKeyDown}
    >
      {chunksOf(run, position).map((chunk) => (
        <TextChunk key={chunk.first} run={run} first={chunk.first} end={chunk.end} isWhole={chunk.end < position} />
      ))}
      {isWhole && run.finished?.text}
      {run.phase === "streaming" && player.isLive && <span className="stream-cursor" aria-hidden="true" />}
      {marked !== null && <TokenTooltip run={run} {...marked} />}
    </div>
  );
}

function markedAt(element: HTMLElement): Marked | null {
  const { token } = element.dataset;
  const box = element.getClientRects()[0];
  if (token === undefined || box === undefined) return null;
  return { token: Number(token), x: box.left, top: box.top, bottom: box.bottom };
}

/** A whole one is a block of its own: what comes behind it leaves its layout alone. */
function TextChunk({ run, first, end, isWhole }: Chunk & { run: Run; isWhole: boolean }) {
  return (
    <span className={isWhole ? "stream-chunk stream-chunk--whole" : "stream-chunk"}>
      {partsOf({ first, end }).map((part) => (
        <TextPart key={part.first} run={run} first={part.first} end={part.end} />
      ))}
    </span>
  );
}

/** Steps do not change once they are there: a part is drawn again where its end moves, and never else. */
const TextPart = memo(function TextPart({ run, first, end }: Chunk & { run: Run }) {
  return piecesOf(run, { first, end }).map(({ token, text, isDraft }) => (
    <span key={token} data-token={token} className={isDraft ? "stream-draft" : undefined}>
      {text}
    </span>
  ));
});
