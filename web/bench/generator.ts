// Token messages like an engine's: trees of a given size whose probabilities, fan-out and acceptance look like those of
// real heads. The same seed gives the same messages.

import type { TokenMessage, TreeDebug } from "../src/wire/messages";

const WORDS = (
  "the of a in to and is was that for on with as by at from this which or an be are it not have but one had all were " +
  "river stone light tower garden captain morning letter window silver winter engine market story quiet ancient"
).split(" ");
const PIECES = [
  "ing",
  "ed",
  ",",
  ".",
  "'s",
  "\n",
  "\n\n",
  "\t",
  "—",
  "tion",
  " 猫",
  " café",
  "<script>alert(1)</script>",
  " (",
];

/** Mulberry32: small, seeded, good enough for pictures. */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let value = Math.imul(state ^ (state >>> 15), state | 1);
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
}

export interface Shape {
  /** Rows of a step, root included. */
  numNodes: number;
  maxDepth: number;
  stepSeconds: number;
  plainTokensPerSecond: number | null;
}

export const SHAPE: Shape = { numNodes: 64, maxDepth: 6, stepSeconds: 0.01, plainTokensPerSecond: 96 };

export class MessageGenerator {
  readonly #random: () => number;
  readonly #shape: Shape;
  #step = 0;
  #numTokens = 0;

  constructor(seed: number, shape: Shape = SHAPE) {
    this.#random = randomNumbers(seed);
    this.#shape = shape;
  }

  next(): TokenMessage {
    const isFirst = this.#step === 0;
    const tree = isFirst ? emptyTree() : this.#tree();
    const path = tree.accepted.flatMap((isAccepted, node) => (isAccepted ? [node] : []));
    const pieces = [...path.map((node) => tree.candidates[node] ?? ""), this.#text()];
    const tokenIds = [...path.map((node) => tree.token_ids[node] ?? 0), this.#id()];
    this.#numTokens += pieces.length;
    const { stepSeconds, plainTokensPerSecond } = this.#shape;
    const speed = isFirst ? null : this.#numTokens / (this.#step * stepSeconds);
    const message: TokenMessage = {
      type: "token",
      text: pieces.join(""),
      token_ids: tokenIds,
      pieces,
      num_accepted: path.length,
      num_nodes: isFirst ? 1 : tree.candidates.length + 1,
      logprobs: null,
      tree_debug: {
        ...tree,
        tokens_per_second: speed,
        plain_tokens_per_second: plainTokensPerSecond,
        speedup: speed === null || plainTokensPerSecond === null ? null : speed / plainTokensPerSecond,
        step: this.#step,
      },
    };
    this.#step += 1;
    return message;
  }

  #tree(): TreeDebug {
    const { numNodes, maxDepth, stepSeconds } = this.#shape;
    const tree = emptyTree();
    const open: { node: number; depth: number; probability: number; children: number }[] = [
      { node: -1, depth: 0, probability: 1, children: 0 },
    ];
    // Best first, as the tree builder does: the likeliest place gets the next node.
    while (tree.candidates.length < numNodes - 1) {
      open.sort((a, b) => weight(b) - weight(a));
      const place = open[0];
      if (place === undefined) break;
      const share = (place.children === 0 ? 0.62 : 0.45 * 0.5 ** place.children) * (0.6 + 0.6 * this.#random());
      const probability = place.probability * Math.min(0.95, share);
      const node = tree.candidates.length;
      tree.candidates.push(this.#text());
      tree.token_ids.push(this.#id());
      tree.accepted.push(false);
      tree.parents.push(place.node);
      tree.depths.push(place.depth + 1);
      tree.probabilities.push(probability);
      tree.ranks.push(place.children);
      tree.sources.push(place.depth === 0 && this.#random() < 0.1 ? "lookup" : "head");
      place.children += 1;
      if (place.depth + 1 < maxDepth) open.push({ node, depth: place.depth + 1, probability, children: 0 });
    }
    this.#accept(tree);
    return {
      ...tree,
      num_nodes: numNodes,
      step_seconds: {
        draft: 0.12 * stepSeconds,
        verify: 0.76 * stepSeconds,
        accept: 0.04 * stepSeconds,
        commit: 0.08 * stepSeconds,
      },
    };
  }

  #accept(tree: TreeDebug): void {
    for (let tip = -1; ; ) {
      const children = tree.parents.flatMap((parent, node) => (parent === tip ? [node] : []));
      const draw = this.#random();
      const node = draw < 0.62 ? children[0] : draw < 0.76 ? children[1] : draw < 0.82 ? children[2] : undefined;
      if (node === undefined) return;
      tree.accepted[node] = true;
      tip = node;
    }
  }

  #text(): string {
    if (this.#random() < 0.2) return PIECES[Math.floor(this.#random() * PIECES.length)] ?? "";
    return ` ${WORDS[Math.floor(this.#random() * WORDS.length)] ?? ""}`;
  }

  #id(): number {
    return Math.floor(this.#random() * 49152);
  }
}

function weight(place: { probability: number; children: number }): number {
  return place.probability * (place.children === 0 ? 0.62 : 0.45 * 0.5 ** place.children);
}

function emptyTree(): TreeDebug {
  return {
    candidates: [],
    token_ids: [],
    accepted: [],
    parents: [],
    depths: [],
    probabilities: [],
    ranks: [],
    sources: [],
    num_nodes: 1,
    speedup: null,
    tokens_per_second: null,
    plain_tokens_per_second: null,
    step: 0,
    step_seconds: { draft: 0, verify: 0, accept: 0, commit: 0 },
    batch_size: 1,
  };
}
