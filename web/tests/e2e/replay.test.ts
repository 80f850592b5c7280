import { readFile } from "node:fs/promises";
import { expect } from "vitest";
import { test } from "./support/browser";
import { type RunFile, textOfSteps, type Visit } from "./support/visit";

const PROMPT = "List ten fruits, one a line, in alphabetical order.";

async function exported({ page }: Visit): Promise<string> {
  const [download] = await Promise.all([
    page.waitForEvent("download"),
    page.getByRole("button", { name: "Export" }).click(),
  ]);
  return readFile(await download.path(), "utf8");
}

test("scrubbing shows the text and the tree of a step, and goes back to the end", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await visitor.set({ "Max tokens": "100" });
  await visitor.ask(PROMPT);
  await visitor.ended();
  const whole = await visitor.text();
  const { steps } = visitor.conversation;
  const middle = Math.ceil(steps.length / 2);
  const shows = async (position: number) => {
    await page
      .locator(".replay-position")
      .filter({ hasText: `step ${position - 1} of ` })
      .waitFor();
    await page
      .locator(".tree-caption")
      .filter({ hasText: `step ${position - 1}: ` })
      .waitFor();
    expect(await visitor.text()).toBe(textOfSteps(steps, position));
  };

  await visitor.seek(middle);
  await shows(middle);
  await page.getByRole("button", { name: "One step forward" }).click();
  await shows(middle + 1);
  await page.getByRole("slider", { name: "Step" }).press("ArrowLeft");
  await page.getByRole("button", { name: "One step back" }).click();
  await shows(middle - 1);
  await page.getByRole("button", { name: "End", exact: true }).click();
  await expect.poll(() => visitor.text()).toBe(whole);
});

test("a run that still grows is looked at in the past, and followed again", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await visitor.mode("Completion");
  await visitor.set({ "Max tokens": "4000" });
  await visitor.ask("1, 2, 3, 4, 5, 6,");
  await visitor.received(12);
  await visitor.seek(4);
  await visitor.received(30);
  expect(await visitor.text()).toBe(textOfSteps(visitor.conversation.steps, 4));
  await page.getByRole("button", { name: "Live" }).click();
  await visitor.received(visitor.conversation.steps.length + 1);
  await expect
    .poll(async () => (await visitor.text()).length)
    .toBeGreaterThan(textOfSteps(visitor.conversation.steps, 30).length);
  await page.getByRole("button", { name: "Stop" }).click();
  await visitor.ended(/^stopped/);
});

test("an exported run is the same in another visitor's page", async ({ visit }) => {
  const visitor = await visit();
  await visitor.set({ "Max tokens": "80", Temperature: "0.7" });
  await visitor.ask(PROMPT);
  await visitor.ended();
  const { steps, request, end } = visitor.conversation;
  const content = await exported(visitor);
  const { run } = JSON.parse(content) as RunFile;
  expect(run.request).toEqual(request);
  expect(run.steps.map(({ tokens }) => tokens.map(({ id }) => id))).toEqual(steps.map(({ token_ids }) => token_ids));

  const other = await visit();
  await other.importFile("run.json", content);
  await other.page.getByText("Imported from a file").waitFor();
  expect(await other.text()).toBe(await visitor.text());
  const middle = Math.ceil(steps.length / 2);
  for (const { page } of [visitor, other]) {
    await page.getByRole("slider", { name: "Step" }).fill(String(middle));
    await page
      .locator(".tree-caption")
      .filter({ hasText: `step ${middle - 1}: ` })
      .waitFor();
  }
  const [summary, same] = await Promise.all(
    [visitor, other].map(({ page }) => page.locator(".tree-summary").textContent()),
  );
  expect(same).toBe(summary);
  expect(JSON.parse(await exported(other))).toEqual(JSON.parse(content));
  expect(end?.type).toBe("finished");
  expect(other.conversations).toEqual([]);
});

function damaged(damage: (file: { version: number; run: Record<string, unknown> }) => void) {
  return (content: string) => {
    const file = JSON.parse(content) as { version: number; run: Record<string, unknown> };
    damage(file);
    return JSON.stringify(file);
  };
}

const BROKEN: Record<string, (content: string) => string> = {
  "no JSON": () => "<script>alert(1)</script>",
  "cut off": (content) => content.slice(0, content.length / 2),
  "another version": damaged((file) => {
    file.version = 99;
  }),
  "no steps": damaged(({ run }) => {
    delete run.steps;
  }),
  "a parent that is no node": (content) => content.replace(/"parents":\[-1/, '"parents":[7777'),
  "a huge number": (content) => content.replace(/"at":[\d.]+/, '"at":1e999'),
  "markup for a time": damaged(({ run }) => {
    run.startedAt = "<img src=x onerror=alert(1)>";
  }),
};

test("a file that is no run is refused in one line, and what is shown stays", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await visitor.set({ "Max tokens": "40" });
  await visitor.ask(PROMPT);
  await visitor.ended();
  const text = await visitor.text();
  const content = await exported(visitor);
  for (const [name, damage] of Object.entries(BROKEN)) {
    const broken = damage(content);
    expect(broken, name).not.toBe(content);
    await visitor.importFile(`${name}.json`, broken);
    const alert = page.getByRole("alert").filter({ hasText: `${name}.json: ` });
    await alert.waitFor();
    expect(await page.getByRole("alert").count(), name).toBe(1);
    expect((await alert.textContent())?.length, name).toBeLessThan(200);
    expect(await visitor.text(), name).toBe(text);
  }
  await page.getByRole("button", { name: "Dismiss" }).click();
  await visitor.importFile("mended.json", content);
  await page.getByText("Imported from a file").waitFor();
  expect(await page.getByRole("alert").count()).toBe(0);
});

test("markup in a file is text: in the answer, the tree, its tooltip and the picture", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await visitor.set({ "Max tokens": "40" });
  await visitor.ask(PROMPT);
  await visitor.ended();
  const markup = `<img src=x onerror="document.title='gone'"><script>document.title='gone'</script>`;
  const file = JSON.parse(await exported(visitor)) as {
    run: {
      model: string;
      request: { messages: { content: string }[] };
      steps: { tokens: { text: string }[]; tree: { candidates: string[]; sources: string[] } | null }[];
    };
  };
  file.run.model = markup;
  for (const message of file.run.request.messages) message.content = markup;
  for (const { tokens, tree } of file.run.steps) {
    for (const token of tokens) token.text = markup;
    if (tree === null) continue;
    tree.candidates = tree.candidates.map(() => markup);
    tree.sources = tree.sources.map(() => markup);
  }
  await visitor.importFile("markup.json", JSON.stringify(file));
  await page.getByText("Imported from a file").waitFor();
  expect(await visitor.text()).toContain(markup + markup);
  const withTree = file.run.steps.findIndex(({ tree }) => tree !== null);
  await visitor.seek(withTree + 1);
  await page.getByRole("application").press("ArrowRight");
  await page.locator(".tree-tooltip").waitFor();
  const [download] = await Promise.all([
    page.waitForEvent("download"),
    page.getByRole("button", { name: "SVG" }).click(),
  ]);
  const svg = await readFile(await download.path(), "utf8");
  expect(svg).toContain("&lt;img");
  expect(svg).not.toMatch(/<(img|script)/);
  expect(await page.locator("body img, body script").count()).toBe(0);
  expect(await page.title()).toBe("Gorgon");
});
