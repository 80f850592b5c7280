import { afterAll, beforeAll, expect, inject } from "vitest";
import { test } from "./support/browser";
import { type Service, startEngine, startGateway } from "./support/service";
import { textOfSteps } from "./support/visit";

/** What Chromium writes while nobody answers. */
const LOST = /Failed to load resource|WebSocket connection to/;
const PROMPT = "Write a long story about a lighthouse keeper.";
/** Sampled, so that tokens drawn anew would be others; with a seed whose story is long. */
const SETTINGS = { "Max tokens": "400", Temperature: "0.8", Seed: "11" };

let engine: Service;
let gateway: Service;
let settings: Record<string, string>;

beforeAll(async () => {
  engine = await startEngine({});
  settings = { ENGINES: engine.url, WEB_ROOT: inject("stack").webRoot, POLL_SECONDS: "0.2" };
  gateway = await startGateway(settings);
  await gateway.ready();
});

afterAll(async () => {
  await gateway?.stop();
  await engine?.stop();
});

test("the gateway is killed: the page connects to the next one, and the answer goes on", async ({ visit }) => {
  const visitor = await visit({ url: gateway.url, expected: LOST });
  await visitor.set(SETTINGS);
  await visitor.ask(PROMPT);
  await visitor.received(10);
  await gateway.kill();
  await visitor.page.getByText("reconnecting").waitFor();
  const [before] = visitor.conversations;
  expect(before?.end).toBeUndefined();
  gateway = await startGateway({ ...settings, PORT: gateway.port });
  await visitor.ended();

  const after = visitor.conversation;
  expect(after).not.toBe(before);
  expect(after.request.generated_token_ids).toEqual(before?.steps.flatMap(({ token_ids }) => token_ids));
  const whole = await visitor.rest(before?.request ?? {});
  expect(await visitor.text()).toBe(whole.text);
  expect(await visitor.page.locator(".replay-position").textContent()).toMatch(/^step (\d+) of \1 /);
});

test("the engine is killed and started again: the answer goes on", async ({ visit }) => {
  const visitor = await visit({ url: gateway.url, expected: LOST });
  await visitor.set(SETTINGS);
  await visitor.ask(PROMPT);
  await visitor.received(10);
  await engine.kill();
  const { request, steps } = visitor.conversation;
  await visitor.page.getByText(/reconnecting|another one goes on/).waitFor();
  const early = textOfSteps(steps);
  engine = await startEngine({ PORT: engine.port });
  await visitor.ended();

  const text = await visitor.text();
  expect(text.length).toBeGreaterThan(early.length);
  expect(text).toBe((await visitor.rest(request)).text);
});

test("a first visitor while the model loads is told so, and is answered", async ({ visit }) => {
  await engine.kill();
  engine = await startEngine({ PORT: engine.port });
  const visitor = await visit({ url: gateway.url, expected: LOST });
  await visitor.page
    .getByText(/the model loads/)
    .first()
    .waitFor();
  await visitor.set({ "Max tokens": "20" });
  await visitor.ask("Name a colour.");
  await visitor.ended();
  expect(await visitor.text()).toBe((await visitor.rest(visitor.conversation.request)).text);
  await visitor.page.getByText("smollm2").first().waitFor();
});
