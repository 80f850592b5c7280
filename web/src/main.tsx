import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import "./theme.css";
import { ServerStore } from "./server/server";
import { ApiKey } from "./session/apiKey";
import { Session } from "./session/session";
import { App } from "./view/App";
import { applyTheme, currentTheme } from "./view/theme";
import { makeGenerate } from "./wire/generate";

const root = document.getElementById("root");
if (root === null) throw new Error("index.html has no #root");

applyTheme(currentTheme());
const apiKey = new ApiKey(sessionStorage);
const server = new ServerStore(apiKey.get);
const generate = makeGenerate({
  url: () => new URL("/generate_stream", location.href).href.replace(/^http/, "ws"),
  key: apiKey.get,
  explain: () => server.refusal(),
});

createRoot(root).render(
  <StrictMode>
    <App server={server} session={new Session(generate)} apiKey={apiKey} generate={generate} />
  </StrictMode>,
);
