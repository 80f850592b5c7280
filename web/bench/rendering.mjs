// Rendering benchmark: 64-node trees at 100 steps a second through the store, in headless Chromium that draws in software.
//
//     npm run bench -- [--seconds 60] [--steps-per-second 100] [--profile FILE.cpuprofile] [--trace FILE.json]
//                  [--screenshot FILE.png] [--chromium PATH]
//
// Prints a table; exits with 1 where a figure is over its bar.

import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import { build, preview } from "vite";

const WEB = dirname(dirname(fileURLToPath(import.meta.url)));
const BARS = { medianFrame: 17.5, p95Frame: 50, heapGrowth: 20 };
/** Before it the heap is not compared: the page fills what it keeps. */
const WARM_UP_SECONDS = 10;
const MEBIBYTE = 1 << 20;

async function main() {
  const { values } = parseArgs({
    options: {
      seconds: { type: "string", default: "60" },
      "steps-per-second": { type: "string", default: "100" },
      profile: { type: "string" },
      trace: { type: "string" },
      screenshot: { type: "string" },
      chromium: { type: "string", default: process.env.CHROMIUM ?? "/usr/bin/chromium" },
    },
  });
  const seconds = Number(values.seconds);
  const rate = Number(values["steps-per-second"]);
  if (!(seconds > WARM_UP_SECONDS) || !(rate > 0)) {
    throw new Error(`--seconds must be over ${WARM_UP_SECONDS}, --steps-per-second over 0`);
  }
  const folder = await mkdtemp(join(tmpdir(), "gorgon-bench-"));
  try {
    const server = await serve(folder, values.profile === undefined);
    const browser = await chromium.launch({ executablePath: values.chromium, args: ["--no-sandbox", "--disable-gpu"] });
    try {
      const page = await browser.newPage({ viewport: { width: 1280, height: 720 } });
      page.on("pageerror", (error) => {
        throw error;
      });
      await page.goto(new URL("bench/rendering.html", server.resolvedUrls.local[0]).href);
      if (values.trace !== undefined) await browser.startTracing(page, { path: values.trace });
      const figures = await measure(page, seconds, rate, values.profile);
      if (values.trace !== undefined) await browser.stopTracing();
      if (values.screenshot !== undefined) await page.screenshot({ path: values.screenshot });
      report(figures);
      return figures.every(({ bar, value }) => bar === undefined || value <= bar) ? 0 : 1;
    } finally {
      await browser.close();
      await server.close();
    }
  } finally {
    await rm(folder, { recursive: true });
  }
}

async function serve(outDir, minify) {
  const input = join(WEB, "bench", "rendering.html");
  const common = { root: WEB, configFile: false, logLevel: "warn" };
  await build({ ...common, build: { outDir, emptyOutDir: true, target: "es2022", minify, rollupOptions: { input } } });
  return await preview({ ...common, build: { outDir }, preview: { port: 0, host: "127.0.0.1" } });
}

async function measure(page, seconds, rate, profile) {
  const client = await page.context().newCDPSession(page);
  // CPU time of the thread: on a busy machine the wall clock counts the others' work too.
  await client.send("Performance.enable", { timeDomain: "threadTicks" });
  const running = page.evaluate(([rate, seconds]) => window.bench.run(rate, seconds), [rate, seconds]);
  await page.waitForTimeout(1000 * WARM_UP_SECONDS);
  const heapBefore = await heapOf(client);
  const before = await metricsOf(client);
  if (profile !== undefined) {
    await client.send("Profiler.enable");
    await client.send("Profiler.start");
  }
  const frames = await running;
  const after = await metricsOf(client);
  if (profile !== undefined) {
    const { profile: recorded } = await client.send("Profiler.stop");
    await writeFile(profile, JSON.stringify(recorded));
  }
  const heapAfter = await heapOf(client);
  const numSteps = await page.evaluate(() => window.bench.numSteps());
  const sorted = frames.toSorted((a, b) => a - b);
  // Frames are counted over the whole run, the main thread's time from the warm-up on.
  const numFrames = (frames.length * (seconds - WARM_UP_SECONDS)) / seconds;
  const perFrame = (name) => (1000 * (after[name] - before[name])) / numFrames;
  return [
    { name: "steps drawn through", value: numSteps, unit: "" },
    { name: "frames", value: frames.length, unit: "" },
    { name: "frame, median", value: quantile(sorted, 0.5), unit: "ms", bar: BARS.medianFrame },
    { name: "frame, p95", value: quantile(sorted, 0.95), unit: "ms", bar: BARS.p95Frame },
    { name: "frame, longest", value: sorted.at(-1), unit: "ms" },
    { name: "main thread a frame", value: perFrame("TaskDuration"), unit: "ms" },
    { name: "  script", value: perFrame("ScriptDuration"), unit: "ms" },
    { name: "  style", value: perFrame("RecalcStyleDuration"), unit: "ms" },
    { name: "  layout", value: perFrame("LayoutDuration"), unit: "ms" },
    { name: `heap at ${WARM_UP_SECONDS} s`, value: heapBefore / MEBIBYTE, unit: "MiB" },
    { name: "heap growth after that", value: (heapAfter - heapBefore) / MEBIBYTE, unit: "MiB", bar: BARS.heapGrowth },
    { name: "DOM nodes", value: after.Nodes, unit: "" },
  ];
}

async function heapOf(client) {
  await client.send("HeapProfiler.enable");
  await client.send("HeapProfiler.collectGarbage");
  await client.send("HeapProfiler.disable");
  return (await client.send("Runtime.getHeapUsage")).usedSize;
}

async function metricsOf(client) {
  const { metrics } = await client.send("Performance.getMetrics");
  return Object.fromEntries(metrics.map(({ name, value }) => [name, value]));
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function report(figures) {
  for (const { name, value, unit, bar } of figures) {
    const number = Number.isInteger(value) ? String(value) : value.toFixed(2);
    const verdict = bar === undefined ? "" : value <= bar ? `<= ${bar}` : `OVER ${bar}`;
    console.log(`${name.padEnd(26)}${number.padStart(10)} ${unit.padEnd(4)}${verdict}`.trimEnd());
  }
}

process.exitCode = await main();
