import { memo, useMemo } from "react";
import {
  countBars,
  countTable,
  depthBars,
  depthTable,
  kindOf,
  lengthTable,
  STACK_ORDER,
  sizeTable,
  speedTable,
  stackedTimes,
  tiles,
  timeSource,
  timeTable,
} from "../../insight/charts";
import { type Figures, FiguresBuilder } from "../../insight/figures";
import { Throttle } from "../../insight/throttle";
import { type RunProps, useVersion } from "../hooks";
import { Bars } from "./Bars";
import { ChartCard } from "./ChartCard";
import { Legend } from "./Legend";
import { TimeChart } from "./TimeChart";
import { TimeSplit } from "./TimeSplit";
import "./insight.css";

/** Milliseconds between two updates. */
const UPDATE_EVERY = 250;
const STEPS = "insight-steps";

interface Props extends RunProps {
  /** Of the engine that ran it, as `/info` says: where its step times come from. */
  device?: string | null;
}

interface ChartProps {
  figures: Figures;
  version: number;
}

/** What speculation did over the run, up to the step that is shown. */
export const InsightPanel = memo(function InsightPanel({ store, player, device = null }: Props) {
  const throttle = useMemo(() => new Throttle([store, player], UPDATE_EVERY), [store, player]);
  const version = useVersion(throttle);
  const builder = useMemo(() => new FiguresBuilder(store.run), [store]);
  const figures = builder.upTo(player.position);
  if (figures.speeds.seconds.length === 0) {
    return (
      <div className="insight">
        <p className="insight-empty">
          Here stands how speculation does: how many tokens each step gives, whose guesses hold, where the time goes.
        </p>
      </div>
    );
  }
  const props = { figures, version };
  return (
    <div className="insight">
      <Tiles figures={figures} />
      <div className="insight-grid">
        <LengthChart {...props} />
        <SpeedChart {...props} />
        <SizeChart {...props} />
        <TimeSplitChart {...props} device={device} />
        <DepthChart figures={figures} />
        <RankChart figures={figures} />
      </div>
    </div>
  );
});

function Tiles({ figures }: { figures: Figures }) {
  return (
    <dl className="insight-tiles">
      {tiles(figures).map(({ name, value, unit }) => (
        <div key={name} className="insight-tile">
          <dt>{name}</dt>
          <dd>
            <b>{value}</b> {unit}
          </dd>
        </div>
      ))}
    </dl>
  );
}

function LengthChart({ figures, version }: ChartProps) {
  const { passes } = figures;
  return (
    <ChartCard
      title="Acceptance length"
      unit="tokens a step"
      explanation="What each verification gave: 1 is plain decoding, every token above it is a pass saved."
      table={() => lengthTable(figures)}
    >
      <TimeChart
        label="Tokens of each step, and their moving average"
        x={passes.step}
        lines={[
          { name: "step", kind: "step", data: passes.acceptanceLength, look: "thin" },
          { name: "average of 16", kind: "average", data: passes.averageLength },
        ]}
        syncKey={STEPS}
        version={version}
      />
    </ChartCard>
  );
}

function SpeedChart({ figures, version }: ChartProps) {
  const { speeds } = figures;
  return (
    <ChartCard
      title="Decode speed"
      unit="tokens/s over seconds"
      explanation="Tokens as they arrived here, the engine's count from the first token on, and its plain decoding."
      table={() => speedTable(figures)}
    >
      <TimeChart
        label="Tokens a second: of the last second, so far, and of plain decoding"
        x={speeds.seconds}
        lines={[
          { name: "last second", kind: "step", data: speeds.now, look: "thin" },
          { name: "so far", kind: "average", data: speeds.soFar },
          { name: "plain", kind: "plain", data: speeds.plain, look: "dashed" },
        ]}
        version={version}
      />
    </ChartCard>
  );
}

function SizeChart({ figures, version }: ChartProps) {
  const { passes } = figures;
  return (
    <ChartCard
      title="Tree size"
      unit="rows a step"
      explanation="How much the engine chose to verify: more where guesses are good and rows are cheap, 1 is a plain step."
      table={() => sizeTable(figures)}
    >
      <TimeChart
        label="Rows verified in each step"
        x={passes.step}
        lines={[{ name: "rows", kind: "average", data: passes.numNodes }]}
        syncKey={STEPS}
        version={version}
      />
    </ChartCard>
  );
}

function TimeSplitChart({ figures, version, device }: ChartProps & { device: string | null }) {
  const sums = stackedTimes(figures);
  const { times } = figures;
  return (
    <ChartCard
      title="Step time"
      unit="ms a step"
      explanation={`Where a step's time goes, ${timeSource(device)}: drafting has to stay small beside verifying.`}
      table={() => timeTable(figures)}
    >
      <TimeChart
        label="Milliseconds of each step's verbs, stacked"
        x={times.step}
        lines={STACK_ORDER.map((verb, i) => ({
          name: verb,
          kind: verb,
          data: sums[i] ?? [],
          values: times.milliseconds[verb],
        }))}
        isStacked
        syncKey={STEPS}
        version={version}
      />
      <TimeSplit figures={figures} />
    </ChartCard>
  );
}

function DepthChart({ figures }: { figures: Figures }) {
  const { sources } = figures;
  return (
    <ChartCard
      title="Acceptance by depth"
      unit="of steps that drafted so deep"
      explanation="How far the guesses hold: depth 1 is the token behind the certain one. Colours tell who drafted it."
      table={() => depthTable(figures)}
    >
      <Bars label="Steps whose accepted path came so deep, by depth" bars={depthBars(figures)} />
      <Legend entries={sources.map(({ of }) => ({ name: of, kind: kindOf(of) }))} />
    </ChartCard>
  );
}

function RankChart({ figures }: { figures: Figures }) {
  const { ranks, sources } = figures;
  return (
    <ChartCard
      title="Acceptance by rank"
      unit="of drafted nodes"
      explanation="Which of a drafter's guesses was right, 1 its best: where the second and third hold, a tree beats a chain."
      table={() => countTable("Rank or drafter", [...ranks, ...sources], nameOrRank)}
    >
      <Bars label="Accepted nodes by rank" bars={countBars(ranks, nameOrRank, () => "average")} />
      {sources.length > 0 && <Bars label="Accepted nodes by drafter" bars={countBars(sources, String, kindOf)} />}
    </ChartCard>
  );
}

function nameOrRank(of: string | number): string {
  return typeof of === "number" ? `rank ${of + 1}` : of;
}
