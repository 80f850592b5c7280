// The wire's TypeScript types, out of the JSON schema that the gateway's models give on standard input.
// `node scripts/types.mjs [--check]`, run by `make web-types`; --check fails where the file in the repository differs.
import { readFile, writeFile } from "node:fs/promises";
import { stdin } from "node:process";
import { compile } from "json-schema-to-typescript";

const TARGET = new URL("../src/wire/messages.ts", import.meta.url);
const BANNER = "// Generated from the gateway's schema by `make web-types`: change that, not this.";

let text = "";
for await (const chunk of stdin) text += chunk;
const types = await compile(JSON.parse(text), "Wire", {
  additionalProperties: false,
  bannerComment: BANNER,
  format: true,
  style: { printWidth: 120 },
});

if (process.argv.includes("--check")) {
  const current = await readFile(TARGET, "utf8").catch(() => "");
  if (current !== types) {
    console.error("web/src/wire/messages.ts differs from the gateway's schema: run `make web-types`");
    process.exit(1);
  }
} else {
  await writeFile(TARGET, types);
}
