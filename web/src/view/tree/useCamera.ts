// d3-zoom's gestures on an element, and a camera that follows the run until the user takes it.

import { select } from "d3-selection";
import { type D3ZoomEvent, type ZoomBehavior, zoom, zoomIdentity } from "d3-zoom";
import { type RefObject, useEffectEvent, useLayoutEffect, useRef, useState } from "react";
import { type Camera, MAX_ZOOM, MIN_ZOOM, type Size } from "../../tree/camera";

export interface CameraControl {
  camera: Camera;
  isFollowing: boolean;
  follow: () => void;
  show: (camera: Camera) => void;
  /** By pixels of the screen. */
  pan: (dx: number, dy: number) => void;
  /** Around the middle of the element. */
  zoomBy: (factor: number) => void;
}

interface Own {
  camera: Camera;
  /** The anchor that it was set at, which it moves along with; null: it stands still, whatever comes. */
  anchor: number | null;
}

interface Scenery {
  size: Size;
  /** The camera that follows the run. */
  following: Camera;
  /** The world's x of the shown step: a camera that the user set stays with it from step to step of a paused run. */
  anchor: number;
  isLive: boolean;
}

export function useCamera(surface: RefObject<HTMLElement | null>, scenery: Scenery): CameraControl {
  const { size, following, anchor, isLive } = scenery;
  const [own, setOwn] = useState<Own | null>(null);
  const behaviour = useRef<ZoomBehavior<HTMLElement, unknown> | null>(null);
  const camera = own === null ? following : moved(own, anchor);
  const { x, y, k } = camera;
  if (own !== null && isLive !== (own.anchor === null)) setOwn({ camera, anchor: isLive ? null : anchor });
  const show = (next: Camera) => setOwn({ camera: next, anchor: isLive ? null : anchor });
  const onGesture = useEffectEvent(show);

  useLayoutEffect(() => {
    const element = surface.current;
    if (element === null) return;
    const gestures = zoom<HTMLElement, unknown>()
      .scaleExtent([MIN_ZOOM, MAX_ZOOM])
      .on("zoom", ({ sourceEvent, transform }: D3ZoomEvent<HTMLElement, unknown>) => {
        if (sourceEvent !== null) onGesture({ x: transform.x, y: transform.y, k: transform.k });
      });
    behaviour.current = gestures;
    select(element).call(gestures).on("dblclick.zoom", null);
    return () => {
      select(element).on(".zoom", null);
      behaviour.current = null;
    };
  }, [surface]);

  // A gesture begins where the picture is, wherever following has brought it. The extent is given, as d3-zoom would ask
  // the element, which makes the browser lay out the page in every frame.
  useLayoutEffect(() => {
    if (surface.current === null) return;
    const extent: [[number, number], [number, number]] = [
      [0, 0],
      [size.width, size.height],
    ];
    behaviour.current?.extent(extent).transform(select(surface.current), zoomIdentity.translate(x, y).scale(k));
  }, [surface, size, x, y, k]);

  return {
    camera,
    isFollowing: own === null,
    follow: () => setOwn(null),
    show,
    pan: (dx, dy) => show({ x: x + dx, y: y + dy, k }),
    zoomBy: (factor) => {
      const next = Math.max(MIN_ZOOM, Math.min(MAX_ZOOM, k * factor));
      const [middleX, middleY] = [size.width / 2, size.height / 2];
      show({ x: middleX - ((middleX - x) / k) * next, y: middleY - ((middleY - y) / k) * next, k: next });
    },
  };
}

function moved({ camera, anchor }: Own, now: number): Camera {
  return anchor === null ? camera : { ...camera, x: camera.x - (now - anchor) * camera.k };
}
