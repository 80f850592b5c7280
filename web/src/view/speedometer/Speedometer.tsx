// Tokens per second as a dial: the needle shows the last second, the number the average since the first token, the mark
// what plain decoding reaches on the same machine.

import { memo, useMemo } from "react";
import { hasEnded, type Run } from "../../run/run";
import { type RunProps, useVersion } from "../hooks";
import { type Speeds, speedsAt } from "./rate";
import { DialScale, degreesOf, shortNumber, ticksOf } from "./scale";
import "./speedometer.css";

const RADIUS = 58;
const CENTRE = { x: 82, y: 76 };

export function Speedometer({ store, player }: RunProps) {
  useVersion(store);
  useVersion(player);
  const { run } = store;
  // biome-ignore lint/correctness/useExhaustiveDependencies: every run begins with a scale of its own.
  const scale = useMemo(() => new DialScale(), [run]);
  const speeds = speedsAt(run, player.position);
  const showsLastSecond = !player.isLive || run.phase === "streaming";
  const needle = showsLastSecond ? (speeds.current ?? speeds.average) : restingNeedle(run, speeds);
  const end = scale.fit(Math.max(needle ?? 0, speeds.average ?? 0, speeds.plain ?? 0));
  return (
    <figure className="speedometer" aria-label={inWords(speeds)}>
      <svg viewBox="0 0 220 150" aria-hidden="true">
        <Dial end={end} plain={speeds.plain} />
        {needle !== null && <path className="speedometer__arc" d={arc(0, needle, end)} />}
        <g
          className="speedometer__needle"
          style={{ transform: `translate(${CENTRE.x}px, ${CENTRE.y}px) rotate(${degreesOf(needle ?? 0, end)}deg)` }}
        >
          <path d={`M-2.2 0L0 ${-RADIUS + 10}L2.2 0Z`} />
          <circle r="5" />
        </g>
        <text className="speedometer__average" x={CENTRE.x} y={CENTRE.y + 38}>
          {speeds.average === null ? "–" : shortNumber(speeds.average)}
        </text>
        <text className="speedometer__unit" x={CENTRE.x} y={CENTRE.y + 52}>
          {speeds.average === null ? "measuring" : "tokens/s, average"}
        </text>
        <text className="speedometer__unit" x={CENTRE.x} y={CENTRE.y + 66}>
          {needle !== null && showsLastSecond ? "needle: last second" : ""}
        </text>
        <Speedup speeds={speeds} />
      </svg>
    </figure>
  );
}

/** Where the needle is while no tokens come: on the average once the run has ended, else at nothing. */
function restingNeedle(run: Run, { average }: Speeds): number | null {
  return hasEnded(run) ? average : null;
}

const Dial = memo(function Dial({ end, plain }: { end: number; plain: number | null }) {
  return (
    <>
      <path className="speedometer__track" d={arc(0, end, end)} />
      {ticksOf(end).map((value) => {
        const [x, y] = onDial(value, end, RADIUS + 13);
        return (
          <text key={value} className="speedometer__tick" x={x} y={y + 3}>
            {shortNumber(value)}
          </text>
        );
      })}
      {plain !== null && (
        <g transform={`translate(${CENTRE.x} ${CENTRE.y}) rotate(${degreesOf(plain, end)})`}>
          <path className="speedometer__plain" d={`M0 ${-RADIUS - 7}V${-RADIUS + 7}`} />
        </g>
      )}
    </>
  );
});

function Speedup({ speeds: { speedup, plain } }: { speeds: Speeds }) {
  return (
    <g transform="translate(188 70)">
      <text className="speedometer__speedup">{speedup === null ? "–" : `${speedup.toFixed(1)}×`}</text>
      <text className="speedometer__unit" y={16}>
        {speedup === null ? "speedup" : "plain speed"}
      </text>
      {plain !== null && (
        <text className="speedometer__unit speedometer__unit--plain" y={30}>
          ▎{shortNumber(plain)} tok/s
        </text>
      )}
    </g>
  );
}

function onDial(value: number, end: number, radius: number): [number, number] {
  const radians = (degreesOf(value, end) * Math.PI) / 180;
  return [CENTRE.x + radius * Math.sin(radians), CENTRE.y - radius * Math.cos(radians)];
}

function arc(from: number, to: number, end: number): string {
  const [x0, y0] = onDial(from, end, RADIUS);
  const [x1, y1] = onDial(to, end, RADIUS);
  const isLarge = degreesOf(to, end) - degreesOf(from, end) > 180 ? 1 : 0;
  return `M${x0} ${y0}A${RADIUS} ${RADIUS} 0 ${isLarge} 1 ${x1} ${y1}`;
}

function inWords({ current, average, plain, speedup }: Speeds): string {
  if (average === null) return "Speed: measuring";
  const parts = [`Speed: ${shortNumber(average)} tokens per second on average`];
  if (current !== null) parts.push(`${shortNumber(current)} in the last second`);
  if (plain !== null) parts.push(`plain decoding ${shortNumber(plain)}`);
  if (speedup !== null) parts.push(`${speedup.toFixed(1)} times plain decoding`);
  return parts.join(", ");
}
