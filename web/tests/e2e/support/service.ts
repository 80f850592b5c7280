// Gorgon's processes as they are deployed: settings by environment, a free port each, named in their logs.

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { mkdtemp, open, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

/** Of the repository. */
export const ROOT = resolve(import.meta.dirname, "../../../..");
export const VENV = resolve(process.env.GORGON_VENV ?? join(ROOT, ".venv"));
const START_MILLISECONDS = 150_000;
const POLL_MILLISECONDS = 50;

type Environment = Readonly<Record<string, string | number>>;

interface Program {
  name: string;
  /** Of the virtual environment. */
  command: string;
  arguments: readonly string[];
  environment: Environment;
  /** Finds its URL in its log. */
  says: RegExp;
  readyPath: string;
}

export class Service {
  readonly name: string;
  readonly #process: ChildProcess;
  readonly #folder: string;
  readonly #program: Program;
  #url = "";

  private constructor(program: Program, child: ChildProcess, folder: string) {
    this.name = program.name;
    this.#program = program;
    this.#process = child;
    this.#folder = folder;
  }

  /** Raises with the log of a process that ended or did not listen. */
  static async start(program: Program): Promise<Service> {
    const folder = await mkdtemp(join(tmpdir(), "gorgon-e2e-"));
    const log = await open(join(folder, "log"), "w");
    try {
      const child = spawn(join(VENV, "bin", program.command), program.arguments, {
        cwd: ROOT,
        env: environmentOf(program.environment),
        stdio: ["ignore", log.fd, log.fd],
      });
      const service = new Service(program, child, folder);
      child.on("error", () => undefined); // `waitFor` finds that it has no process
      await service.#waitFor("listen", async () => {
        service.#url = program.says.exec(service.log)?.[1] ?? "";
        return service.#url !== "";
      });
      return service;
    } finally {
      await log.close();
    }
  }

  get url(): string {
    return this.#url;
  }

  get port(): string {
    return new URL(this.#url).port;
  }

  get log(): string {
    return readFileSync(join(this.#folder, "log"), "utf8");
  }

  async ready(): Promise<this> {
    await this.#waitFor("become ready", async () => {
      try {
        return (await fetch(this.#url + this.#program.readyPath)).ok;
      } catch {
        return false;
      }
    });
    return this;
  }

  /** As the machine's out-of-memory killer does it. */
  async kill(): Promise<void> {
    await this.#end("SIGKILL");
  }

  async stop(): Promise<void> {
    await this.#end("SIGTERM");
    await rm(this.#folder, { recursive: true, force: true });
  }

  async #end(signal: NodeJS.Signals): Promise<void> {
    if (!this.#isRunning) return;
    const ended = once(this.#process, "exit");
    this.#process.kill(signal);
    await ended;
  }

  get #isRunning(): boolean {
    const { pid, exitCode, signalCode } = this.#process;
    return pid !== undefined && exitCode === null && signalCode === null;
  }

  async #waitFor(what: string, isDone: () => Promise<boolean>): Promise<void> {
    const end = Date.now() + START_MILLISECONDS;
    while (!(await isDone())) {
      if (!this.#isRunning) throw new Error(`${this.name} ended before it could ${what}:\n${this.log}`);
      if (Date.now() > end) throw new Error(`${this.name} did not ${what}:\n${this.log}`);
      await sleep(POLL_MILLISECONDS);
    }
  }
}

/** Both services with the small model and its heads, as a user starts them. */
export async function startGorgon(options: readonly string[], environment: Environment): Promise<Service> {
  const service = await Service.start({
    name: "gorgon up",
    command: "gorgon",
    arguments: ["up", "--no-open", "--port", "0", ...options],
    environment,
    says: /Gorgon is ready at (\S+)/,
    readyPath: "/health/ready",
  });
  return service.ready();
}

const LISTENS = /^(?=.*listening).*?(http:\/\/[^\s"]+:\d+)/m;

/** It listens, and may still be loading. `settings`: GORGON_ENGINE_* by their names in upper case. */
export function startEngine(settings: Environment): Promise<Service> {
  return Service.start({
    name: "the engine",
    command: "python",
    arguments: ["-m", "gorgon_engine"],
    environment: prefixed("GORGON_ENGINE_", settings),
    says: LISTENS,
    readyPath: "/ready",
  });
}

/** As `startEngine`. */
export function startGateway(settings: Environment): Promise<Service> {
  return Service.start({
    name: "the gateway",
    command: "python",
    arguments: ["-m", "gorgon_gateway"],
    environment: prefixed("GORGON_GATEWAY_", settings),
    says: LISTENS,
    readyPath: "/health/ready",
  });
}

export async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  server.close();
  await once(server, "close");
  if (address === null || typeof address === "string") throw new Error("the socket has no port");
  return address.port;
}

function prefixed(prefix: string, settings: Environment): Environment {
  return Object.fromEntries(Object.entries({ PORT: 0, ...settings }).map(([name, value]) => [prefix + name, value]));
}

/** Ours, without settings that happen to be set around. */
function environmentOf(own: Environment): NodeJS.ProcessEnv {
  const isKept = (name: string) => !name.startsWith("GORGON_") || name.includes("CACHE");
  const inherited = Object.entries(process.env).filter(([name]) => isKept(name));
  const given = Object.entries(own).map(([name, value]) => [name, String(value)]);
  return Object.fromEntries([...inherited, ...given]);
}
