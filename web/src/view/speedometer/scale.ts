// The dial's scale: it ends at a nice number, and changes rarely.

/** From the smallest speeds of a CPU to the largest of a GPU. */
const FIRST_DECADE = 1;
const NUM_DECADES = 5;
const ENDS: readonly number[] = Array.from({ length: NUM_DECADES }, (_, decade) =>
  [1, 2, 4].map((digit) => digit * 10 ** (FIRST_DECADE + decade)),
).flat();
/** What the largest figure may take of the scale. */
const FULL = 0.92;
/** Share of the scale below which it is too large. */
const EMPTY = 0.3;
export const NUM_INTERVALS = 4;

/** Degrees from the top, clockwise. */
const FROM_DEGREES = -120;
const TO_DEGREES = 120;

export class DialScale {
  #end: number = ENDS[0] ?? 10;

  get end(): number {
    return this.#end;
  }

  /** The scale's end for `largest`, the largest of the figures shown; coming from what it was. */
  fit(largest: number): number {
    if (largest > FULL * this.#end || largest < EMPTY * this.#end) {
      this.#end = ENDS.find((end) => largest <= FULL * end) ?? ENDS.at(-1) ?? this.#end;
    }
    return this.#end;
  }
}

/** Where `value` is on a dial that ends at `end`; what is beyond stays at the end. */
export function degreesOf(value: number, end: number): number {
  const share = Math.max(0, Math.min(1, value / end));
  return FROM_DEGREES + share * (TO_DEGREES - FROM_DEGREES);
}

/** The figures written on the dial. */
export function ticksOf(end: number): number[] {
  return Array.from({ length: NUM_INTERVALS + 1 }, (_, i) => (end * i) / NUM_INTERVALS);
}

/** As short as a dial needs it: 7.5, 84, 1.2k. */
export function shortNumber(value: number): string {
  if (value >= 999.5) return `${Number((value / 1000).toPrecision(value >= 9995 ? 3 : 2))}k`;
  return value >= 9.95 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}
