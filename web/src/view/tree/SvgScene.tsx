import type { Camera, Size } from "../../tree/camera";
import { type Box, NODE_HEIGHT } from "../../tree/geometry";
import type { Pace } from "../../tree/pace";
import type { Scene } from "../../tree/scene";
import { Branches, Ember } from "./Branches";
import { Trunk } from "./Trunk";

/** SVG computes with single precision: x counts from a multiple of this near the shown step. */
const ORIGIN_GRID = 1 << 16;

export interface SceneProps {
  scene: Scene;
  camera: Camera;
  size: Size;
  pace: Pace;
  /** A step of the past, or a run that has ended: nothing moves, nothing fades. */
  isStill: boolean;
  /** What the tooltip is about. */
  marked: Box | null;
}

export function SvgScene({ scene, camera, size, pace, isStill, marked }: SceneProps) {
  const { current, fading } = scene;
  const origin = Math.floor(scene.anchor / ORIGIN_GRID) * ORIGIN_GRID;
  const { x, y, k } = camera;
  const isFast = pace === "fast" && !isStill;
  // A key of its own starts a step's animations; at speed the elements stay, and only their attributes change.
  const branches = (isFast ? [] : fading.toReversed()).concat(current ?? []);
  return (
    <svg
      className={`tree-svg tree-svg--${isStill ? "still" : pace}`}
      width={size.width}
      height={size.height}
      aria-hidden="true"
    >
      <title>Tree of drafts</title>
      <g className="tree-camera" style={{ transform: `translate(${x + origin * k}px, ${y}px) scale(${k})` }}>
        {isFast && fading.map((placed) => <Ember key={placed.step} placed={placed} origin={origin} />)}
        {branches.map((placed) => (
          <g
            key={isFast ? "fast" : placed.step}
            className={placed === current ? "tree-branches" : "tree-branches tree-branches--gone"}
          >
            <Branches placed={placed} origin={origin} />
          </g>
        ))}
        <Trunk scene={scene} origin={origin} />
        {marked !== null && (
          <rect
            className="tree-mark"
            x={marked.x - origin - 3}
            y={marked.y - NODE_HEIGHT / 2 - 3}
            width={marked.width + 6}
            height={NODE_HEIGHT + 6}
            rx={NODE_HEIGHT / 2 + 3}
          />
        )}
      </g>
    </svg>
  );
}
