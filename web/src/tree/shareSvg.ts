// The shown step as a picture to pass on: an SVG that needs nothing from outside.

import { type Run, textOf } from "../run/run";
import type { GenerateRequest } from "../wire/messages";
import { FollowZoom, followCamera, viewOf, wantedZoom } from "./camera";
import { caption } from "./describe";
import { type Box, FONT_SIZE, NODE_HEIGHT } from "./geometry";
import { shorten } from "./label";
import { LINK_STYLES, pathLinks, rejectedLinks } from "./links";
import type { Palette } from "./paint";
import { type PlacedStep, type Scene, START, TreeModel, type TrunkToken } from "./scene";
import { boxesPath, cornerRadius } from "./shapes";
import { type Markup, xml } from "./xml";

/** As the previews of links want it. */
export const SHARE_SIZE = { width: 1200, height: 630 } as const;

const MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
const MARGIN = 48;
const TREE = { top: 168, width: SHARE_SIZE.width, height: 370 } as const;
/** Columns of the prompt that are shown. */
const PROMPT_WIDTH = 88;

/** The picture of the step at `position`. Raises nothing: without a step it shows the prompt alone. */
export function shareSvg(run: Run, position: number, palette: Palette): string {
  const model = new TreeModel(run);
  const { anchor, bounds } = model.shown(position);
  const camera = followCamera(anchor, bounds, TREE, FollowZoom.at(wantedZoom(bounds, TREE)));
  const view = viewOf(camera, TREE);
  const scene = model.scene(position, view.left, view.right);
  const { k } = camera;
  const { width, height } = SHARE_SIZE;
  const picture = xml(
    "svg",
    { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, "font-family": SANS },
    xml("title", {}, `Gorgon, ${caption(run, scene.step)}`),
    xml("clipPath", { id: "tree" }, xml("rect", { width, height: TREE.height })),
    xml("rect", { width, height, fill: palette.surface }),
    header(run, position, palette),
    xml(
      "g",
      { transform: `translate(0 ${TREE.top})`, "clip-path": "url(#tree)" },
      xml(
        "g",
        {
          // Relative to the shown step: single precision does not reach over a long run.
          transform: `translate(${camera.x + anchor * k} ${camera.y}) scale(${k})`,
          "font-family": MONO,
          "font-size": FONT_SIZE,
          "text-anchor": "middle",
        },
        ...(scene.current === null ? [] : branches(scene.current, anchor, palette)),
        ...trunk(scene, palette),
      ),
    ),
    footer(run, scene, palette),
  );
  return picture.source;
}

/** `gorgon-2026-11-25-step-41.svg`. */
export function shareName(run: Run, step: number, extension: "svg" | "png"): string {
  return `gorgon-${run.startedAt.slice(0, 10)}-step-${step}.${extension}`;
}

export function promptOf(request: GenerateRequest): string {
  const { prompt, messages, prompt_token_ids: ids } = request;
  if (typeof prompt === "string") return prompt;
  const question = messages?.findLast((message) => message.role === "user");
  return question?.content ?? `a prompt of ${ids?.length ?? 0} token ids`;
}

function header(run: Run, position: number, palette: Palette): Markup {
  const step = run.steps[position - 1];
  const { tokensPerSecond, speedup } = step ?? { tokensPerSecond: null, speedup: null };
  const right = SHARE_SIZE.width - MARGIN;
  const speed = tokensPerSecond === null ? "" : `${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} tokens/s`;
  return xml(
    "g",
    {},
    xml(
      "text",
      { x: MARGIN, y: 74, "font-size": 34, "font-weight": 700, fill: palette.text },
      "Gorgon",
      xml("tspan", { dx: 18, "font-size": 20, "font-weight": 400, fill: palette.accent }, run.model ?? ""),
    ),
    xml(
      "text",
      { x: MARGIN, y: 122, "font-size": 19, "font-family": MONO, fill: palette.text, opacity: 0.8 },
      `“${shorten(promptOf(run.request).replace(/\s+/g, " ").trim(), PROMPT_WIDTH)}”`,
    ),
    xml(
      "text",
      { x: right, y: 74, "font-size": 34, "font-weight": 700, "text-anchor": "end", fill: palette.text },
      speed,
    ),
    xml(
      "text",
      { x: right, y: 106, "font-size": 20, "font-weight": 600, "text-anchor": "end", fill: palette.accepted },
      speedup === null ? "" : `${speedup.toFixed(1)}× plain decoding`,
    ),
  );
}

function footer(run: Run, scene: Scene, palette: Palette): Markup {
  const y = SHARE_SIZE.height - 40;
  const text = { y, "font-size": 18, fill: palette.text, opacity: 0.8 };
  const numTokens = scene.tokens.at(-1)?.index ?? -1;
  const words = textOf(run, scene.step + 1).trim() === "" ? "" : `, ${numTokens + 1} tokens written`;
  return xml(
    "g",
    {},
    xml("path", { d: `M${MARGIN} ${y - 36}H${SHARE_SIZE.width - MARGIN}`, stroke: palette.border }),
    xml("text", { ...text, x: MARGIN }, `${caption(run, scene.step)}${words}`),
    xml("text", { ...text, x: SHARE_SIZE.width - MARGIN, "text-anchor": "end" }, run.startedAt.slice(0, 10)),
  );
}

function branches(placed: PlacedStep, anchor: number, palette: Palette): Markup[] {
  const rejected = rejectedLinks(placed).map((path, style) => {
    const { width, opacity } = LINK_STYLES[style] ?? { width: 1, opacity: 1 };
    return xml("path", { d: path, "stroke-width": width, "stroke-opacity": opacity });
  });
  const boxes = [false, true].map((isLookup) =>
    xml("path", {
      d: boxesPath(placed.rejected.filter((node) => node.isLookup === isLookup)),
      fill: palette.surface,
      "stroke-dasharray": isLookup ? "4 2.5" : undefined,
    }),
  );
  const links = pathLinks(placed).map(({ path, style, isDraft }) =>
    xml("path", {
      d: path,
      stroke: isDraft ? palette.accepted : palette.accent,
      "stroke-width": style.width,
      "stroke-dasharray": isDraft ? undefined : "1 3",
    }),
  );
  const labels = placed.rejected.map((node) => labelOf(node, node.label));
  const transform = `translate(${placed.x - anchor} 0)`;
  return [
    xml("g", { transform, fill: "none", stroke: palette.rejected }, ...rejected, ...boxes, ...links),
    xml("g", { transform, fill: palette.rejected }, ...labels),
  ];
}

function trunk({ tokens, anchor }: Scene, palette: Palette): Markup[] {
  const start = tokens[0]?.index === 0 ? START.x : Math.min(tokens[0]?.x ?? anchor, anchor);
  const line = xml("path", { d: `M${start - anchor} 0H0`, stroke: palette.accent, "stroke-width": 2 });
  return [line, ...tokens.flatMap((token) => tokenNode(token, anchor, palette))];
}

function tokenNode(token: TrunkToken, anchor: number, palette: Palette): Markup[] {
  const x = token.x - anchor;
  const fresh = token.isNew ? palette.accepted : palette.draft;
  const box = xml("rect", {
    x,
    y: -NODE_HEIGHT / 2,
    width: token.width,
    height: NODE_HEIGHT,
    rx: cornerRadius(token.isLookup),
    fill: token.isDraft ? fresh : palette.surface,
    stroke: token.isDraft ? palette.accepted : token.isNew ? palette.accent : palette.border,
    "stroke-dasharray": token.isLookup ? "4 2.5" : undefined,
  });
  const colour = token.isDraft && token.isNew ? palette.surface : palette.text;
  return [box, xml("g", { fill: colour }, labelOf({ ...token, x }, token.label))];
}

function labelOf({ x, y, width }: Box, label: string): Markup {
  return xml("text", { x: x + width / 2, y: y + NODE_HEIGHT / 5 }, label);
}
