// The keys, and what the picture shows.

import { useEffect, useRef } from "react";

const KEYS: readonly (readonly [string, string])[] = [
  ["Enter", "send (Shift+Enter: a new line)"],
  ["Ctrl+Enter", "send, also in completion mode"],
  ["Escape", "stop the generation"],
  ["?", "this help"],
  ["on the tree: arrows", "from node to node; with Shift move the picture"],
  ["on the tree: + − 0 f", "closer, further, fit, follow"],
  ["on the replay bar: ← →", "one step back or on; Home, End, Space to pause"],
];

export function HelpDialog() {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const onKeyDown = (event: KeyboardEvent) => {
      const target = event.target;
      const isTyping = target instanceof HTMLElement && /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
      if (event.key === "?" && !isTyping) dialog.current?.showModal();
    };
    window.addEventListener("keydown", onKeyDown);
    return () => window.removeEventListener("keydown", onKeyDown);
  }, []);
  return (
    <>
      <button type="button" className="button button--quiet" onClick={() => dialog.current?.showModal()}>
        Help
      </button>
      <dialog ref={dialog} className="dialog help" aria-labelledby="help-title">
        <h2 id="help-title">What you see</h2>
        <p>
          Each step, small heads and a lookup guess how the text goes on; the guesses form a tree. One pass of the model
          verifies all of it. A node turns <span className="help-accepted">green</span> when the model would have said
          the same: its token is kept and joins the trunk. The rest turns <span className="help-rejected">red</span> and
          fades. The text is the same as without guessing; it only comes in fewer steps.
        </p>
        <p>
          The speed is measured: this request's decoding against the engine's own plain decoding on the same machine at
          the same load.
        </p>
        <h2>Keys</h2>
        <dl>
          {KEYS.map(([key, what]) => (
            <div key={key}>
              <dt>{key}</dt>
              <dd>{what}</dd>
            </div>
          ))}
        </dl>
        <form method="dialog">
          <button type="submit" className="button button--primary">
            Close
          </button>
        </form>
      </dialog>
    </>
  );
}
