// The top line: who serves what.

import { useState } from "react";
import type { ServerState } from "../server/server";
import { HelpDialog } from "./HelpDialog";
import { ServerBadge } from "./states/ServerBadge";
import { chooseTheme, currentTheme, type Theme } from "./theme";

interface Props {
  server: ServerState;
  mode: Mode;
  setMode: (mode: Mode) => void;
}

export type Mode = "generate" | "race";
const MODES: Readonly<Record<Mode, string>> = { generate: "Generate", race: "Race" };

export function Header({ server, mode, setMode }: Props) {
  return (
    <header className="header">
      <div className="header-brand">
        <h1>Gorgon</h1>
        <ServerBadge state={server} />
      </div>
      <nav className="header-modes" aria-label="What to do">
        {(Object.keys(MODES) as Mode[]).map((name) => (
          <button
            key={name}
            type="button"
            className="button header-mode"
            aria-pressed={mode === name}
            onClick={() => setMode(name)}
          >
            {MODES[name]}
          </button>
        ))}
      </nav>
      <div className="header-tools">
        <ThemeSwitch />
        <HelpDialog />
      </div>
    </header>
  );
}

const SUN =
  "M12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6 7 7M17 17l1.4 1.4M18.4 5.6 17 7M7 17l-1.4 1.4M16 12a4 4 0 1 1-8 0 4 4 0 0 1 8 0z";
const MOON = "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z";

function ThemeSwitch() {
  const [theme, setTheme] = useState<Theme>(currentTheme);
  const other: Theme = theme === "dark" ? "light" : "dark";
  return (
    <button
      type="button"
      className="button button--quiet header-icon"
      aria-label={`Switch to ${other} colours`}
      title={`Switch to ${other} colours`}
      onClick={() => {
        chooseTheme(other);
        setTheme(other);
      }}
    >
      <svg viewBox="0 0 24 24" width="18" height="18" aria-hidden="true">
        <path d={other === "light" ? SUN : MOON} />
      </svg>
    </button>
  );
}
