import { useLayoutEffect, useRef } from "react";
import { paintScene } from "../../tree/paint";
import { paletteOf } from "./palette";
import type { SceneProps } from "./SvgScene";

/** The picture where it has too many nodes for SVG: the same colours, no animations. */
export function CanvasScene({ scene, camera, size }: SceneProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const ratio = window.devicePixelRatio;
  useLayoutEffect(() => {
    const element = canvas.current;
    const context = element?.getContext("2d") ?? null;
    if (element === null || context === null) return;
    const style = getComputedStyle(element);
    paintScene(context, scene, camera, size, ratio, paletteOf(style), style.fontFamily);
  });
  return (
    <canvas
      ref={canvas}
      className="tree-canvas"
      width={Math.round(size.width * ratio)}
      height={Math.round(size.height * ratio)}
      style={{ width: size.width, height: size.height }}
    />
  );
}
