// The browser, and watched pages in it: whatever a test does, nothing may go wrong behind the picture.

import type { Browser, BrowserContextOptions, Page } from "playwright-core";
import { test as base, expect, inject } from "vitest";
import { launch } from "./chromium";
import { Visit } from "./visit";

const PATIENCE_MILLISECONDS = 15_000;

interface VisitOptions extends BrowserContextOptions {
  /** Of the gateway; the shared one's if not given. */
  url?: string;
  /** What the console may say because the test has provoked it. */
  expected?: RegExp;
}

interface Fixtures {
  browser: Browser;
  /** Opens the page as a new visitor, in a profile of its own. Its problems fail the test. */
  visit: (options?: VisitOptions) => Promise<Visit>;
}

export const test = base.extend<Fixtures>({
  browser: [
    // biome-ignore lint/correctness/noEmptyPattern: vitest reads the names of fixtures out of the pattern.
    async ({}, use) => {
      const browser = await launch();
      await use(browser);
      await browser.close();
    },
    { scope: "file" },
  ],
  visit: async ({ browser }, use) => {
    const visits: Visit[] = [];
    const problems: string[] = [];
    await use(async ({ url = inject("stack").url, expected, ...options } = {}) => {
      const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
      context.setDefaultTimeout(PATIENCE_MILLISECONDS);
      context.on("page", (page) => watch(page, url, problems, expected));
      const visit = new Visit(await context.newPage(), url);
      visits.push(visit);
      await visit.open();
      return visit;
    });
    for (const { page } of visits) await page.context().close();
    expect(problems).toEqual([]);
  },
});

/** Collects what a person with the developer tools open would see in red, and requests to anywhere else. */
export function watch(page: Page, url: string, problems: string[], expected?: RegExp): void {
  const origin = new URL(url).host;
  const isElsewhere = (address: string) =>
    !["data:", "blob:"].includes(new URL(address).protocol) && new URL(address).host !== origin;
  page.on("console", (message) => {
    const text = message.text();
    const isBad = message.type() === "error" || message.type() === "warning";
    if (isBad && expected?.test(text) !== true) problems.push(`console ${message.type()}: ${text}`);
  });
  page.on("pageerror", (error) => problems.push(`uncaught: ${error.stack ?? error.message}`));
  page.on("crash", () => problems.push("the page crashed"));
  page.on("request", (request) => {
    if (isElsewhere(request.url())) problems.push(`request to ${request.url()}`);
  });
  page.on("websocket", (socket) => {
    if (isElsewhere(socket.url())) problems.push(`socket to ${socket.url()}`);
  });
}
