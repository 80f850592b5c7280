import { useMemo, useSyncExternalStore } from "react";

/** Whether the user asked for less motion. */
export function usePrefersReducedMotion(): boolean {
  const { subscribe, matches } = useMemo(reducedMotion, []);
  return useSyncExternalStore(subscribe, matches);
}

function reducedMotion() {
  const media = window.matchMedia("(prefers-reduced-motion: reduce)");
  return {
    matches: () => media.matches,
    subscribe: (listener: () => void) => {
      media.addEventListener("change", listener);
      return () => media.removeEventListener("change", listener);
    },
  };
}
