// The page: what is asked on the left, what the engine does on the right.

import { useEffect, useState, useSyncExternalStore } from "react";
import type { ServerState, ServerStore } from "../server/server";
import type { ApiKey } from "../session/apiKey";
import type { Session } from "../session/session";
import { keepSettings, problemsOf, readSettings, requestOf, type Settings } from "../session/settings";
import type { Generate } from "../wire/generate";
import { ChatPanel } from "./chat/ChatPanel";
import { ExampleList } from "./chat/Examples";
import { Controls } from "./controls/Controls";
import { Header, type Mode } from "./Header";
import { useVersion } from "./hooks";
import { KeyPanel } from "./KeyPanel";
import { RunPanels } from "./RunPanels";
import { RacePanel } from "./race/RacePanel";
import { wordsOf } from "./states/ServerBadge";
import "./app.css";

interface Props {
  server: ServerStore;
  session: Session;
  apiKey: ApiKey;
  generate: Generate;
}

export function App({ server, session, apiKey, generate }: Props) {
  useVersion(session);
  const state = useSyncExternalStore(server.subscribe, server.state);
  const [settings, setSettings] = useState<Settings>(() => readSettings(localStorage));
  const [prompt, setPrompt] = useState("");
  const [mode, setMode] = useState<Mode>("generate");
  useEffect(() => server.start(), [server]);
  useEscape(session);

  const problems = problemsOf(settings);
  const obstacle = obstacleOf(state, Object.keys(problems).length > 0);
  const isChat = settings.mode === "chat";
  const model = state.models[0] ?? null;
  const change = (next: Settings) => {
    setSettings(next);
    if (Object.keys(problemsOf(next)).length === 0) keepSettings(localStorage, next);
  };
  const ask = (text: string) => {
    if (obstacle !== null || text.trim() === "" || session.isRunning) return;
    const turns = isChat ? session.history : [];
    void session.ask(requestOf(settings, turns, text), text, model, isChat);
    setPrompt(isChat ? "" : text);
  };
  const raced = () => (obstacle === null && prompt.trim() !== "" ? requestOf(settings, [], prompt) : null);

  return (
    <div className={`app app--${mode}`}>
      <Header server={state} mode={mode} setMode={setMode} />
      {state.needsKey && <KeyPanel submit={(key) => taken(key, apiKey, server)} />}
      <main className="app-main">
        <div className="app-side card">
          <Controls settings={settings} problems={problems} change={change} />
          {mode === "generate" ? (
            <ChatPanel
              session={session}
              prompt={prompt}
              setPrompt={setPrompt}
              isChat={isChat}
              obstacle={obstacle}
              ask={ask}
            />
          ) : (
            <RacePrompt prompt={prompt} setPrompt={setPrompt} isChat={isChat} obstacle={obstacle} />
          )}
        </div>
        {mode === "generate" ? (
          <RunPanels session={session} device={state.engines[0]?.device ?? null} />
        ) : (
          <div className="app-race card">
            <RacePanel request={raced} generate={generate} model={model} />
          </div>
        )}
      </main>
    </div>
  );
}

interface RacePromptProps {
  prompt: string;
  setPrompt: (prompt: string) => void;
  isChat: boolean;
  obstacle: string | null;
}

function RacePrompt({ prompt, setPrompt, isChat, obstacle }: RacePromptProps) {
  return (
    <div className="race-prompt">
      <label htmlFor="race-prompt">What both lanes answer</label>
      <textarea
        id="race-prompt"
        className="input"
        rows={6}
        value={prompt}
        placeholder="Write a short story about a lighthouse keeper."
        onChange={(event) => setPrompt(event.target.value)}
      />
      <p className="chat-obstacle" role="status">
        {obstacle}
      </p>
      <ExampleList isChat={isChat} choose={setPrompt} />
    </div>
  );
}

/** What is wrong with the key, which else is used from now on; null: nothing. */
async function taken(key: string, apiKey: ApiKey, server: ServerStore): Promise<string | null> {
  return apiKey.set(key) ?? (await server.refusal())?.message ?? null;
}

/** Why nothing can be asked now. */
function obstacleOf(state: ServerState, hasProblems: boolean): string | null {
  if (hasProblems) return "a setting is wrong: see Settings";
  // While a model loads the gateway lets requests wait.
  if ((state.phase === "ready" && !state.needsKey) || state.phase === "loading") return null;
  return wordsOf(state);
}

function useEscape(session: Session): void {
  useEffect(() => {
    const onKeyDown = (event: KeyboardEvent) => {
      if (event.key === "Escape" && document.querySelector("dialog[open]") === null) session.stop();
    };
    window.addEventListener("keydown", onKeyDown);
    return () => window.removeEventListener("keydown", onKeyDown);
  }, [session]);
}
