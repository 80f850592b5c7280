import { describe, expect, it } from "vitest";
import { EMPTY_LABEL, MAX_LABEL_WIDTH, shorten, textWidth, tokenLabel, visibleText } from "../../../src/tree/label";

describe("visibleText", () => {
  it.each([
    [" the", "·the"],
    ["\n\n", "⏎⏎"],
    ["\tx", "⇥x"],
    ["\r\n", "\\r⏎"],
    ["\u0000\u001b[0m", "\\x00\\x1b[0m"],
    ["\u00a0", "\\xa0"],
    ["\u200b\u202e", "\\u200b\\u202e"],
    ["\ufeff", "\\ufeff"],
    ["\ud800", "\\ud800"],
    ["\u{e0041}", "\\u{e0041}"],
    ["<b>&amp;</b>", "<b>&amp;</b>"],
    ["né 猫 👍", "né·猫·👍"],
  ])("of %j is %j", (text, expected) => {
    expect(visibleText(text)).toBe(expected);
  });
});

describe("tokenLabel", () => {
  it("keeps what fits", () => {
    expect(tokenLabel("abcdefghijklmn")).toBe("abcdefghijklmn");
  });

  it("ends what does not fit with an ellipsis, no wider than a label", () => {
    expect(tokenLabel("abcdefghijklmno")).toBe("abcdefghijklm…");
    expect(textWidth(tokenLabel("猫".repeat(20)))).toBeLessThanOrEqual(MAX_LABEL_WIDTH);
  });

  it("bounds text that has no width", () => {
    expect(tokenLabel(`a${"\u0301".repeat(5000)}`).length).toBeLessThanOrEqual(2 * MAX_LABEL_WIDTH);
  });

  it("says that a token released no text", () => {
    expect(tokenLabel("")).toBe(EMPTY_LABEL);
  });

  it("never cuts a character of two code units in half", () => {
    expect(shorten("👍".repeat(30), 8)).toBe("👍👍👍…");
  });
});

describe("textWidth", () => {
  it.each([
    ["abc", 3],
    ["猫", 2],
    ["é", 1],
    ["e\u0301", 1],
    ["", 0],
  ])("of %j is %d columns", (text, width) => {
    expect(textWidth(text)).toBe(width);
  });
});
