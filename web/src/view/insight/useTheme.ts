import { useSyncExternalStore } from "react";

/** The theme in force: charts on a canvas have to be drawn again for another one. */
export function useTheme(): string | undefined {
  return useSyncExternalStore(subscribe, () => document.documentElement.dataset.theme);
}

function subscribe(listener: () => void): () => void {
  const observer = new MutationObserver(listener);
  observer.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  return () => observer.disconnect();
}
