// The page, built, and what it is served by.

import { execFileSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { cp, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { freePort, ROOT, type Service, startGorgon, VENV } from "./service";

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

/** `folder`: for what it needs on disk; the caller stops the service, then removes it. */
export async function startStack(folder: string): Promise<{ stack: Stack; service: Service }> {
  execFileSync(join(ROOT, "scripts/web.sh"), [VENV, "build"], { stdio: "inherit" });
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
