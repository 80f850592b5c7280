// Once for all files: the page, built, and what it is served by.

import { execFileSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { cp, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestProject } from "vitest/node";
import { freePort, ROOT, type Service, startGorgon } from "./service";

declare module "vitest" {
  interface ProvidedContext {
    stack: Stack;
  }
}

/** Everything that tests need to know of what runs. */
export interface Stack {
  /** Of the gateway and its page. */
  url: string;
  engineUrl: string;
  /** File with the secret that the engine asks for. */
  secretFile: string;
  /** Folder with the built page: others may build it anew meanwhile, tests look at one and the same. */
  webRoot: string;
}

export async function startStack(folder: string): Promise<{ stack: Stack; service: Service }> {
  const venv = process.env.GORGON_VENV ?? join(ROOT, ".venv");
  execFileSync(join(ROOT, "scripts/web.sh"), [venv, "build"], { stdio: "inherit" });
  const webRoot = join(folder, "page");
  await cp(join(ROOT, "services/gateway/gorgon_gateway/static"), webRoot, { recursive: true });
  const secretFile = join(folder, "secret");
  await writeFile(secretFile, randomBytes(24).toString("base64url"));
  const enginePort = await freePort();
  const service = await startGorgon(["--engine-port", String(enginePort)], {
    GORGON_ENGINE_SECRET_FILE: secretFile,
    GORGON_GATEWAY_WEB_ROOT: webRoot,
  });
  return { stack: { url: service.url, engineUrl: `http://127.0.0.1:${enginePort}`, secretFile, webRoot }, service };
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
