// What a person can do about an error, where the message does not say it.

const REMEDIES: Readonly<Record<string, string>> = {
  queue_full: "Everybody is busy: try again, or add an engine.",
  unavailable: "No engine takes requests just now: the line on top says why.",
  slow_reader: "This page could not keep up: close other tabs.",
  invalid_api_key: "Set it under the key on top.",
};

export function remedyOf(code: string): string {
  return REMEDIES[code] ?? "";
}
