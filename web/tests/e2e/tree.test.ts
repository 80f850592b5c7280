import type { Page } from "playwright-core";
import { expect } from "vitest";
import { tokenLabel } from "../../src/tree/label";
import type { TokenMessage } from "../../src/wire/messages";
import { test } from "./support/browser";

const PROMPT = "Explain to a child why the sky is blue.";

interface DrawnStep {
  accepted: { label: string; colour: string }[];
  rejected: { node: number; label: string; colour: string }[];
}

/** Reads the picture: what is drawn as accepted and as rejected in one step, and in which colour. */
function drawn(page: Page, step: number): Promise<DrawnStep> {
  return page.locator(".tree-svg").evaluate((svg, step) => {
    const found = (fate: string) => [...svg.querySelectorAll<SVGElement>(`[data-step="${step}"][data-fate="${fate}"]`)];
    return {
      accepted: found("accepted").map((token) => ({
        label: token.querySelector("text")?.textContent ?? "",
        colour: getComputedStyle(token.querySelector("rect") as SVGElement).fill,
      })),
      rejected: found("rejected").map((node) => ({
        node: Number(node.dataset.node),
        label: node.textContent ?? "",
        colour: getComputedStyle(node).fill,
      })),
    };
  }, step);
}

function dominant(colour: string): string {
  const [red = 0, green = 0, blue = 0] = (colour.match(/[\d.]+/g) ?? []).map(Number);
  return red > green && red > blue ? "red" : green > red && green > blue ? "green" : "neither";
}

/** Indices of a message's accepted and rejected drafts. */
function draftsOf({ tree_debug: tree }: TokenMessage): { accepted: number[]; rejected: number[] } {
  const nodes = tree?.candidates.map((_, node) => node) ?? [];
  return {
    accepted: nodes.filter((node) => tree?.accepted[node]),
    rejected: nodes.filter((node) => !tree?.accepted[node]),
  };
}

test.for(["dark", "light"] as const)(
  "accepted drafts are green and rejected ones red, %s",
  async (scheme, { visit }) => {
    const visitor = await visit({ colorScheme: scheme });
    const { page } = visitor;
    await visitor.set({ "Max tokens": "80" });
    await visitor.ask(PROMPT);
    await visitor.ended();
    const { steps } = visitor.conversation;
    // The last one may be cut off by the answer's end.
    const withTree = steps.flatMap(({ tree_debug: tree }, step) =>
      tree?.candidates.length && step < steps.length - 1 ? step : [],
    );
    expect(withTree.length).toBeGreaterThan(4);
    let numAccepted = 0;
    for (const step of withTree.slice(0, 8)) {
      const message = steps[step] as TokenMessage;
      const { accepted, rejected } = draftsOf(message);
      const label = (node: number) => tokenLabel(message.tree_debug?.candidates[node] ?? "");
      await visitor.seek(step + 1);
      await page
        .locator(".tree-caption")
        .filter({ hasText: `step ${step}: ` })
        .waitFor();

      const picture = await drawn(page, step);
      expect(picture.accepted.map(({ label }) => label)).toEqual(
        message.pieces.slice(0, accepted.length).map(tokenLabel),
      );
      const shown = picture.rejected.map(({ node, label }) => [node, label]);
      expect(shown.toSorted()).toEqual(rejected.map((node) => [node, label(node)]).toSorted());
      expect(picture.accepted.every(({ colour }) => dominant(colour) === "green")).toBe(true);
      expect(picture.rejected.every(({ colour }) => dominant(colour) === "red")).toBe(true);
      numAccepted += accepted.length;
    }
    expect(numAccepted).toBeGreaterThan(0);
  },
);

test("while steps arrive, no node is ever drawn with another fate than its message's", async ({ visit }) => {
  const visitor = await visit();
  const { page } = visitor;
  await page.evaluate(() => {
    const seen = new Set<string>();
    Object.assign(window, { seen });
    new MutationObserver(() => {
      for (const element of document.querySelectorAll<SVGElement>("[data-fate][data-step]")) {
        const { step, fate, node, token } = element.dataset;
        seen.add([step, fate, node ?? "", token ?? ""].join(" "));
      }
    }).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-step"] });
  });
  await visitor.set({ "Max tokens": "120" });
  await visitor.ask(PROMPT);
  await visitor.ended();

  const { steps } = visitor.conversation;
  const expected = new Set<string>();
  let numTokens = 0;
  steps.forEach((message, step) => {
    const { accepted, rejected } = draftsOf(message);
    // What the answer's end has cut off was accepted, but is no token.
    const numEmitted = Math.min(accepted.length, message.token_ids.length);
    for (const node of [...rejected, ...accepted.slice(numEmitted)]) expected.add(`${step} rejected ${node} `);
    message.token_ids.forEach((_, i) => {
      expected.add(`${step} ${i < numEmitted ? "accepted" : "backbone"}  ${numTokens + i}`);
    });
    numTokens += message.token_ids.length;
  });
  const seen = await page.evaluate(() => [...(window as unknown as { seen: Set<string> }).seen]);
  const stepsSeen = new Set(seen.map((entry) => entry.split(" ")[0]));
  expect(seen.filter((entry) => !expected.has(entry))).toEqual([]);
  expect(stepsSeen.size).toBeGreaterThan(steps.length / 4);
});
