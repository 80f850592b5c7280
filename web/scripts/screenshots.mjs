// The pictures of the page in docs/images, made by a real browser before the real gateway and the small model:
//
//     npm run screenshots -- [--record]
//
// dark.png and light.png show a step of tests/e2e/recorded/answer.json, a run of that stack; --record runs it anew.
// race.png and gorgon.gif are recorded each time, as they happen.

import { join } from "node:path";
import { runnerImport } from "vite";

const { module } = await runnerImport(join(import.meta.dirname, "screenshots/main.ts"));
await module.main(process.argv.slice(2));
