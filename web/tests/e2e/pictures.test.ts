import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { expect } from "vitest";
import { test } from "./support/browser";
import { ROOT } from "./support/service";
import type { Visit } from "./support/visit";

const RECORDED = join(import.meta.dirname, "recorded/answer.json");
const MAX_GIF_BYTES = 3_000_000;
const MAX_PNG_BYTES = 1_000_000;

test("a recorded run gives the same picture each time", async ({ visit }) => {
  const run = await readFile(RECORDED, "utf8");
  const picture = async (visitor: Visit, step: number) => {
    const { page } = visitor;
    await visitor.importFile("answer.json", run);
    await visitor.seek(step + 1);
    await page
      .locator(".tree-caption")
      .filter({ hasText: `step ${step}: ` })
      .waitFor();
    return page.locator(".tree-surface").screenshot({ animations: "disabled" });
  };
  const calm = { reducedMotion: "reduce" } as const;
  const [one, other] = [await visit(calm), await visit(calm)];
  const first = await picture(one, 12);
  expect(first.equals(await picture(other, 12))).toBe(true);
  expect(first.equals(await picture(other, 13))).toBe(false);
});

test("the pictures in the documents are there, and small", async () => {
  const image = (name: string) => readFile(join(ROOT, "docs/images", name));
  for (const name of ["dark.png", "light.png", "race.png"]) {
    const png = await image(name);
    expect(png.subarray(1, 4).toString(), name).toBe("PNG");
    expect(png.length, name).toBeLessThan(MAX_PNG_BYTES);
  }
  const gif = await image("gorgon.gif");
  expect(gif.subarray(0, 6).toString()).toBe("GIF89a");
  expect(gif.length).toBeLessThan(MAX_GIF_BYTES);
});
