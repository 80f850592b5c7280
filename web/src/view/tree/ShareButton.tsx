import { useRef, useState } from "react";
import { SHARE_SIZE, shareName, shareSvg } from "../../tree/shareSvg";
import { download } from "../download";
import { type RunProps, useVersion } from "../hooks";
import { paletteOf } from "./palette";
import "./controls.css";

/** Device pixels of the PNG for one of the picture's. */
const PNG_SCALE = 2;

/** Saves the shown step's tree as a picture. */
export function ShareButton({ store, player }: RunProps) {
  useVersion(store);
  useVersion(player);
  const group = useRef<HTMLFieldSetElement>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const { run } = store;

  const save = async (extension: "svg" | "png") => {
    if (group.current === null) return;
    const { position } = player;
    const svg = new Blob([shareSvg(run, position, paletteOf(getComputedStyle(group.current)))], {
      type: "image/svg+xml",
    });
    try {
      download(extension === "svg" ? svg : await pngOf(svg), shareName(run, position - 1, extension));
      setProblem(null);
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
    }
  };

  const isEmpty = player.position === 0;
  return (
    <fieldset ref={group} className="tree-share" aria-label="Save a picture of the tree">
      <button type="button" disabled={isEmpty} title="Save this step's tree as SVG" onClick={() => save("svg")}>
        SVG
      </button>
      <button type="button" disabled={isEmpty} title="Save this step's tree as PNG" onClick={() => save("png")}>
        PNG
      </button>
      {problem !== null && <span role="alert">{problem}</span>}
    </fieldset>
  );
}

async function pngOf(svg: Blob): Promise<Blob> {
  const url = URL.createObjectURL(svg);
  try {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = PNG_SCALE * SHARE_SIZE.width;
    canvas.height = PNG_SCALE * SHARE_SIZE.height;
    canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
    const png = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/png"));
    if (png === null) throw new Error("This browser gave no PNG: save the SVG.");
    return png;
  } finally {
    URL.revokeObjectURL(url);
  }
}
