import type { CameraControl } from "./useCamera";
import "./controls.css";

export const ZOOM_FACTOR = 1.3;

/** Zoom, fit and follow. */
export function TreeControls({ control, onFit }: { control: CameraControl; onFit: () => void }) {
  return (
    <div className="tree-controls" role="toolbar" aria-label="View of the tree">
      <button type="button" aria-label="Zoom out" title="Zoom out (-)" onClick={() => control.zoomBy(1 / ZOOM_FACTOR)}>
        <Icon path="M3 8h10" />
      </button>
      <button type="button" aria-label="Zoom in" title="Zoom in (+)" onClick={() => control.zoomBy(ZOOM_FACTOR)}>
        <Icon path="M3 8h10M8 3v10" />
      </button>
      <button type="button" aria-label="Fit the step's tree" title="Fit the step's tree (0)" onClick={onFit}>
        <Icon path="M2.5 6V2.5H6M10 2.5h3.5V6M13.5 10v3.5H10M6 13.5H2.5V10" />
      </button>
      <button
        type="button"
        className="tree-controls__follow"
        aria-pressed={control.isFollowing}
        title="Follow the newest step (f)"
        onClick={control.follow}
      >
        <Icon path="M2 8h8M7 4l4 4-4 4M13.5 3v10" />
        Follow
      </button>
    </div>
  );
}

function Icon({ path }: { path: string }) {
  return (
    <svg className="tree-icon" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">
      <path d={path} />
    </svg>
  );
}
