import { useEffect, useRef, useState } from "react";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { short } from "../../insight/format";
import { useSize } from "../tree/useSize";
import { Legend } from "./Legend";
import { type Line, optionsOf } from "./plotOptions";
import { useTheme } from "./useTheme";

const HEIGHT = 150;

interface Props {
  label: string;
  x: readonly number[];
  lines: readonly Line[];
  /** The lines lie on each other: the space between them is filled. */
  isStacked?: boolean;
  /** Charts of the same key point at the same place. */
  syncKey?: string;
  /** Changes with the data, which may grow in place. */
  version: number;
}

/** Lines over steps or seconds, with their values where the pointer is, else at the end. */
export function TimeChart({ label, x, lines, isStacked = false, syncKey, version }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot>(undefined);
  const { width } = useSize(place);
  const theme = useTheme();
  const [pointed, setPointed] = useState<number | null>(null);
  const latest = useRef({ x, lines });
  latest.current = { x, lines };

  // A plot is made once for a width of more than nothing, and again for another theme.
  const hasRoom = width > 0;
  // biome-ignore lint/correctness/useExhaustiveDependencies: size and data come by the effects below
  useEffect(() => {
    if (!hasRoom || place.current === null) return;
    const { lines: now } = latest.current;
    const options = optionsOf(now, getComputedStyle(place.current), { isStacked, syncKey, onPoint: setPointed });
    plot.current = new uPlot({ ...options, width, height: HEIGHT }, alignedData(latest.current), place.current);
    return () => {
      plot.current?.destroy();
      plot.current = undefined;
    };
  }, [hasRoom, theme, isStacked, syncKey]);

  useEffect(() => {
    if (hasRoom) plot.current?.setSize({ width, height: HEIGHT });
  }, [hasRoom, width]);

  // biome-ignore lint/correctness/useExhaustiveDependencies: `version` stands for the data
  useEffect(() => {
    plot.current?.setData(alignedData(latest.current));
  }, [version]);

  const shown = pointed !== null && pointed < x.length ? pointed : x.length - 1;
  return (
    <div className="insight-chart">
      <div ref={place} className="insight-chart__plot" role="img" aria-label={label} />
      <Legend entries={lines.map((line) => ({ name: line.name, kind: line.kind, value: valueText(line, shown) }))} />
    </div>
  );
}

function alignedData({ x, lines }: { x: readonly number[]; lines: readonly Line[] }): uPlot.AlignedData {
  return [x, ...lines.map((line) => line.data)] as uPlot.AlignedData;
}

function valueText(line: Line, index: number): string {
  const value = (line.values ?? line.data)[index] ?? null;
  return value === null ? "–" : short(value);
}
