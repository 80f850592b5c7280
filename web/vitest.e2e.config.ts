import { defineConfig } from "vitest/config";

// The page in a real browser before the real gateway and the small model. One file after the other: each has the
// machine's cores for itself.
export default defineConfig({
  test: {
    include: ["tests/e2e/**/*.test.ts"],
    globalSetup: ["tests/e2e/support/globalSetup.ts"],
    fileParallelism: false,
    testTimeout: 90_000,
    expect: { poll: { timeout: 20_000 } }, // the machine may be busy, and a test tells what happens, not how soon
    hookTimeout: 180_000,
  },
});
