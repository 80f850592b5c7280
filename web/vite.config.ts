import { defineConfig } from "vitest/config";

const GATEWAY = process.env.GORGON_URL ?? "http://127.0.0.1:8100";

export default defineConfig({
  // The gateway serves `dist` at "/" and its hashed files at "/assets": see gorgon_gateway/page.py.
  base: "/",
  build: { target: "es2022", assetsInlineLimit: 0, modulePreload: { polyfill: false } },
  server: {
    proxy: {
      "/generate_stream": { target: GATEWAY, ws: true },
      "/health": GATEWAY,
      "/info": GATEWAY,
      "/v1": GATEWAY,
    },
  },
  test: { include: ["tests/unit/**/*.test.{ts,tsx}"], environment: "jsdom", setupFiles: ["tests/unit/setup.ts"] },
});
