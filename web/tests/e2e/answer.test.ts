import { expect } from "vitest";
import { test } from "./support/browser";
import { textOfSteps } from "./support/visit";

test("a first visitor chooses an example and reads the answer as it is written", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await page.evaluate(() => {
    const texts: string[] = [];
    Object.assign(window, { texts });
    new MutationObserver(() => {
      const text = document.querySelector(".stream")?.textContent ?? "";
      if (text !== texts.at(-1)) texts.push(text);
    }).observe(document.body, { subtree: true, childList: true, characterData: true });
  });
  await page.getByRole("button", { name: "What is a hash table?" }).click();
  const end = await visitor.ended();

  const { request, steps } = visitor.conversation;
  const text = await visitor.text();
  const seen = await page.evaluate(() => (window as unknown as { texts: string[] }).texts);
  expect(seen.length).toBeGreaterThan(4);
  expect(seen.filter((early) => !text.startsWith(early))).toEqual([]);
  expect(text).toBe((await visitor.rest(request)).text);
  expect(end).toMatch(/ \d+ tokens · [\d.]+ tokens\/s · [\d.]+x plain decoding · [\d.]+ tokens a step$/);
  expect(steps.length).toBeGreaterThan(10);
  expect(await page.locator(".stream-draft").count()).toBeGreaterThan(0);
  await page.getByRole("figure", { name: /tokens/ }).waitFor();
});

test("the answer of a seed drawn by the page can be repeated, and a seed that was set is kept", async ({ visit }) => {
  const visitor = await visit();
  await visitor.set({ Temperature: "0.8", "Max tokens": "40" });
  await visitor.ask("Name a colour and say why you like it.");
  await visitor.ended();
  const { request } = visitor.conversation;
  expect(request.seed).toBeGreaterThanOrEqual(0);
  expect(await visitor.text()).toBe((await visitor.rest(request)).text);

  await visitor.set({ Seed: "4242" });
  await visitor.ask("Another one.");
  await expect.poll(() => visitor.conversations.length).toBe(2);
  await visitor.ended();
  const second = visitor.conversation.request;
  expect(second.seed).toBe(4242);
  // The conversation goes on: the first turn and its answer go along.
  expect(second.messages?.map(({ role }) => role)).toEqual(["user", "assistant", "user"]);
  expect(await visitor.text()).toBe((await visitor.rest(second)).text);
});

test.for(["button", "Escape"])("a long answer is stopped by %s, and the engine is idle", async (how, { visit }) => {
  const visitor = await visit();
  await visitor.mode("Completion");
  await visitor.set({ "Max tokens": "4000" });
  await visitor.ask("1, 2, 3, 4, 5, 6,");
  await visitor.received(8);
  if (how === "Escape") await visitor.page.keyboard.press("Escape");
  else await visitor.page.getByRole("button", { name: "Stop" }).click();
  expect(await visitor.ended(/^stopped · /)).toMatch(/^stopped · \d+ tokens/);

  const { end, steps } = visitor.conversation;
  expect(end).toMatchObject({ type: "finished", finish_reason: "cancelled" });
  expect(await visitor.text()).toBe(textOfSteps(steps) + (end?.type === "finished" ? end.text : ""));
  await expect.poll(() => visitor.numRunning()).toBe(0);
  await visitor.page.getByRole("button", { name: "Continue" }).waitFor();
});

test("two tabs are answered at once, both rightly", async ({ visit }) => {
  const first = await visit();
  const second = await visit();
  for (const visitor of [first, second]) await visitor.set({ "Max tokens": "200" });
  await Promise.all([
    first.ask("Write a long story about a lighthouse keeper."),
    second.ask("List fifty fruits, one a line."),
  ]);
  await Promise.all([first.ended(), second.ended()]);
  const [one, other] = [first.conversation, second.conversation];
  expect(Math.max(one.time.first, other.time.first)).toBeLessThan(Math.min(one.time.last, other.time.last));
  for (const visitor of [first, second]) {
    expect(await visitor.text()).toBe((await visitor.rest(visitor.conversation.request)).text);
  }
  expect(await first.text()).not.toBe(await second.text());
});

test("what the model writes is text, also where it is HTML", async ({ visit }) => {
  const visitor = await visit();
  const line = `<img src="x" onerror="document.title = 'gone'"><script>document.title = "gone"</script>\n`;
  await visitor.mode("Completion");
  await visitor.set({ "Max tokens": "90" });
  await visitor.ask(line.repeat(6));
  await visitor.ended();
  const text = await visitor.text();
  expect(text).toContain("<script>");
  expect(text).toContain("onerror");
  expect(text).toBe((await visitor.rest(visitor.conversation.request)).text);
  expect(await visitor.page.locator("body img, body script, .stream :not(span)").count()).toBe(0);
  expect(await visitor.page.title()).toBe("Gorgon");
});
