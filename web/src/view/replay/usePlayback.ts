import { useEffect, useRef, useState } from "react";
import { Playback } from "../../run/playback";
import type { Player } from "../../run/player";
import type { RunProps } from "../hooks";

export interface PlaybackControl {
  isPlaying: boolean;
  play: () => void;
  stop: () => void;
}

/** Plays the run's steps in their own time, `rate` times as fast. */
export function usePlayback({ store, player }: RunProps, rate: number): PlaybackControl {
  // Of which run: another one's bar begins still.
  const [playing, setPlaying] = useState<Player | null>(null);
  const isPlaying = playing === player;
  const latestRate = useRef(rate);
  latestRate.current = rate;

  useEffect(() => {
    if (!isPlaying) return;
    const playback = new Playback(player, store.run.steps);
    let frame = requestAnimationFrame(function draw(now) {
      if (playback.tick(now, latestRate.current)) frame = requestAnimationFrame(draw);
      else setPlaying(null);
    });
    return () => cancelAnimationFrame(frame);
  }, [isPlaying, store, player]);

  return { isPlaying, play: () => setPlaying(player), stop: () => setPlaying(null) };
}
