// A token's text as a short label on one line: what cannot be seen is made visible.

export const MAX_LABEL_WIDTH = 14;

/** For a token that released no text: part of a character of several bytes, or held back as part of a stop string. */
export const EMPTY_LABEL = "▯";

const ELLIPSIS = "…";

const SIGNS: Readonly<Record<string, string>> = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "\\r" };
// Controls, format characters (zero width, direction marks), other spaces and separators, lone surrogates, private use.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Z}\p{Cs}\p{Co}]/gu;
const COMBINING = /^\p{M}$/u;
// East Asian wide and emoji, roughly: two columns of a monospaced font.
const WIDE =
  /^[\u{1100}-\u{115f}\u{2e80}-\u{a4cf}\u{ac00}-\u{d7a3}\u{f900}-\u{faff}\u{fe30}-\u{fe6f}\u{ff00}-\u{ff60}\u{ffe0}-\u{ffe6}\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]$/u;
const PLAIN = /^[!-~]*$/;

/** `·` for a space, `⏎` for a newline, `⇥` for a tab; other characters that cannot be seen as escapes (`\x1b`, `\u200b`). */
export function visibleText(text: string): string {
  return text.replace(UNSEEN, (character) => SIGNS[character] ?? escapeOf(character));
}

function escapeOf(character: string): string {
  const code = (character.codePointAt(0) ?? 0).toString(16);
  if (code.length <= 2) return `\\x${code.padStart(2, "0")}`;
  return code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\u{${code}}`;
}

/** Columns of a monospaced font that `text` takes. */
export function textWidth(text: string): number {
  if (PLAIN.test(text)) return text.length;
  let width = 0;
  for (const character of text) width += characterWidth(character);
  return width;
}

function characterWidth(character: string): number {
  if (WIDE.test(character)) return 2;
  return COMBINING.test(character) ? 0 : 1;
}

/** `text` on at most `width` columns, its cut end marked by an ellipsis; combining marks are cut as well, in the end. */
export function shorten(text: string, width: number = MAX_LABEL_WIDTH): string {
  if (text.length <= 2 * width && textWidth(text) <= width) return text;
  let taken = 0;
  let kept = "";
  let numCharacters = 0;
  for (const character of text) {
    taken += characterWidth(character);
    numCharacters += 1;
    if (taken > width - 1 || numCharacters >= 2 * width) break;
    kept += character;
  }
  return kept + ELLIPSIS;
}

/** What stands in a token's node. */
export function tokenLabel(text: string): string {
  return text === "" ? EMPTY_LABEL : shorten(visibleText(text));
}
