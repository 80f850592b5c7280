// Numbers as the charts write them.

/** Few digits, the same number of them whatever the size: "0.42", "17.3", "118". */
export function short(value: number): string {
  const size = Math.abs(value);
  if (size >= 100) return Math.round(value).toLocaleString("en-US");
  return value.toFixed(size >= 10 ? 1 : 2);
}

/** A share as "42 %"; null where there is nothing to share. */
export function share(part: number, whole: number): string | null {
  return whole === 0 ? null : percent(part / whole);
}

export function percent(value: number): string {
  const hundredths = 100 * value;
  return `${hundredths > 0 && hundredths < 10 ? hundredths.toFixed(1) : Math.round(hundredths)} %`;
}
