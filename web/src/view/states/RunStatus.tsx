// Where a generation stands, in words: waiting, running, how it ended and what it cost.

import type { Run } from "../../run/run";
import type { RunStore } from "../../run/store";
import { useVersion } from "../hooks";
import { remedyOf } from "./remedies";
import "./states.css";

export function RunStatus({ store }: { store: RunStore }) {
  useVersion(store);
  const { run } = store;
  if (run.error !== null) {
    const { code, message, retry_after_seconds: seconds } = run.error;
    return (
      <p className="status status--error" role="alert">
        <strong>{code}</strong> {message} {seconds !== null && `Try again in ${Math.ceil(seconds)} s.`}
        {remedyOf(code)}
      </p>
    );
  }
  const text = statusOf(run);
  return (
    <p className="status" role="status">
      {text}
    </p>
  );
}

export function statusOf(run: Run): string {
  const { status } = run;
  switch (run.phase) {
    case "connecting":
      return "Connecting …";
    case "loading":
      return `The model loads${share(status?.progress)} …`;
    case "queued":
      return status?.position ? `Waiting: ${status.position} in front of you …` : "Waiting for a free slot …";
    case "prefill":
      return `Reading the prompt${share(status?.progress)} …`;
    case "resuming":
      return "An engine was lost: another one goes on …";
    case "reconnecting":
      return "Connection lost: reconnecting, the answer goes on where it was …";
    case "streaming":
    case "failed":
      return "";
    case "finished":
      return endOf(run);
  }
}

function share(progress: number | null | undefined): string {
  return progress == null ? "" : ` ${Math.round(100 * progress)} %`;
}

const REASONS: Readonly<Record<string, string>> = {
  stop: "complete",
  length: "cut at the token limit",
  cancelled: "stopped",
};

function endOf({ finished }: Run): string {
  if (finished === null) return "";
  const { metrics, usage, finish_reason: reason } = finished;
  const parts = [REASONS[reason] ?? reason, `${usage.completion_tokens} tokens`];
  if (metrics.tokens_per_second !== null) parts.push(`${metrics.tokens_per_second.toFixed(1)} tokens/s`);
  if (metrics.speedup !== null) parts.push(`${metrics.speedup.toFixed(2)}x plain decoding`);
  const { mean_acceptance_length: length, num_spec_steps: steps } = metrics.speculative_decoding;
  if (steps > 0) parts.push(`${length.toFixed(2)} tokens a step`);
  return parts.join(" · ");
}
