import { expect } from "vitest";
import { test } from "./support/browser";

const PROMPT = "Explain to a child why the sky is blue.";

test("a race ends with equal texts, both lanes' figures and their ratio", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await visitor.set({ "Max tokens": "120" });
  await visitor.choose("Race");
  await page.locator("#race-prompt").fill(PROMPT);
  await page.getByRole("button", { name: "Start the race" }).click();
  const verdict = page.locator(".race-verdict");
  await verdict.waitFor({ timeout: 60_000 });

  const [plain, speculative] = visitor.conversations;
  if (plain === undefined || speculative === undefined) throw new Error("two lanes, two sockets");
  expect(visitor.conversations.length).toBe(2);
  expect(plain.request.speculation?.enabled).toBe(false);
  expect(speculative.request).toEqual({ ...plain.request, speculation: speculative.request.speculation });
  expect(speculative.request.speculation?.enabled).toBe(true);
  expect(speculative.time.first).toBeGreaterThan(plain.time.last);

  const texts = await page.locator(".race-text").allTextContents();
  const expected = await visitor.rest(plain.request);
  expect(texts).toEqual([expected.text, expected.text]);
  const numTokens = expected.token_ids.length;
  expect(await verdict.textContent()).toContain(`identical: ${numTokens} of ${numTokens} tokens`);

  const speeds: number[] = [];
  for (const name of ["Plain decoding", "Speculative decoding"]) {
    const figure = (of: string) =>
      page
        .getByRole("article", { name })
        .locator("div", { has: page.getByText(of, { exact: true }) })
        .locator("dd")
        .textContent();
    expect(await figure("Tokens")).toBe(String(numTokens));
    for (const clock of ["First token", "Decoding"]) expect(await figure(clock)).toMatch(/^\d+\.\d\d s$/);
    for (const speed of ["Speed, wall clock", "Speed, engine"])
      expect(await figure(speed)).toMatch(/^\d+\.\d tokens\/s$/);
    speeds.push(Number.parseFloat((await figure("Speed, wall clock")) ?? ""));
  }
  const [slow = Number.NaN, fast = Number.NaN] = speeds;
  const ratio = Number.parseFloat((await page.locator(".race-headline b").textContent()) ?? "");
  expect(ratio).toBeCloseTo(fast / slow, 1);
});

test("a race together and one that is stopped", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await visitor.set({ "Max tokens": "40", Temperature: "0.9", Seed: "7" });
  await visitor.choose("Race");
  await page.getByRole("button", { name: "Start the race" }).click();
  await page.getByRole("alert").filter({ hasText: "Write a prompt first" }).waitFor();

  await page.locator("#race-prompt").fill(PROMPT);
  await page.getByText("Together", { exact: true }).click();
  await page.getByRole("button", { name: "Start the race" }).click();
  await page.locator(".race-verdict").filter({ hasText: "identical: 40 of 40" }).waitFor({ timeout: 60_000 });
  const [one, other] = visitor.conversations;
  expect(one?.time.first).toBeLessThan(other?.time.last ?? 0);
  expect(other?.time.first).toBeLessThan(one?.time.last ?? 0);

  await visitor.set({ "Max tokens": "4000" });
  await page.getByText("One after the other", { exact: true }).click();
  await page.locator("#race-prompt").fill("Count from one to a thousand, each number on a line of its own.");
  await page.getByRole("button", { name: "Race again" }).click();
  await visitor.received(10);
  await page.getByRole("button", { name: "Stop" }).click();
  await page.getByText("Stopped: no result.").waitFor();
  await expect.poll(() => visitor.numRunning()).toBe(0);
});
