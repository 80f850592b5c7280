// Runs of generated messages.

import { MessageGenerator, SHAPE, type Shape } from "../../../bench/generator";
import { type Run, record, startRun } from "../../../src/run/run";
import type { TokenMessage, TreeDebug } from "../../../src/wire/messages";

export function generatedRun(seed: number, numSteps: number, shape: Partial<Shape> = {}): Run {
  const run = startRun({ prompt: "Tell a story." }, "2026-11-25T09:00:00.000Z", "model");
  const generator = new MessageGenerator(seed, { ...SHAPE, ...shape });
  for (let i = 0; i < numSteps; i += 1) record(run, generator.next(), 100 * i);
  return run;
}

export interface Node {
  text: string;
  parent: number;
  isAccepted?: boolean;
  rank?: number;
  source?: string;
  probability?: number;
}

export function treeOf(nodes: readonly Node[]): TreeDebug {
  const depths: number[] = [];
  for (const { parent } of nodes) depths.push((depths[parent] ?? 0) + 1);
  return {
    candidates: nodes.map(({ text }) => text),
    token_ids: nodes.map((_, i) => 100 + i),
    accepted: nodes.map(({ isAccepted }) => isAccepted ?? false),
    parents: nodes.map(({ parent }) => parent),
    depths,
    probabilities: nodes.map(({ probability }) => probability ?? 0.5),
    ranks: nodes.map(({ rank }) => rank ?? 0),
    sources: nodes.map(({ source }) => source ?? "head"),
    num_nodes: nodes.length + 1,
    speedup: 2.5,
    tokens_per_second: 50,
    plain_tokens_per_second: 20,
    step: 1,
    step_seconds: { draft: 0, verify: 0, accept: 0, commit: 0 },
    batch_size: 1,
  };
}

/** The message of a step with this tree; `bonus` null: the answer ended before it. */
export function messageOf(nodes: readonly Node[], bonus: string | null): TokenMessage {
  const tree = treeOf(nodes);
  const path = nodes.flatMap(({ isAccepted }, i) => (isAccepted ? [i] : []));
  const pieces = path.map((i) => nodes[i]?.text ?? "").concat(bonus ?? []);
  return {
    type: "token",
    text: pieces.join(""),
    token_ids: path.map((i) => 100 + i).concat(bonus === null ? [] : 7),
    pieces,
    num_accepted: path.length,
    num_nodes: nodes.length + 1,
    logprobs: null,
    tree_debug: tree,
  };
}

export function firstMessage(text: string): TokenMessage {
  return { ...messageOf([], text), num_nodes: 1 };
}
