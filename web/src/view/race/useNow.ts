import { useEffect, useState } from "react";

/** Milliseconds of the steady clock, anew each frame while `isRunning`. */
export function useNow(isRunning: boolean): number {
  const [now, setNow] = useState(() => performance.now());
  useEffect(() => {
    if (!isRunning) return;
    let frame = requestAnimationFrame(function draw() {
      setNow(performance.now());
      frame = requestAnimationFrame(draw);
    });
    return () => cancelAnimationFrame(frame);
  }, [isRunning]);
  return now;
}
