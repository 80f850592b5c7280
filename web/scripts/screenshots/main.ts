import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { constants, setPriority, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import type { Browser, BrowserContextOptions, Page } from "playwright-core";
import { launch } from "../../tests/e2e/support/chromium";
import { ROOT } from "../../tests/e2e/support/service";
import { startStack } from "../../tests/e2e/support/stack";
import { filmOf, GIF_SIZE } from "./film";

const IMAGES = join(ROOT, "docs/images");
const RECORDED = join(ROOT, "web/tests/e2e/recorded/answer.json");
const PROMPT = "What is a hash table? Answer in three sentences.";
const VIEWPORT = { width: 1280, height: 800 };
/** Device pixels for one of the page's: sharp where the README is read on a phone. */
const SHARPNESS = 1.5;
/** A step from here on is shown: the trunk should have come some way. */
const FIRST_STEP = 12;
/** Nodes behind it belong to chains, which say less. */
const BUSH_DEPTH = 3;

export async function main(args: string[]): Promise<void> {
  const { values } = parseArgs({ args, options: { record: { type: "boolean", default: false } } });
  const folder = await mkdtemp(join(tmpdir(), "gorgon-screenshots-"));
  const { stack, service } = await startStack(folder);
  // Where there is no graphics card drawing takes cores from the engine: it goes first, as if there were one.
  setPriority(constants.priority.PRIORITY_BELOW_NORMAL);
  const browser = await launch();
  try {
    const studio = new Studio(browser, stack.url);
    if (values.record) await writeFile(RECORDED, await studio.record());
    const run = await readFile(RECORDED, "utf8");
    for (const scheme of ["dark", "light"] as const) await keep(`${scheme}.png`, await studio.step(run, scheme));
    await keep("race.png", await studio.race());
    await keep("gorgon.gif", await studio.film());
  } finally {
    await browser.close();
    await service.stop();
    await rm(folder, { recursive: true });
  }
}

async function keep(name: string, image: Uint8Array): Promise<void> {
  await writeFile(join(IMAGES, name), image);
  console.log(`${name}: ${Math.ceil(image.length / 1000)} kB`);
}

class Studio {
  readonly #browser: Browser;
  readonly #url: string;

  constructor(browser: Browser, url: string) {
    this.#browser = browser;
    this.#url = url;
  }

  /** A run as the page exports it. */
  record(): Promise<string> {
    return this.#visit({}, async (page) => {
      await ask(page);
      await ended(page);
      const [download] = await Promise.all([
        page.waitForEvent("download"),
        page.getByRole("button", { name: "Export" }).click(),
      ]);
      return readFile(await download.path(), "utf8");
    });
  }

  /** The same run gives the same picture. */
  step(run: string, colorScheme: "dark" | "light"): Promise<Uint8Array> {
    return this.#visit({ colorScheme, reducedMotion: "reduce" }, async (page) => {
      const file = { name: "answer.json", mimeType: "application/json", buffer: Buffer.from(run) };
      await page.getByLabel("Run to import").setInputFiles(file);
      await seek(page, bestStep(run));
      await page.getByRole("slider", { name: "Step" }).blur();
      await settled(page);
      return page.screenshot();
    });
  }

  race(): Promise<Uint8Array> {
    return this.#visit({ colorScheme: "dark" }, async (page) => {
      await page.getByRole("navigation").getByRole("button", { name: "Race" }).click();
      await page.locator("#race-prompt").fill(PROMPT);
      await page.getByRole("button", { name: "Start the race" }).click();
      await page.locator(".race-verdict").waitFor({ timeout: 60_000 });
      await settled(page);
      return page.screenshot();
    });
  }

  /** An answer as it is written, then its steps once more, at a quarter of the speed. */
  film(): Promise<Uint8Array> {
    const options = { colorScheme: "dark" as const, deviceScaleFactor: GIF_SIZE.width / VIEWPORT.width };
    return this.#visit(options, async (page) =>
      filmOf(page, async () => {
        await ask(page);
        await ended(page);
        await page.waitForTimeout(700);
        await page.getByRole("combobox", { name: "Speed of the replay" }).selectOption("0.25");
        await seek(page, 10);
        await page.waitForTimeout(400);
        await page.getByRole("button", { name: "Play" }).click();
        await page.waitForTimeout(4_500);
      }),
    );
  }

  async #visit<Result>(options: BrowserContextOptions, work: (page: Page) => Promise<Result>): Promise<Result> {
    const context = await this.#browser.newContext({ viewport: VIEWPORT, deviceScaleFactor: SHARPNESS, ...options });
    try {
      const page = await context.newPage();
      await page.goto(this.#url);
      await page.getByText("smollm2").first().waitFor();
      return await work(page);
    } finally {
      await context.close();
    }
  }
}

async function ask(page: Page): Promise<void> {
  await page.locator("#prompt").fill(PROMPT);
  await page.keyboard.press("Enter");
}

async function ended(page: Page): Promise<void> {
  await page.locator(".chat .status").filter({ hasText: "tokens/s" }).waitFor({ timeout: 60_000 });
}

async function seek(page: Page, position: number): Promise<void> {
  await page.getByRole("slider", { name: "Step" }).fill(String(position));
}

/** Fonts are there, and two frames were drawn. */
async function settled(page: Page): Promise<void> {
  await page.evaluate(async () => {
    await document.fonts.ready;
    for (let frame = 0; frame < 2; frame += 1) await new Promise((resolve) => requestAnimationFrame(resolve));
  });
}

/** Position of a step with a bushy tree of which something was accepted. */
function bestStep(json: string): number {
  const { run } = JSON.parse(json) as { run: { steps: RecordedStep[] } };
  const worth = run.steps.map(({ numAccepted, tree }, step) => {
    if (step < FIRST_STEP || numAccepted === 0) return -1;
    return Math.min(numAccepted, BUSH_DEPTH) + 2 * (tree?.depths.filter((depth) => depth <= BUSH_DEPTH).length ?? 0);
  });
  return 1 + worth.indexOf(Math.max(...worth));
}

interface RecordedStep {
  numAccepted: number;
  tree: { depths: number[] } | null;
}
