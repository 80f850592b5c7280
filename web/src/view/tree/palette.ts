import type { Palette } from "../../tree/paint";

/** The theme's colours where `style` is in force. */
export function paletteOf(style: CSSStyleDeclaration): Palette {
  const colour = (name: string) => style.getPropertyValue(`--${name}`).trim();
  return {
    text: colour("text"),
    surface: colour("surface"),
    border: colour("border"),
    accent: colour("accent"),
    accepted: colour("accepted"),
    rejected: colour("rejected"),
    draft: colour("draft"),
  };
}
