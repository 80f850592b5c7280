// What a page shows while something happens, as an animated GIF in its own time.

import gifenc from "gifenc";
import type { Page } from "playwright-core";

export const GIF_SIZE = { width: 900, height: 562 };
/** Of the GIF; the page draws more. */
const FRAMES_PER_SECOND = 10;
/** Between two frames of a page that stands still; then the next frame says how long the one before was seen. */
const LAST_FRAME_MILLISECONDS = 1_500;
const MAX_COLOURS = 200;
/** Frames that the colours are chosen from. */
const NUM_SAMPLES = 8;

interface Frame {
  /** Base64. */
  png: string;
  /** Milliseconds. */
  at: number;
}

/** Records `page`, drawn at `GIF_SIZE`, while `act` goes on. */
export async function filmOf(page: Page, act: () => Promise<void>): Promise<Uint8Array> {
  const frames = thinned(await recorded(page, act));
  const encoder = gifenc.GIFEncoder();
  const palette = await paletteOf(page, frames);
  const transparent = palette.length;
  const colours = [...palette, [0, 0, 0]];
  let before: Uint8Array | null = null;
  for (const [i, { png, at }] of frames.entries()) {
    const shown = gifenc.applyPalette(await pixelsOf(page, png), palette);
    const changes =
      before === null ? shown : shown.map((colour, pixel) => (colour === before?.[pixel] ? transparent : colour));
    encoder.writeFrame(changes, GIF_SIZE.width, GIF_SIZE.height, {
      ...(before === null ? { palette: colours } : { transparent: true, transparentIndex: transparent }),
      delay: (frames[i + 1]?.at ?? at + LAST_FRAME_MILLISECONDS) - at,
      dispose: 1,
    });
    before = shown;
  }
  encoder.finish();
  return encoder.bytes();
}

/** Every frame that the browser drew; some are told of late. */
async function recorded(page: Page, act: () => Promise<void>): Promise<Frame[]> {
  const frames: Frame[] = [];
  const client = await page.context().newCDPSession(page);
  client.on("Page.screencastFrame", ({ data, metadata, sessionId }) => {
    frames.push({ png: data, at: 1000 * (metadata.timestamp ?? 0) });
    void client.send("Page.screencastFrameAck", { sessionId });
  });
  const { width: maxWidth, height: maxHeight } = GIF_SIZE;
  await client.send("Page.startScreencast", { format: "png", maxWidth, maxHeight });
  await act();
  await client.send("Page.stopScreencast");
  return frames.sort((a, b) => a.at - b.at);
}

/** At most `FRAMES_PER_SECOND`, the last one among them. */
function thinned(frames: readonly Frame[]): Frame[] {
  const kept: Frame[] = [];
  for (const frame of frames) {
    const slot = Math.floor((frame.at * FRAMES_PER_SECOND) / 1000);
    const last = kept.at(-1);
    // The latest of a slot: what was to be seen at its end.
    if (last !== undefined && Math.floor((last.at * FRAMES_PER_SECOND) / 1000) === slot) kept.pop();
    kept.push(frame);
  }
  return kept;
}

async function paletteOf(page: Page, frames: readonly Frame[]): Promise<number[][]> {
  const every = Math.max(1, Math.floor(frames.length / NUM_SAMPLES));
  const samples = await Promise.all(frames.filter((_, i) => i % every === 0).map(({ png }) => pixelsOf(page, png)));
  return gifenc.quantize(new Uint8Array(Buffer.concat(samples)), MAX_COLOURS);
}

/** RGBA, row by row; decoded by the browser. */
async function pixelsOf(page: Page, png: string): Promise<Uint8Array> {
  const encoded = await page.evaluate(
    async ({ png, size: { width, height } }) => {
      const bytes = Uint8Array.from(atob(png), (character) => character.charCodeAt(0));
      const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
      const canvas = new OffscreenCanvas(width, height).getContext("2d");
      if (canvas === null) throw new Error("no canvas");
      canvas.drawImage(image, 0, 0, width, height);
      const { data } = canvas.getImageData(0, 0, width, height);
      let text = "";
      for (let i = 0; i < data.length; i += 1 << 15) text += String.fromCharCode(...data.subarray(i, i + (1 << 15)));
      return btoa(text);
    },
    { png, size: GIF_SIZE },
  );
  return new Uint8Array(Buffer.from(encoded, "base64"));
}
