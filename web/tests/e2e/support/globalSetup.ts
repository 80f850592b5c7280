// Once for all files.

import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestProject } from "vitest/node";
import { type Stack, startStack } from "./stack";

declare module "vitest" {
  interface ProvidedContext {
    stack: Stack;
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const folder = await mkdtemp(join(tmpdir(), "gorgon-e2e-"));
  const { stack, service } = await startStack(folder);
  project.provide("stack", stack);
  return async () => {
    await service.stop();
    await rm(folder, { recursive: true, force: true });
  };
}
