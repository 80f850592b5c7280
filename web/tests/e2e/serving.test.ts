import { createHash, randomBytes } from "node:crypto";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { expect, inject } from "vitest";
import { test } from "./support/browser";
import { startGateway } from "./support/service";

const MAX_BUNDLE_BYTES = 250_000;

test("the page is served with a policy that lets nothing in from elsewhere", async () => {
  const response = await fetch(inject("stack").url);
  const policy = response.headers.get("content-security-policy") ?? "";
  const directives = new Map(policy.split("; ").map((entry) => [entry.split(" ")[0], entry.split(" ").slice(1)]));
  expect(policy).not.toMatch(/unsafe-|\*|https?:/);
  expect(directives.get("default-src")).toEqual(["'none'"]);
  for (const name of ["script-src", "style-src", "connect-src"]) expect(directives.get(name)).toEqual(["'self'"]);
  expect(directives.get("frame-ancestors")).toEqual(["'none'"]);
  const html = await response.text();
  expect(html).not.toMatch(/<style| style=|<script(?![^>]* src="\/assets\/)/);
});

test("a script that was slipped into the page does not run", async ({ visit }) => {
  const { page } = await visit({ expected: /Content Security Policy/ });
  const hasRun = await page.evaluate(() => {
    const script = document.createElement("script");
    script.textContent = "window.slipped = true";
    document.body.append(script);
    const image = document.createElement("div");
    image.innerHTML = `<img src="data:," onerror="window.slipped = true">`;
    document.body.append(image);
    return new Promise((resolve) => setTimeout(() => resolve("slipped" in window), 100));
  });
  expect(hasRun).toBe(false);
});

test("scripts and styles are small", async () => {
  const folder = join(inject("stack").webRoot, "assets");
  const names = (await readdir(folder)).filter((name) => /\.(js|css)$/.test(name));
  expect(names.some((name) => name.endsWith(".js"))).toBe(true);
  const sizes = await Promise.all(names.map(async (name) => gzipSync(await readFile(join(folder, name))).length));
  expect(sizes.reduce((sum, size) => sum + size, 0)).toBeLessThan(MAX_BUNDLE_BYTES);
});

test("a gateway with keys asks for one, refuses a wrong one in words, and takes a right one", async ({ visit }) => {
  const { engineUrl, secretFile, webRoot } = inject("stack");
  const folder = await mkdtemp(join(tmpdir(), "gorgon-e2e-"));
  const key = `gorgon_${randomBytes(32).toString("base64url")}`;
  const sha256 = createHash("sha256").update(key).digest("hex");
  await writeFile(join(folder, "keys"), `${JSON.stringify({ name: "e2e", sha256 })}\n`);
  const gateway = await startGateway({
    ENGINES: engineUrl,
    ENGINE_SECRET_FILE: secretFile,
    API_KEYS_FILE: join(folder, "keys"),
    WEB_ROOT: webRoot,
  });
  try {
    await gateway.ready();
    const visitor = await visit({ url: gateway.url, expected: /status of 401/ });
    const { page } = visitor;
    const field = page.getByLabel("This gateway asks for an API key:");
    await field.fill("not ASCII: ключ");
    await page.getByRole("button", { name: "Use it" }).click();
    await page.getByRole("alert").filter({ hasText: "no letters beyond ASCII" }).waitFor();
    await field.fill("gorgon_wrong");
    await page.getByRole("button", { name: "Use it" }).click();
    await page.getByRole("alert").filter({ hasText: "does not know this API key" }).waitFor();
    await field.fill(key);
    await page.getByRole("button", { name: "Use it" }).click();
    await field.waitFor({ state: "detached" });
    await page.getByText("smollm2").first().waitFor();

    await visitor.set({ "Max tokens": "20" });
    await visitor.ask("Name a colour.");
    await visitor.ended();
    expect((await visitor.text()).length).toBeGreaterThan(0);
    expect(page.url()).not.toContain(key);
    // It is this tab's alone.
    const other = await page.context().newPage();
    await other.goto(gateway.url);
    await other.getByLabel("This gateway asks for an API key:").waitFor();
  } finally {
    await gateway.stop();
    await rm(folder, { recursive: true, force: true });
  }
});
