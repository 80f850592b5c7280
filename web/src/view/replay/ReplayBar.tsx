import { type DragEvent, type KeyboardEvent, useState } from "react";
import { readRunFile } from "../../run/exchange";
import { InvalidFileError } from "../../run/guards";
import { RATES } from "../../run/playback";
import { hasEnded, type Run } from "../../run/run";
import { positionLabel } from "../../run/timeline";
import { type RunProps, useVersion } from "../hooks";
import { Icon } from "./Icon";
import { RunFiles } from "./RunFiles";
import { Timeline } from "./Timeline";
import { usePlayback } from "./usePlayback";
import "./replay.css";

interface Props extends RunProps {
  onImport: (run: Run) => void;
}

/** Moves through the steps of a run: live, at rest, or played again. */
export function ReplayBar({ store, player, onImport }: Props) {
  useVersion(store);
  useVersion(player);
  const [rate, setRate] = useState<number>(1);
  const [problem, setProblem] = useState<string | null>(null);
  const [isDropping, setIsDropping] = useState(false);
  const playback = usePlayback({ store, player }, rate);
  const { run } = store;
  const numSteps = run.steps.length;
  const { position } = player;
  const isEmpty = numSteps === 0;
  const isOver = hasEnded(run);
  const isMoving = playback.isPlaying || (player.isLive && !isOver && !isEmpty);

  const pause = () => {
    playback.stop();
    player.pause();
  };
  const toggle = isMoving ? pause : playback.play;
  const seek = (to: number) => player.seek(Math.max(1, to));
  const stepBy = (count: number) => {
    playback.stop();
    seek(position + count);
  };
  const toEnd = () => {
    playback.stop();
    player.live();
  };

  const load = async (file: File) => {
    try {
      const imported = await readRunFile(file);
      setProblem(null);
      onImport(imported);
    } catch (error) {
      if (!(error instanceof InvalidFileError || error instanceof DOMException)) throw error;
      setProblem(`${file.name}: ${error.message}`);
    }
  };

  const onKeyDown = (event: KeyboardEvent) => {
    if (isEmpty || event.altKey || event.ctrlKey || event.metaKey || event.target instanceof HTMLSelectElement) return;
    const isOnButton = event.target instanceof HTMLButtonElement;
    const action = actionOf(event.key, isOnButton, { toggle, stepBy, toStart: () => seek(1), toEnd });
    if (action === null) return;
    event.preventDefault();
    action();
  };
  const onDrop = (event: DragEvent) => {
    event.preventDefault();
    setIsDropping(false);
    const file = event.dataTransfer.files[0];
    if (file !== undefined) void load(file);
  };

  return (
    // biome-ignore lint/a11y/useSemanticElements: a fieldset cannot be laid out as a bar in every browser
    <div
      className={isDropping ? "replay replay--dropping" : "replay"}
      role="group"
      aria-label="Replay"
      onKeyDown={onKeyDown}
      onDragOver={(event) => {
        event.preventDefault();
        setIsDropping(true);
      }}
      onDragLeave={() => setIsDropping(false)}
      onDrop={onDrop}
    >
      <div className="replay-transport">
        <IconButton
          label="One step back"
          path="M11 3 5 8l6 5zM4 3v10"
          disabled={position <= 1}
          onClick={() => stepBy(-1)}
        />
        <IconButton
          label={isMoving ? "Pause" : "Play"}
          isPrimary
          path={isMoving ? "M4.5 3h2.5v10H4.5zM9 3h2.5v10H9z" : "M5 2.5v11l8-5.5z"}
          disabled={isEmpty}
          onClick={toggle}
        />
        <IconButton
          label="One step forward"
          path="M5 3l6 5-6 5zM12 3v10"
          disabled={position >= numSteps}
          onClick={() => stepBy(1)}
        />
        <select
          className="replay-rate"
          aria-label="Speed of the replay"
          value={rate}
          disabled={isEmpty}
          onChange={(event) => setRate(Number(event.currentTarget.value))}
        >
          {RATES.map((choice) => (
            <option key={choice} value={choice}>
              {choice}×
            </option>
          ))}
        </select>
      </div>
      <Timeline store={store} player={player} onSeek={seek} />
      <output className="replay-position">{positionLabel(run, position)}</output>
      <button
        type="button"
        className={isOver ? "replay-button" : "replay-button replay-button--live"}
        aria-pressed={player.isLive && !isEmpty}
        disabled={isEmpty}
        title={isOver ? "Go to the last step (End)" : "Follow the newest step (End)"}
        onClick={toEnd}
      >
        {isOver ? "End" : "Live"}
      </button>
      <RunFiles run={run} onFile={load} />
      {problem !== null && (
        <p className="replay-problem" role="alert">
          {problem}
          <button type="button" className="replay-problem__close" aria-label="Dismiss" onClick={() => setProblem(null)}>
            ×
          </button>
        </p>
      )}
    </div>
  );
}

interface Actions {
  toggle: () => void;
  stepBy: (count: number) => void;
  toStart: () => void;
  toEnd: () => void;
}

function actionOf(key: string, isOnButton: boolean, actions: Actions): (() => void) | null {
  switch (key) {
    case "ArrowLeft":
      return () => actions.stepBy(-1);
    case "ArrowRight":
      return () => actions.stepBy(1);
    case "Home":
      return actions.toStart;
    case "End":
      return actions.toEnd;
    case " ":
      // A focused button is pressed by it.
      return isOnButton ? null : actions.toggle;
    default:
      return null;
  }
}

interface IconButtonProps {
  label: string;
  path: string;
  disabled: boolean;
  isPrimary?: boolean;
  onClick: () => void;
}

function IconButton({ label, path, disabled, isPrimary = false, onClick }: IconButtonProps) {
  return (
    <button
      type="button"
      className={isPrimary ? "replay-button replay-button--primary" : "replay-button replay-button--icon"}
      aria-label={label}
      title={label}
      disabled={disabled}
      onClick={onClick}
    >
      <Icon path={path} isFilled />
    </button>
  );
}
