// The tree and the speedometer on generated or recorded messages, to look at without an engine.
// ?interval=MS between steps, nodes=N, count=STEPS, step=POSITION (paused there), theme=light|dark, seed=N;
// run=URL of an exported run, instead of generated messages.

import { createRoot } from "react-dom/client";
import { importRun } from "../src/run/exchange";
import { Player } from "../src/run/player";
import { startRun } from "../src/run/run";
import { RunStore } from "../src/run/store";
import { Speedometer } from "../src/view/speedometer/Speedometer";
import { ShareButton } from "../src/view/tree/ShareButton";
import { TreeView } from "../src/view/tree/TreeView";
import "./demo.css";
import { MessageGenerator, SHAPE } from "./generator";

const query = new URLSearchParams(window.location.search);
const numberOf = (name: string, otherwise: number) => Number(query.get(name) ?? otherwise);
const interval = numberOf("interval", 700);
const count = numberOf("count", 10_000);
const paused = query.get("step");

const recording = query.get("run");
const store = new RunStore(
  recording === null
    ? startRun({ prompt: "Write a short story about a lighthouse." }, new Date().toISOString(), "smollm2-135m")
    : importRun(await (await fetch(recording)).text()),
);
const player = new Player(() => store.run.steps.length);
document.documentElement.dataset.theme = query.get("theme") ?? "dark";

const stepSeconds = (paused === null ? interval : 100) / 1000;
const generator = new MessageGenerator(numberOf("seed", 7), {
  ...SHAPE,
  numNodes: numberOf("nodes", 24),
  stepSeconds,
  plainTokensPerSecond: 1.15 / stepSeconds,
});
if (recording === null && paused === null) {
  const timer = setInterval(() => {
    if (store.run.steps.length >= count) clearInterval(timer);
    else store.receive(generator.next(), performance.now());
  }, interval);
} else if (recording === null) {
  for (let i = 0; i < Math.min(count, 400); i += 1) store.receive(generator.next(), 100 * i);
}
if (paused !== null) player.seek(Number(paused));

const root = document.getElementById("root");
if (root === null) throw new Error("demo.html has no #root");
createRoot(root).render(
  <main className="demo">
    <div className="demo-side">
      <Speedometer store={store} player={player} />
      <ShareButton store={store} player={player} />
    </div>
    <div className="demo-tree">
      <TreeView store={store} player={player} />
    </div>
  </main>,
);
