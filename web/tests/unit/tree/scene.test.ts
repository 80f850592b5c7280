import { describe, expect, it } from "vitest";
import { MAX_TREES, type Run, record, startRun } from "../../../src/run/run";
import { NODE_HEIGHT } from "../../../src/tree/geometry";
import { boxOf, NUM_FADING, neighbour, numNodes, type Scene, TreeModel, targetAt } from "../../../src/tree/scene";
import { firstMessage, generatedRun, messageOf } from "./runs";

const EVERYWHERE = [Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY] as const;

function smallRun(): Run {
  const run = startRun({ prompt: "x" }, "2026-11-25T09:00:00.000Z");
  record(run, firstMessage("The"), 0);
  const nodes = [
    { text: " cat", parent: -1, isAccepted: true },
    { text: " dog", parent: -1, rank: 1 },
    { text: " sat", parent: 0, isAccepted: true },
    { text: " ran", parent: 0, rank: 1 },
  ];
  record(run, messageOf(nodes, " on"), 100);
  return run;
}

const labelsOf = (scene: Scene) => scene.tokens.map(({ label }) => label);

describe("TreeModel", () => {
  it("joins the accepted path to the trunk, the rest hangs off it", () => {
    const scene = new TreeModel(smallRun()).scene(2, ...EVERYWHERE);
    expect(labelsOf(scene)).toEqual(["The", "·cat", "·sat", "·on"]);
    expect(scene.tokens.map(({ isNew, isDraft }) => [isNew, isDraft])).toEqual([
      [false, false],
      [true, true],
      [true, true],
      [true, false],
    ]);
    expect(scene.current?.rejected.map(({ label }) => label)).toEqual(["·dog", "·ran"]);
    expect(scene.tokens.every(({ y }) => y === 0)).toBe(true);
  });

  it("hangs each tree off the token that its step began at", () => {
    const run = generatedRun(3, 20);
    const model = new TreeModel(run);
    for (let position = 2; position <= run.steps.length; position += 1) {
      const { current, tokens } = model.scene(position, ...EVERYWHERE);
      const root = (run.steps[position - 1]?.firstToken ?? 0) - 1;
      expect(current?.x).toBe(tokens[root]?.x);
      expect(current?.layout.rootWidth).toBe(tokens[root]?.width);
    }
  });

  it("gives step by step what it gives from scratch", () => {
    const run = startRun({ prompt: "x" }, "2026-11-25T09:00:00.000Z");
    const growing = new TreeModel(run);
    const source = generatedRun(4, 40);
    source.steps.forEach((step, i) => {
      run.steps.push(step);
      run.tokens.push(...source.tokens.slice(step.firstToken, step.firstToken + step.numTokens));
      expect(growing.scene(i + 1, ...EVERYWHERE)).toEqual(new TreeModel(run).scene(i + 1, ...EVERYWHERE));
    });
    const whole = new TreeModel(source);
    for (const position of [40, 7, 23, 1, 0]) {
      expect(whole.scene(position, ...EVERYWHERE)).toEqual(growing.scene(position, ...EVERYWHERE));
    }
  });

  it("lays each tree out once", () => {
    const model = new TreeModel(generatedRun(5, 10));
    const first = model.scene(9, ...EVERYWHERE).current;
    model.scene(3, ...EVERYWHERE);
    expect(model.scene(9, ...EVERYWHERE).current).toBe(first);
  });

  it("draws of the trunk what is in view, and all of the shown step", () => {
    const run = generatedRun(6, 300);
    const model = new TreeModel(run);
    const all = model.scene(300, ...EVERYWHERE);
    const [left, right] = [2000, 2900];
    const seen = model.scene(300, left, right);
    const old = seen.tokens.filter(({ isNew }) => !isNew);
    const isSeen = (token: (typeof old)[number]) => token.x + token.width >= left && token.x <= right;
    const expected = all.tokens.filter((token) => !token.isNew && isSeen(token));
    expect(old.filter(isSeen)).toEqual(expected);
    expect(old.length).toBeLessThanOrEqual(expected.length + 1);
    expect(seen.tokens.filter(({ isNew }) => isNew)).toEqual(all.tokens.filter(({ isNew }) => isNew));
    expect(all.tokens).toHaveLength(run.tokens.length);
  });

  it("keeps the steps just before, the latest first", () => {
    const { fading } = new TreeModel(generatedRun(7, 30)).scene(20, ...EVERYWHERE);
    expect(fading.map(({ step }) => step)).toEqual(Array.from({ length: NUM_FADING }, (_, i) => 18 - i));
  });

  it("shows the trunk alone where a step has no tree", () => {
    const run = generatedRun(8, 10);
    const step = run.steps[9];
    if (step === undefined) throw new Error("no such step");
    step.tree = null;
    const scene = new TreeModel(run).scene(10, ...EVERYWHERE);
    expect(scene.current).toBeNull();
    expect(scene.tokens).toHaveLength(run.tokens.length);
    expect(scene.anchor).toBe(scene.tokens.at(-1)?.x);
  });

  it("is empty before the first step", () => {
    const scene = new TreeModel(startRun({ prompt: "x" }, "")).scene(0, ...EVERYWHERE);
    expect(scene).toMatchObject({ step: -1, tokens: [], current: null, fading: [] });
  });

  it("finds the root of merged steps: the last step's tokens stand at the end", () => {
    const run = smallRun();
    const message = messageOf([{ text: " the", parent: -1, isAccepted: true }], " mat");
    const earlier = { pieces: [" all", " day", ","], token_ids: [1, 2, 3], num_accepted: 3 };
    record(
      run,
      {
        ...message,
        pieces: [...earlier.pieces, ...message.pieces],
        token_ids: [...earlier.token_ids, ...message.token_ids],
        num_accepted: earlier.num_accepted,
      },
      200,
    );
    const scene = new TreeModel(run).scene(3, ...EVERYWHERE);
    expect(labelsOf(scene).slice(-3)).toEqual([",", "·the", "·mat"]);
    expect(scene.current?.x).toBe(scene.tokens.at(-3)?.x);
  });

  it("takes an answer's end inside an accepted path: what did not become a token is not on the trunk", () => {
    const run = smallRun();
    const nodes = ["a", "b", "c"].map((text, i) => ({ text, parent: i - 1, isAccepted: true }));
    const message = messageOf(nodes, null);
    record(run, { ...message, pieces: ["a", "b"], token_ids: [100, 101], num_accepted: 2 }, 200);
    const scene = new TreeModel(run).scene(3, ...EVERYWHERE);
    expect(labelsOf(scene).slice(-3)).toEqual(["·on", "a", "b"]);
    expect(scene.current?.x).toBe(scene.tokens.at(-3)?.x);
    expect(scene.current?.rejected.map(({ label }) => label)).toEqual(["c"]);
  });

  it("stays exact behind a hundred thousand tokens, and lets old trees go", () => {
    const run = generatedRun(9, MAX_TREES + 50, { numNodes: 4 });
    while (run.tokens.length < 100_000) run.tokens.push({ id: 1, text: " word", step: 0, draft: null });
    const model = new TreeModel(run);
    model.shown(run.steps.length);
    expect(model.axis.length).toBe(100_000);
    expect(model.axis.left(100_000) - model.axis.left(99_999)).toBe(model.axis.left(99_999) - model.axis.left(99_998));
    expect(model.scene(10, ...EVERYWHERE).current).toBeNull();
  });
});

describe("targets", () => {
  const scene = new TreeModel(smallRun()).scene(2, ...EVERYWHERE);

  it("are found where they stand", () => {
    const targets = [...[0, 1, 2, 3].map((token) => ({ token })), { step: 1, node: 1 }, { step: 1, node: 3 }];
    for (const target of targets) {
      const box = boxOf(scene, target);
      if (box === null) throw new Error(`no box for ${JSON.stringify(target)}`);
      expect(targetAt(scene, box.x + box.width / 2, box.y)).toEqual(target);
      expect(targetAt(scene, box.x + box.width / 2, box.y + NODE_HEIGHT / 2 + 0.5)).not.toEqual(target);
    }
    expect(numNodes(scene)).toBe(targets.length);
  });

  it("are nothing beside the nodes, of another step or unknown", () => {
    expect(targetAt(scene, -500, 300)).toBeNull();
    expect(boxOf(scene, { step: 0, node: 1 })).toBeNull();
    expect(boxOf(scene, { token: 99 })).toBeNull();
  });

  it("have neighbours: along the trunk, into the branches and back", () => {
    expect(neighbour(scene, { token: 0 }, "right")).toEqual({ token: 1 });
    expect(neighbour(scene, { token: 2 }, "left")).toEqual({ token: 1 });
    expect(neighbour(scene, { step: 1, node: 1 }, "left")).toEqual({ token: 0 });
    expect(neighbour(scene, { token: 3 }, "right")).toBeNull();
    const dog = boxOf(scene, { step: 1, node: 1 });
    expect(neighbour(scene, { token: 1 }, (dog?.y ?? 0) < 0 ? "up" : "down")).toEqual({ step: 1, node: 1 });
  });
});
