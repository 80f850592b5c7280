// One person's visit: what they do on the page, what they see, and what went over the wire meanwhile.

import type { Locator, Page, WebSocket } from "playwright-core";
import { expect } from "vitest";
import type { Run } from "../../../src/run/run";
import type { GenerateRequest, TokenMessage, Wire } from "../../../src/wire/messages";

type Received = Wire["received"];

/** What one WebSocket carried. */
export class Conversation {
  readonly sent: (GenerateRequest | { type: "cancel" })[] = [];
  readonly received: Received[] = [];
  /** Of the test's clock, at the first frame sent and at the last one received. */
  readonly time = { first: 0, last: 0 };

  constructor(socket: WebSocket) {
    socket.on("framesent", ({ payload }) => {
      if (this.sent.length === 0) this.time.first = performance.now();
      this.sent.push(JSON.parse(String(payload)) as GenerateRequest);
    });
    socket.on("framereceived", ({ payload }) => {
      this.time.last = performance.now();
      this.received.push(JSON.parse(String(payload)) as Received);
    });
  }

  get request(): GenerateRequest {
    const [first] = this.sent;
    if (first === undefined || first.type === "cancel") throw new Error("nothing was asked");
    return first;
  }

  /** One a step. */
  get steps(): TokenMessage[] {
    return this.received.filter((message) => message.type === "token");
  }

  get end(): Received | undefined {
    return this.received.find(({ type }) => type === "finished" || type === "error");
  }
}

export interface Answer {
  text: string;
  token_ids: number[];
}

const ANSWER_MILLISECONDS = 60_000;

export class Visit {
  readonly page: Page;
  readonly url: string;
  readonly conversations: Conversation[] = [];

  constructor(page: Page, url: string) {
    this.page = page;
    this.url = url;
    page.on("websocket", (socket) => this.conversations.push(new Conversation(socket)));
  }

  /** Until the page knows what serves it. */
  async open(): Promise<void> {
    await this.page.goto(this.url);
    await this.page.locator(".server-dot:not(.server-dot--unknown)").first().waitFor();
  }

  async mode(mode: "Chat" | "Completion"): Promise<void> {
    await this.page.locator(".controls").getByText(mode, { exact: true }).click();
  }

  /** By their labels. */
  async set(settings: Readonly<Record<string, string>>): Promise<void> {
    const panel = this.page.locator(".controls details");
    await panel.locator("summary").click();
    for (const [label, value] of Object.entries(settings)) await panel.getByLabel(label, { exact: true }).fill(value);
    await panel.locator("summary").click();
  }

  get prompt(): Locator {
    return this.page.locator("#prompt");
  }

  async ask(prompt: string): Promise<void> {
    await this.prompt.fill(prompt);
    await this.page.locator(".chat-form button[type=submit]").click();
  }

  /** The one that was asked last. */
  get conversation(): Conversation {
    const last = this.conversations.at(-1);
    if (last === undefined) throw new Error("nothing was asked");
    return last;
  }

  get answer(): Locator {
    return this.page.locator(".stream");
  }

  /** What the answer reads now, as it is. */
  async text(): Promise<string> {
    return (await this.answer.textContent()) ?? "";
  }

  /** Waits for the answer's end; gives the line that says how it ended. */
  async ended(line: RegExp = /^(complete|cut at the token limit) · /): Promise<string> {
    const status = this.page.locator(".chat .status");
    await status.filter({ hasText: line }).waitFor({ timeout: ANSWER_MILLISECONDS });
    return (await status.textContent()) ?? "";
  }

  /** Waits until so many steps have come. */
  async received(numSteps: number): Promise<void> {
    const count = () => this.conversations.at(-1)?.steps.length ?? 0;
    await expect.poll(count, { timeout: ANSWER_MILLISECONDS, interval: 5 }).toBeGreaterThanOrEqual(numSteps);
  }

  /** Shows the first `position` steps. */
  async seek(position: number): Promise<void> {
    await this.page.getByRole("slider", { name: "Step" }).fill(String(position));
  }

  /** Gives a file to the replay bar. */
  async importFile(name: string, content: string): Promise<void> {
    const file = { name, mimeType: "application/json", buffer: Buffer.from(content) };
    await this.page.getByLabel("Run to import").setInputFiles(file);
  }

  async choose(mode: "Generate" | "Race"): Promise<void> {
    await this.page.getByRole("navigation").getByRole("button", { name: mode }).click();
  }

  /** What REST answers to a request; trees left out, which change nothing. */
  async rest(request: GenerateRequest): Promise<Answer> {
    const response = await fetch(`${this.url}/generate`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...request, tree_debug: false }),
    });
    expect(response.status).toBe(200);
    return (await response.json()) as Answer;
  }

  async numRunning(): Promise<number> {
    const info = (await (await fetch(`${this.url}/info`)).json()) as Wire["info"];
    return info.num_running + info.engines.reduce((sum, engine) => sum + engine.num_running, 0);
  }
}

/** What the steps gave up to one, exclusive. */
export function textOfSteps(steps: readonly TokenMessage[], end = steps.length): string {
  return steps
    .slice(0, end)
    .flatMap(({ pieces }) => pieces)
    .join("");
}

/** A run file's content. */
export interface RunFile {
  format: string;
  version: number;
  run: Pick<Run, "request" | "seed"> & { steps: { tokens: { id: number; text: string }[] }[] };
}
