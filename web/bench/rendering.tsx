// The page's moving parts under load: messages come as text at a fixed rate, as from a socket, and go through the store.
// `rendering.mjs` drives it through `window.bench`.

import { useEffect, useRef } from "react";
import { createRoot } from "react-dom/client";
import { Player } from "../src/run/player";
import { startRun } from "../src/run/run";
import { RunStore } from "../src/run/store";
import { StreamText } from "../src/view/chat/StreamText";
import { type RunProps, useVersion } from "../src/view/hooks";
import { Speedometer } from "../src/view/speedometer/Speedometer";
import { TreeView } from "../src/view/tree/TreeView";
import "./demo.css";
import { MessageGenerator, SHAPE } from "./generator";

export interface Bench {
  /** Feeds `stepsPerSecond` messages for `seconds`; gives the milliseconds between animation frames. */
  run: (stepsPerSecond: number, seconds: number) => Promise<number[]>;
  numSteps: () => number;
}

declare global {
  interface Window {
    bench: Bench;
  }
}

const NUM_MESSAGES = 500;

const store = new RunStore(startRun({ prompt: "Write a long story." }, new Date().toISOString(), "benchmark"));
const player = new Player(() => store.run.steps.length);
const generator = new MessageGenerator(1, SHAPE);
const messages = Array.from({ length: NUM_MESSAGES }, () => JSON.stringify(generator.next()));

window.bench = {
  numSteps: () => store.run.steps.length,
  run: (stepsPerSecond, seconds) =>
    new Promise((resolve) => {
      const start = performance.now();
      const frames: number[] = [];
      let numSent = 0;
      const timer = setInterval(() => {
        const due = Math.floor(((performance.now() - start) / 1000) * stepsPerSecond);
        for (; numSent < due; numSent += 1) {
          // The first message is prefill's: it comes once.
          const message = messages[numSent < NUM_MESSAGES ? numSent : 1 + (numSent % (NUM_MESSAGES - 1))] ?? "";
          store.receive(JSON.parse(message), performance.now() - start);
        }
      }, 1000 / stepsPerSecond);
      let last = start;
      const frame = (now: number) => {
        frames.push(now - last);
        last = now;
        if (now - start < 1000 * seconds) requestAnimationFrame(frame);
        else {
          clearInterval(timer);
          resolve(frames.slice(1));
        }
      };
      requestAnimationFrame(frame);
    }),
};

/** The text as the chat shows it, scrolled along. */
function Answer({ store, player }: RunProps) {
  useVersion(store);
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    box.current?.scrollTo(0, box.current.scrollHeight);
  });
  return (
    <div ref={box} className="demo-text">
      <StreamText store={store} player={player} />
    </div>
  );
}

const root = document.getElementById("root");
if (root === null) throw new Error("rendering.html has no #root");
createRoot(root).render(
  <main className="demo">
    <div className="demo-side">
      <Speedometer store={store} player={player} />
      <Answer store={store} player={player} />
    </div>
    <div className="demo-tree">
      <TreeView store={store} player={player} />
    </div>
  </main>,
);
