import { createRequire } from "node:module";
import type { AxeResults } from "axe-core";
import type { Page } from "playwright-core";
import { expect } from "vitest";
import { test } from "./support/browser";

const { source: AXE } = createRequire(import.meta.url)("axe-core") as { source: string };
const PROMPT = "Repeat after me, three times: the quick brown fox jumps over the lazy dog.";

/** Colours on their way from one state to the next are nobody's to read: until they have arrived. */
async function settled(): Promise<void> {
  for (let frames = 0; frames < 2; frames += 1) await new Promise(requestAnimationFrame);
  const ending = document
    .getAnimations()
    .filter((animation) => animation.effect?.getComputedTiming().endTime !== Number.POSITIVE_INFINITY);
  await Promise.allSettled(ending.map((animation) => animation.finished));
}

/** What axe finds serious or critical, one line each. */
async function violations(page: Page): Promise<string[]> {
  await page.evaluate(settled);
  // Evaluated by the debugger, which the page's own policy does not bind.
  await page.evaluate(AXE);
  const { violations: found } = await page.evaluate(
    () => (window as unknown as { axe: { run: () => Promise<AxeResults> } }).axe.run() as Promise<AxeResults>,
  );
  return found
    .filter(({ impact }) => impact === "serious" || impact === "critical")
    .flatMap(({ id, nodes }) => nodes.map(({ html, failureSummary }) => `${id}: ${html} ${failureSummary}`));
}

test.for(["dark", "light"] as const)("axe finds nothing serious, %s", async (scheme, { visit }) => {
  const visitor = await visit({ colorScheme: scheme });
  const { page } = visitor;
  expect(await page.locator("html").getAttribute("data-theme")).toBe(scheme);
  const found: Record<string, string[]> = { "first visit": await violations(page) };

  await page.locator(".controls summary").click();
  found.settings = await violations(page);
  await page.getByLabel("Temperature").fill("hot");
  await page.getByText("a setting is wrong").waitFor();
  found["a wrong setting"] = await violations(page);
  await page.getByLabel("Temperature").fill("0");
  await page.getByLabel("Max tokens").fill("60");
  await page.locator(".controls summary").click();

  await page.getByRole("button", { name: "Help" }).click();
  found.help = await violations(page);
  await page.getByRole("button", { name: "Close" }).click();

  await visitor.ask(PROMPT);
  await visitor.ended();
  found["an answer"] = await violations(page);
  await visitor.importFile("wrong.json", "{}");
  await page.getByRole("alert").waitFor();
  found["a refused file"] = await violations(page);

  await visitor.choose("Race");
  found["before a race"] = await violations(page);
  await page.locator("#race-prompt").fill(PROMPT);
  await page.getByRole("button", { name: "Start the race" }).click();
  await page.locator(".race-verdict").waitFor();
  found["a race"] = await violations(page);
  expect(found).toEqual(Object.fromEntries(Object.keys(found).map((state) => [state, []])));
});

test("the colours can be switched, and stay switched", async ({ visit }) => {
  const { page } = await visit({ colorScheme: "light" });
  const theme = () => page.locator("html").getAttribute("data-theme");
  expect(await theme()).toBe("light");
  await page.getByRole("button", { name: "Switch to dark colours" }).click();
  expect(await theme()).toBe("dark");
  await page.reload();
  await page.getByRole("button", { name: "Switch to light colours" }).waitFor();
  expect(await theme()).toBe("dark");
});

test("settings outlast the visit", async ({ visit }) => {
  const visitor = await visit();
  await visitor.mode("Completion");
  await visitor.set({ "Max tokens": "33", Seed: "7" });
  await visitor.page.reload();
  await visitor.ask("The capital of France is");
  await visitor.ended();
  const { request } = visitor.conversation;
  expect(request).toMatchObject({ prompt: "The capital of France is", max_tokens: 33, seed: 7 });
});

/** Presses Tab until the focus is where `selector` says. */
async function tabTo(page: Page, selector: string): Promise<void> {
  for (let presses = 0; presses < 60; presses += 1) {
    await page.keyboard.press("Tab");
    const isThere = await page.evaluate((wanted) => document.activeElement?.matches(wanted) ?? false, selector);
    if (isThere) return;
  }
  throw new Error(`${selector} cannot be reached with Tab`);
}

test("everything goes with the keyboard alone", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await tabTo(page, ".chat-examples button");
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement as Element).outlineStyle);
  expect(outline).not.toBe("none");
  await page.keyboard.press("Enter");
  await visitor.received(3);
  await page.keyboard.press("Escape");
  await visitor.ended(/^(stopped|complete) · /);

  await page.keyboard.press("?");
  await page.getByRole("dialog").waitFor();
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "hidden" });

  await tabTo(page, "#prompt");
  await page.keyboard.type("Is this a question?");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("Say yes.");
  expect(await visitor.prompt.inputValue()).toBe("Is this a question?\nSay yes.");
  expect(await page.getByRole("dialog").count()).toBe(0);
  await page.keyboard.press("Enter");
  await expect.poll(() => visitor.conversations.length).toBe(2);
  await visitor.received(2);
  await page.keyboard.press("Escape");
  await visitor.ended(/^(stopped|complete) · /);

  await tabTo(page, "[role=application]");
  await page.keyboard.press("ArrowLeft");
  await page.locator(".tree-tooltip").waitFor();
  await tabTo(page, ".replay input[type=range]");
  const position = page.locator(".replay-position");
  const before = await position.textContent();
  await page.keyboard.press("ArrowLeft");
  await expect.poll(() => position.textContent()).not.toBe(before);
});

test("a phone shows everything without scrolling sideways", async ({ visit }) => {
  const visitor = await visit({ viewport: { width: 375, height: 720 }, hasTouch: true, isMobile: true });
  const { page } = visitor;
  const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  expect(await overflow()).toBeLessThanOrEqual(0);
  await page.locator(".controls summary").tap();
  expect(await overflow()).toBeLessThanOrEqual(0);
  await page.getByLabel("Max tokens").fill("60");
  await page.locator(".controls summary").tap();
  await visitor.prompt.tap();
  const box = await visitor.prompt.boundingBox();
  expect(box?.width).toBeGreaterThan(250);
  await visitor.prompt.fill(PROMPT);
  await page.getByRole("button", { name: "Send" }).tap();
  await visitor.ended();
  expect(await overflow()).toBeLessThanOrEqual(0);
  expect(await visitor.text()).toBe((await visitor.rest(visitor.conversation.request)).text);
  for (const panel of [".tree-surface", ".replay", ".insight"]) {
    await page.locator(panel).scrollIntoViewIfNeeded();
    expect((await page.locator(panel).boundingBox())?.width, panel).toBeLessThanOrEqual(375);
  }
  await visitor.choose("Race");
  await page.locator("#race-prompt").fill(PROMPT);
  await page.getByRole("button", { name: "Start the race" }).tap();
  await page.locator(".race-verdict").waitFor();
  expect(await overflow()).toBeLessThanOrEqual(0);
});
