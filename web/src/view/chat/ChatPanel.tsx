// The conversation: turns before, the answer that is shown, and the prompt to come.

import { type KeyboardEvent, useEffect, useRef } from "react";
import type { Session } from "../../session/session";
import { useVersion } from "../hooks";
import { RunStatus } from "../states/RunStatus";
import { Examples } from "./Examples";
import { StreamText } from "./StreamText";
import "./chat.css";

interface Props {
  session: Session;
  prompt: string;
  setPrompt: (prompt: string) => void;
  isChat: boolean;
  /** Why nothing can be asked now; null: it can. */
  obstacle: string | null;
  ask: (text: string) => void;
}

export function ChatPanel({ session, prompt, setPrompt, isChat, obstacle, ask }: Props) {
  useVersion(session);
  const { shown, isRunning } = session;
  const list = useRef<HTMLDivElement>(null);
  useFollowEnd(list, session);
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key !== "Enter" || event.nativeEvent.isComposing) return;
    if (event.ctrlKey || event.metaKey || (isChat && !event.shiftKey)) {
      event.preventDefault();
      ask(prompt);
    }
  };
  return (
    <section className="chat" aria-label="Conversation">
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls has to be reached by keyboard. */}
      <div className="chat-list" ref={list} tabIndex={0} role="log" aria-live="off" aria-label="Conversation so far">
        {shown === null && <Examples isChat={isChat} choose={obstacle === null ? ask : setPrompt} />}
        {session.turns.map((turn, i) => (
          // biome-ignore lint/suspicious/noArrayIndexKey: turns are only ever added behind.
          <div key={i} className={`chat-turn chat-turn--${turn.role}`}>
            {turn.content}
          </div>
        ))}
        {session.prompt !== null && <div className="chat-turn chat-turn--user">{session.prompt}</div>}
        {shown !== null && (
          <div className="chat-turn chat-turn--assistant">
            {shown.isImported && <p className="chat-note">Imported from a file</p>}
            <StreamText key={shown.store.run.startedAt} store={shown.store} player={shown.player} />
            <RunStatus store={shown.store} />
          </div>
        )}
      </div>
      {shown !== null && (
        <p className="chat-legend">
          <span className="stream-draft">accepted draft</span> · plain token
        </p>
      )}
      <form
        className="chat-form"
        onSubmit={(event) => {
          event.preventDefault();
          ask(prompt);
        }}
      >
        <label className="visually-hidden" htmlFor="prompt">
          {isChat ? "Message" : "Text to continue"}
        </label>
        <textarea
          id="prompt"
          className="input chat-prompt"
          rows={3}
          value={prompt}
          placeholder={isChat ? "Ask something" : "A text to continue"}
          onChange={(event) => setPrompt(event.target.value)}
          onKeyDown={onKeyDown}
        />
        <div className="chat-buttons">
          {isRunning ? (
            <button type="button" className="button button--primary" onClick={() => session.stop()}>
              Stop
            </button>
          ) : (
            <button
              type="submit"
              className="button button--primary"
              disabled={obstacle !== null || prompt.trim() === ""}
            >
              {isChat ? "Send" : "Continue"}
            </button>
          )}
          <button
            type="button"
            className="button button--quiet"
            disabled={shown === null || isRunning}
            onClick={() => session.clear()}
          >
            Clear
          </button>
          <span className="chat-obstacle" role="status">
            {obstacle}
          </span>
        </div>
      </form>
    </section>
  );
}

/** Scrolls along with the text, unless a person has scrolled up. */
function useFollowEnd(list: React.RefObject<HTMLDivElement | null>, session: Session): void {
  const store = session.shown?.store;
  useEffect(() => {
    const element = list.current;
    if (element === null || store === undefined) return;
    let follows = true;
    const onScroll = () => {
      follows = element.scrollHeight - element.scrollTop - element.clientHeight < 60;
    };
    element.addEventListener("scroll", onScroll, { passive: true });
    element.scrollTop = element.scrollHeight;
    const stop = store.subscribe(() => {
      if (follows) element.scrollTop = element.scrollHeight;
    });
    return () => {
      stop();
      element.removeEventListener("scroll", onScroll);
    };
  }, [list, store]);
}
