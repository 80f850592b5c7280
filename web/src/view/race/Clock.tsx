import { useNow } from "./useNow";

interface Props {
  name: string;
  /** It counts from `since` on; else it stands at `value`. */
  isRunning: boolean;
  since: number | null;
  value: number | null;
}

export function Clock({ name, isRunning, since, value }: Props) {
  const now = useNow(isRunning);
  const shown = isRunning && since !== null ? Math.max(0, now - since) : value;
  return (
    <div>
      <dt>{name}</dt>
      <dd className={isRunning ? "race-clock race-clock--running" : "race-clock"}>
        {shown === null ? "–" : `${(shown / 1000).toFixed(2)} s`}
      </dd>
    </div>
  );
}
