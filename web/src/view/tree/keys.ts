import type { KeyboardEvent } from "react";
import { type Direction, neighbour, type Scene, type Target } from "../../tree/scene";
import { ZOOM_FACTOR } from "./TreeControls";
import type { CameraControl } from "./useCamera";

const PAN_PIXELS = 60;
const DIRECTIONS: Readonly<Record<string, Direction>> = {
  ArrowLeft: "left",
  ArrowRight: "right",
  ArrowUp: "up",
  ArrowDown: "down",
};
const PANS: Readonly<Record<Direction, readonly [number, number]>> = {
  left: [PAN_PIXELS, 0],
  right: [-PAN_PIXELS, 0],
  up: [0, PAN_PIXELS],
  down: [0, -PAN_PIXELS],
};

interface Keys {
  scene: Scene;
  control: CameraControl;
  marked: Target | null;
  mark: (target: Target | null) => void;
  fitStep: () => void;
}

/** Arrows go from node to node, with Shift they move the picture; + - 0 f as the buttons; Escape lets go. */
export function onTreeKey(event: KeyboardEvent, { scene, control, marked, mark, fitStep }: Keys): void {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const direction = DIRECTIONS[event.key];
  if (direction !== undefined) {
    const last = scene.tokens.at(-1);
    if (event.shiftKey) control.pan(...PANS[direction]);
    else if (marked !== null) mark(neighbour(scene, marked, direction) ?? marked);
    else if (last !== undefined) mark({ token: last.index });
  } else if (event.key === "+" || event.key === "=") control.zoomBy(ZOOM_FACTOR);
  else if (event.key === "-") control.zoomBy(1 / ZOOM_FACTOR);
  else if (event.key === "0") fitStep();
  else if (event.key === "f") control.follow();
  else if (event.key === "Escape" && marked !== null) mark(null);
  else return;
  event.preventDefault();
  event.stopPropagation();
}
