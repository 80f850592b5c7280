// The key of a gateway that asks for one: for this tab alone, and never in a URL.

const STORAGE_KEY = "gorgon-api-key";

export class ApiKey {
  readonly #storage: Pick<Storage, "getItem" | "setItem" | "removeItem">;

  constructor(storage: Pick<Storage, "getItem" | "setItem" | "removeItem">) {
    this.#storage = storage;
  }

  readonly get = (): string | null => this.#storage.getItem(STORAGE_KEY);

  /** What is wrong with `key`, which is then not taken; null: nothing. An empty one forgets what was set. */
  set(key: string): string | null {
    const trimmed = key.trim();
    if (trimmed === "") {
      this.#storage.removeItem(STORAGE_KEY);
      return null;
    }
    if (!/^[!-~]+$/.test(trimmed)) return "a key has no spaces and no letters beyond ASCII";
    this.#storage.setItem(STORAGE_KEY, trimmed);
    return null;
  }
}
