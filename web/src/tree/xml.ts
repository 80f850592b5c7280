// XML by construction: a string can only ever become text.

export class Markup {
  readonly source: string;

  constructor(source: string) {
    this.source = source;
  }
}

/** Characters that XML 1.0 has no way to hold: controls, lone surrogates, non-characters. */
const ILLEGAL = /(?![\t\n\r])[\p{Cc}\p{Cs}\ufffe\uffff]/gu;
const ENTITIES: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

export function escapeXml(text: string): string {
  return text.replace(ILLEGAL, "\ufffd").replace(/[&<>"']/g, (character) => ENTITIES[character] ?? "");
}

/** An element; attributes that are undefined are left out. */
export function xml(
  name: string,
  attributes: Readonly<Record<string, string | number | undefined>>,
  ...children: readonly (Markup | string)[]
): Markup {
  const written = Object.entries(attributes)
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => ` ${key}="${escapeXml(typeof value === "number" ? shortest(value) : (value ?? ""))}"`);
  const inner = children.map((child) => (child instanceof Markup ? child.source : escapeXml(child))).join("");
  return new Markup(`<${name}${written.join("")}>${inner}</${name}>`);
}

function shortest(value: number): string {
  return String(Math.round(value * 100) / 100);
}
