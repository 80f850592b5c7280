import { expect, test } from "vitest";
import { ApiKey } from "../../../src/session/apiKey";
import { MemoryStorage } from "./storage";

test("a key is kept for the tab, and forgotten when it is emptied", () => {
  const storage = new MemoryStorage();
  const apiKey = new ApiKey(storage);
  expect(apiKey.get()).toBeNull();
  expect(apiKey.set("  gorgon_abc ")).toBeNull();
  expect(new ApiKey(storage).get()).toBe("gorgon_abc");
  expect(apiKey.set("")).toBeNull();
  expect([apiKey.get(), storage.entries.size]).toEqual([null, 0]);
});

test.each(["two words", "ключ", "a\u0000b"])("%j, which no header can carry, is refused", (key) => {
  const apiKey = new ApiKey(new MemoryStorage());
  expect(apiKey.set(key)).toMatch(/ASCII/);
  expect(apiKey.get()).toBeNull();
});
