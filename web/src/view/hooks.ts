// The thin binding of the stores to React.

import { useSyncExternalStore } from "react";
import type { Player } from "../run/player";
import type { RunStore } from "../run/store";

interface Versioned {
  version: () => number;
  subscribe: (listener: () => void) => () => void;
}

/** Draws the component again whenever the store says so; gives the version, for memos. */
export function useVersion(store: Versioned): number {
  return useSyncExternalStore(store.subscribe, store.version);
}

/** What every view of a run is given. */
export interface RunProps {
  store: RunStore;
  player: Player;
}
