// The tree as it grows: the trunk of all tokens, the drafts of the shown step, what was rejected just before.

import { type MouseEvent, useId, useMemo, useRef, useState } from "react";
import { hasEnded, type Run } from "../../run/run";
import { type Camera, FollowZoom, fitCamera, followCamera, type Size, viewOf, wantedZoom } from "../../tree/camera";
import { caption, factsOf, summary } from "../../tree/describe";
import { type Pace, paceAt } from "../../tree/pace";
import { boxOf, numNodes, type Target, TreeModel, targetAt } from "../../tree/scene";
import { type RunProps, useVersion } from "../hooks";
import { CanvasScene } from "./CanvasScene";
import { onTreeKey } from "./keys";
import { NodeTooltip } from "./NodeTooltip";
import { SvgScene } from "./SvgScene";
import { TreeControls } from "./TreeControls";
import { TreeLegend } from "./TreeLegend";
import "./tree.css";
import { useCamera } from "./useCamera";
import { usePrefersReducedMotion } from "./useMotion";
import { useSize } from "./useSize";

/** Nodes in view from which on they are painted on a canvas. */
const MAX_SVG_NODES = 1000;

export function TreeView({ store, player }: RunProps) {
  useVersion(store);
  useVersion(player);
  const surface = useRef<HTMLDivElement>(null);
  const size = useSize(surface);
  const summaryId = useId();
  const { run } = store;
  const [marked, mark] = useState<Target | null>(null);
  const follower = useMemo(() => new Follower(run), [run]);
  const isCalm = usePrefersReducedMotion();
  const isStill = isCalm || !player.isLive || hasEnded(run);
  const shown = follower.at(player.position, player.isLive, size);
  const control = useCamera(surface, { size, following: shown.camera, anchor: shown.anchor, isLive: player.isLive });
  const { camera } = control;
  const view = viewOf(camera, size);
  const whole = follower.model.scene(player.position, view.left, view.right);
  const scene = isStill ? { ...whole, fading: [] } : whole;
  const box = marked === null ? null : boxOf(scene, marked);
  const facts = marked === null || box === null ? null : factsOf(run, marked);
  const fitStep = () => control.show(fitCamera(scene.bounds, size));
  const point = (event: MouseEvent) => {
    const { left, top } = event.currentTarget.getBoundingClientRect();
    const x = (event.clientX - left - camera.x) / camera.k;
    const found = targetAt(scene, x, (event.clientY - top - camera.y) / camera.k);
    if (!isSame(found, marked)) mark(found);
  };
  const SceneView = numNodes(scene) > MAX_SVG_NODES ? CanvasScene : SvgScene;
  return (
    <section className="tree" aria-label="Tree of drafts">
      <div
        ref={surface}
        className="tree-surface"
        role="application"
        // biome-ignore lint/a11y/noNoninteractiveTabindex: an application takes keys.
        tabIndex={0}
        aria-label="Tree: arrow keys go from node to node, with Shift they move the picture; + and - zoom, 0 fits, f follows"
        aria-describedby={summaryId}
        onKeyDown={(event) => onTreeKey(event, { scene, control, marked, mark, fitStep })}
        onMouseMove={point}
        onClick={point}
        onMouseLeave={() => mark(null)}
        onBlur={() => mark(null)}
      >
        {size.width > 0 && scene.step >= 0 && (
          <SceneView scene={scene} camera={camera} size={size} pace={shown.pace} isStill={isStill} marked={box} />
        )}
        {facts !== null && box !== null && <NodeTooltip facts={facts} box={box} camera={camera} size={size} />}
        {scene.step < 0 && <Empty run={run} />}
        <p className="tree-caption">{caption(run, scene.step)}</p>
      </div>
      <p id={summaryId} className="tree-summary" aria-live="off">
        {summary(run, scene.step)}
      </p>
      <footer className="tree-footer">
        <TreeLegend />
        <TreeControls control={control} onFit={fitStep} />
      </footer>
    </section>
  );
}

/** Where the picture would be if it followed the shown step. */
class Follower {
  readonly model: TreeModel;
  readonly #run: Run;
  readonly #zoom = new FollowZoom();
  #size: Size | null = null;
  #position = -1;
  #pace: Pace = "calm";

  constructor(run: Run) {
    this.#run = run;
    this.model = new TreeModel(run);
  }

  at(position: number, isLive: boolean, size: Size): { camera: Camera; anchor: number; pace: Pace } {
    const { anchor, bounds } = this.model.shown(position);
    const wanted = wantedZoom(bounds, size);
    if (size !== this.#size) {
      this.#size = size;
      this.#zoom.reset(wanted);
    }
    if (isLive && position !== this.#position) {
      this.#position = position;
      this.#pace = paceAt(this.#run.steps, position, this.#pace);
      this.#zoom.next(wanted);
    }
    const k = isLive ? this.#zoom.zoom : FollowZoom.at(wanted);
    return { camera: followCamera(anchor, bounds, size, k), anchor, pace: this.#pace };
  }
}

function isSame(a: Target | null, b: Target | null): boolean {
  return JSON.stringify(a) === JSON.stringify(b);
}

function Empty({ run }: { run: Run }) {
  const isWaiting = run.phase !== "connecting" && !hasEnded(run);
  return (
    <div className="tree-empty">
      <svg viewBox="0 0 220 80" width="220" height="80" aria-hidden="true">
        <path d="M6 40H70M70 40C100 40 100 12 132 12M70 40H132M70 40C100 40 100 68 132 68M152 40C176 40 176 24 198 24M152 40C176 40 176 56 198 56" />
        <rect x="132" y="3" width="20" height="18" rx="9" />
        <rect className="tree-empty__accepted" x="132" y="31" width="20" height="18" rx="9" />
        <rect x="132" y="59" width="20" height="18" rx="9" />
        <circle cx="204" cy="24" r="6" />
        <circle cx="204" cy="56" r="6" />
      </svg>
      <p>
        {isWaiting
          ? "Waiting for the first token."
          : "Here the tree of drafts grows, step by step, as an answer is written."}
      </p>
    </div>
  );
}
