// The server's state in the header: a dot and a word; behind them a dialog that tells of every engine.

import { useRef } from "react";
import type { ServerState } from "../../server/server";
import type { EngineInfo } from "../../wire/messages";
import "./states.css";

export function ServerBadge({ state }: { state: ServerState }) {
  const dialog = useRef<HTMLDialogElement>(null);
  return (
    <>
      <button type="button" className="server" onClick={() => dialog.current?.showModal()} aria-haspopup="dialog">
        <span className={`server-dot server-dot--${state.phase}`} aria-hidden="true" />
        <span role="status">{wordsOf(state)}</span>
        {state.phase === "loading" && state.progress !== null && (
          <progress className="server-progress" value={state.progress} aria-label="Loading" />
        )}
      </button>
      <dialog ref={dialog} className="dialog" aria-labelledby="server-title">
        <h2 id="server-title">What is served</h2>
        {state.engines.length === 0 && <p>No engine has told of itself yet: {wordsOf(state)}.</p>}
        {state.engines.map((engine) => (
          <Engine key={engine.engine_id} engine={engine} />
        ))}
        {state.gatewayVersion !== null && <p className="server-version">Gateway {state.gatewayVersion}</p>}
        <form method="dialog">
          <button type="submit" className="button button--primary">
            Close
          </button>
        </form>
      </dialog>
    </>
  );
}

function Engine({ engine }: { engine: EngineInfo }) {
  return (
    <section className="server-engine" aria-label={`Engine ${engine.engine_id}`}>
      <h3>
        <span className={`server-dot server-dot--${engine.state}`} aria-hidden="true" />
        {engine.engine_id} <span className="server-state">{engine.state}</span>
      </h3>
      <dl>
        {factsOf(engine).map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      {engine.notices.map((notice) => (
        <p key={notice} className="server-notice">
          {notice}
        </p>
      ))}
    </section>
  );
}

function factsOf(engine: EngineInfo): [string, string][] {
  const { heads, plain } = engine;
  const speeds = plain.map((speed) => `${speed.tokens_per_second.toFixed(0)} with ${speed.batch_size}`);
  return [
    ["Model", engine.model],
    ["Kernels", `${engine.kernels} on ${engine.device}`],
    ["Draft heads", heads.current === null ? "none" : `${heads.current} (${heads.family}, depth ${heads.num_heads})`],
    ["Plain decoding", speeds.length === 0 ? "not measured" : `${speeds.join(", ")} streams: tokens/s of each`],
    ["Context", `${engine.context} positions`],
    ["Tree", `at most ${engine.max_nodes} nodes`],
    ["Answers", `${engine.num_running} of ${engine.num_slots} run, ${engine.num_waiting} wait`],
    ...(heads.last_error === null ? [] : ([["Heads refused", heads.last_error]] as [string, string][])),
  ];
}

export function wordsOf(state: ServerState): string {
  switch (state.phase) {
    case "unknown":
      return "looking for the server …";
    case "loading": {
      const share = state.progress === null ? "" : ` ${Math.round(100 * state.progress)} %`;
      return `the model loads${share}${state.stage === null ? "" : ` (${state.stage})`} …`;
    }
    case "draining":
      return "the server is stopping";
    case "failed":
      return "the engine has failed: see its log";
    case "unavailable":
      return "no engine takes requests";
    case "unreachable":
      return "the server does not answer";
    case "refused":
      return state.reason ?? "the gateway refuses this page";
    case "ready":
      if (state.needsKey) return "an API key is needed";
      return state.models.join(", ");
  }
}
