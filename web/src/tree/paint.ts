// The picture on a canvas: what SVG shows, for more nodes than SVG can move.

import type { Camera, Size } from "./camera";
import { type Box, FONT_SIZE, NODE_HEIGHT } from "./geometry";
import { LINK_STYLES, pathLinks, rejectedLinks } from "./links";
import { type PlacedStep, type Scene, START } from "./scene";
import { boxesPath, cornerRadius } from "./shapes";

/** CSS colours. */
export interface Palette {
  text: string;
  surface: string;
  border: string;
  accent: string;
  accepted: string;
  rejected: string;
  draft: string;
}

/** Draw `scene` on a canvas of `size` CSS pixels, `ratio` device pixels each. */
export function paintScene(
  context: CanvasRenderingContext2D,
  scene: Scene,
  camera: Camera,
  size: Size,
  ratio: number,
  palette: Palette,
  font: string,
): void {
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, size.width, size.height);
  context.font = `${FONT_SIZE}px ${font}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  // Relative to the shown step: single precision does not reach over a long run.
  const { k } = camera;
  context.setTransform(ratio * k, 0, 0, ratio * k, ratio * (camera.x + scene.anchor * k), ratio * camera.y);
  for (const placed of scene.fading) paintEmbers(context, placed, scene.anchor, palette);
  if (scene.current !== null) paintBranches(context, scene.current, scene.anchor, palette);
  paintTrunk(context, scene, palette);
  context.globalAlpha = 1;
}

function paintEmbers(context: CanvasRenderingContext2D, placed: PlacedStep, anchor: number, palette: Palette): void {
  context.save();
  context.translate(placed.x - anchor, 0);
  context.globalAlpha = 0.2;
  context.strokeStyle = palette.rejected;
  context.lineWidth = 1;
  context.stroke(new Path2D(rejectedLinks(placed).join("")));
  context.restore();
}

function paintBranches(context: CanvasRenderingContext2D, placed: PlacedStep, anchor: number, palette: Palette): void {
  context.save();
  context.translate(placed.x - anchor, 0);
  context.strokeStyle = palette.rejected;
  rejectedLinks(placed).forEach((path, style) => {
    context.lineWidth = LINK_STYLES[style]?.width ?? 1;
    context.globalAlpha = 0.7 * (LINK_STYLES[style]?.opacity ?? 1);
    context.stroke(new Path2D(path));
  });
  context.globalAlpha = 1;
  context.lineWidth = 1;
  for (const isLookup of [false, true]) {
    const boxes = new Path2D(boxesPath(placed.rejected.filter((node) => node.isLookup === isLookup)));
    context.fillStyle = palette.surface;
    context.fill(boxes);
    context.setLineDash(isLookup ? [3, 2] : []);
    context.stroke(boxes);
  }
  context.setLineDash([]);
  context.fillStyle = palette.rejected;
  for (const node of placed.rejected) paintLabel(context, node, node.label);
  context.restore();
  context.save();
  context.translate(placed.x - anchor, 0);
  for (const { path, style, isDraft } of pathLinks(placed)) {
    context.strokeStyle = isDraft ? palette.accepted : palette.accent;
    context.lineWidth = style.width;
    context.stroke(new Path2D(path));
  }
  context.restore();
}

function paintTrunk(context: CanvasRenderingContext2D, scene: Scene, palette: Palette): void {
  const { tokens, anchor } = scene;
  const start = tokens[0]?.index === 0 ? START.x : Math.min(tokens[0]?.x ?? anchor, anchor);
  context.strokeStyle = palette.accent;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(start - anchor, 0);
  context.lineTo(0, 0);
  context.stroke();
  for (const token of tokens) {
    context.beginPath();
    const [x, y] = [token.x - anchor, token.y - NODE_HEIGHT / 2];
    context.roundRect(x, y, token.width, NODE_HEIGHT, cornerRadius(token.isLookup));
    context.fillStyle = palette.surface;
    context.fill();
    if (token.isDraft) {
      context.fillStyle = token.isNew ? palette.accepted : palette.draft;
      context.fill();
    }
    context.strokeStyle = token.isDraft ? palette.accepted : palette.border;
    context.lineWidth = 1;
    context.setLineDash(token.isLookup ? [3, 2] : []);
    context.stroke();
    context.fillStyle = token.isDraft && token.isNew ? palette.surface : palette.text;
    paintLabel(context, { ...token, x }, token.label);
  }
  context.setLineDash([]);
}

function paintLabel(context: CanvasRenderingContext2D, { x, y, width }: Box, label: string): void {
  context.fillText(label, x + width / 2, y + 0.5);
}
