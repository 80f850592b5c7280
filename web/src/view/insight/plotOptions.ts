import type uPlot from "uplot";

export interface Line {
  name: string;
  /** Names its colour: `--insight-<kind>`. */
  kind: string;
  data: readonly (number | null)[];
  /** What the legend says, where the line itself is a sum. */
  values?: readonly (number | null)[];
  look?: "thin" | "dashed";
}

interface Choices {
  isStacked: boolean;
  syncKey: string | undefined;
  /** Index of the point under the pointer; null: none. */
  onPoint: (index: number | null) => void;
}

type Options = Omit<uPlot.Options, "width" | "height">;

/** `style`: where the theme's colours are in force. */
export function optionsOf(lines: readonly Line[], style: CSSStyleDeclaration, choices: Choices): Options {
  const colour = (name: string) => style.getPropertyValue(`--${name}`).trim();
  const axis: uPlot.Axis = {
    stroke: colour("text-muted"),
    font: `11px ${style.fontFamily}`,
    grid: { stroke: colour("border"), width: 1 },
    ticks: { show: false },
  };
  const { isStacked, syncKey, onPoint } = choices;
  const options: Options = {
    padding: [8, 8, 0, 0],
    legend: { show: false },
    cursor: {
      drag: { x: false, y: false },
      points: { size: 6 },
      y: false,
      ...(syncKey === undefined ? {} : { sync: { key: syncKey } }),
    },
    scales: {
      x: { time: false },
      y: { range: (_plot, _min, max) => [0, Math.max(1, 1.08 * (max ?? 1))] },
    },
    axes: [
      { ...axis, grid: { show: false }, size: 26, gap: 4 },
      { ...axis, size: 36, gap: 4 },
    ],
    series: [{}, ...lines.map((line) => seriesOf(line, colour(`insight-${line.kind}`), isStacked))],
    hooks: { setCursor: [(plot) => onPoint(plot.cursor.idx ?? null)] },
  };
  if (isStacked) {
    // Each line is the sum of those below it; the lowest is filled down to the axis by its series.
    options.bands = lines
      .slice(1)
      .map((line, i) => ({ series: [i + 2, i + 1], fill: fillOf(colour(`insight-${line.kind}`)) }));
  }
  return options;
}

function seriesOf(line: Line, stroke: string, isStacked: boolean): uPlot.Series {
  const series: uPlot.Series = {
    label: line.name,
    stroke,
    width: isStacked || line.look === "thin" ? 1 : 2,
    points: { show: false },
  };
  if (isStacked) series.fill = fillOf(stroke);
  if (line.look === "dashed") series.dash = [5, 4];
  if (line.look === "thin") series.alpha = 0.55;
  return series;
}

/** A colour "#rrggbb", half transparent. */
function fillOf(colour: string): string {
  return `${colour}99`;
}
