import { describe, expect, it } from "vitest";
import { record, startRun } from "../../../src/run/run";
import { promptOf, shareName, shareSvg } from "../../../src/tree/shareSvg";
import { escapeXml, xml } from "../../../src/tree/xml";
import { firstMessage, generatedRun, messageOf } from "./runs";

const PALETTE = {
  text: "#111",
  surface: "#fff",
  border: "#ccc",
  accent: "#00f",
  accepted: "#0a0",
  rejected: "#a00",
  draft: "#efe",
};
const HOSTILE = `<script>alert("1")</script>`;

function parsed(svg: string): Document {
  const document = new DOMParser().parseFromString(svg, "image/svg+xml");
  expect(document.querySelector("parsererror")).toBeNull();
  return document;
}

function textsOf(document: Document): string[] {
  return [...document.querySelectorAll("text")].map(({ textContent }) => textContent ?? "");
}

function hostileRun() {
  const run = startRun(
    { prompt: `${HOSTILE}\u0000\u001b & <img src=x onerror=alert(1)>` },
    "2026-11-25T09:00:00.000Z",
    HOSTILE,
  );
  record(run, firstMessage("<a>"), 0);
  const nodes = [
    { text: "<svg/>", parent: -1, isAccepted: true },
    { text: "<script>", parent: -1, rank: 1 },
    { text: "\u0000\ud800\uffff]]>", parent: 0 },
  ];
  record(run, messageOf(nodes, "&lt;"), 100);
  return run;
}

describe("shareSvg", () => {
  it("keeps markup as text, and is well-formed whatever the model said", () => {
    const document = parsed(shareSvg(hostileRun(), 2, PALETTE));
    expect(document.querySelector("script, img, foreignObject, a, image, use, style")).toBeNull();
    const texts = textsOf(document);
    expect(texts).toContain("<script>");
    expect(texts).toContain("<svg/>");
    expect(texts).toContain("&lt;");
    expect(texts.some((text) => text.includes(HOSTILE) && text.startsWith("“"))).toBe(true);
  });

  it("needs nothing from outside", () => {
    const document = parsed(shareSvg(generatedRun(1, 30), 20, PALETTE));
    for (const element of document.querySelectorAll("*")) {
      for (const { name, value } of element.attributes) {
        expect(name).not.toMatch(/href|^on|^src$|^class$/);
        expect(value.replace("http://www.w3.org/2000/svg", "")).not.toMatch(/https?:|url\((?!#)|var\(/);
      }
    }
  });

  it("says what it shows: prompt, model, speed, speedup, step", () => {
    const texts = textsOf(parsed(shareSvg(generatedRun(1, 30), 20, PALETTE))).join("\n");
    const run = generatedRun(1, 30);
    const step = run.steps[19];
    expect(texts).toContain("“Tell a story.”");
    expect(texts).toContain("model");
    expect(texts).toContain(`${step?.tokensPerSecond?.toFixed(0)} tokens/s`);
    expect(texts).toContain(`${step?.speedup?.toFixed(1)}× plain decoding`);
    expect(texts).toContain(`step 19: 63 nodes, accepted ${step?.numAccepted}`);
  });

  it("shows every node of the step and the trunk before it", () => {
    const run = generatedRun(1, 30);
    const texts = textsOf(parsed(shareSvg(run, 20, PALETTE)));
    expect(texts.length).toBeGreaterThan(63 + 5);
  });

  it("has no figures where none were measured", () => {
    const run = startRun({ prompt: "x" }, "2026-11-25T09:00:00.000Z");
    const texts = textsOf(parsed(shareSvg(run, 0, PALETTE)));
    expect(texts.join()).not.toMatch(/tokens\/s|×|null|undefined|NaN/);
  });
});

describe("names and prompts", () => {
  it("names files by date and step", () => {
    expect(shareName(generatedRun(1, 2), 41, "png")).toBe("gorgon-2026-11-25-step-41.png");
  });

  it.each([
    [{ prompt: "a" }, "a"],
    [
      {
        messages: [
          { role: "user", content: "b" },
          { role: "assistant", content: "c" },
        ] as never,
      },
      "b",
    ],
    [{ prompt_token_ids: [1, 2, 3] as [number, ...number[]] }, "a prompt of 3 token ids"],
  ])("of %j", (request, expected) => {
    expect(promptOf(request)).toBe(expected);
  });
});

describe("xml", () => {
  it("escapes attributes and text", () => {
    expect(xml("a", { b: `"<&'`, c: 1.23456, d: undefined }, "<x>", xml("y", {})).source).toBe(
      `<a b="&quot;&lt;&amp;&#39;" c="1.23">&lt;x&gt;<y></y></a>`,
    );
  });

  it("replaces what XML cannot hold", () => {
    expect(escapeXml("a\u0000\u0008\ufffe\ud800b\t\n")).toBe("a\ufffd\ufffd\ufffd\ufffdb\t\n");
  });
});
