// What a run looks like inside: the tree, the replay, the insight.

import { type Run, startRun } from "../run/run";
import { type Session, show } from "../session/session";
import { useVersion } from "./hooks";
import { InsightPanel } from "./insight/InsightPanel";
import { ReplayBar } from "./replay/ReplayBar";
import { Speedometer } from "./speedometer/Speedometer";
import { ShareButton } from "./tree/ShareButton";
import { TreeView } from "./tree/TreeView";

// Before anything was asked: an empty run, so that a file can be opened.
const NOTHING = show(startRun({}, ""));

export function RunPanels({ session, device }: { session: Session; device: string | null }) {
  useVersion(session);
  const { store, player } = session.shown ?? NOTHING;
  const key = store.run.startedAt;
  return (
    <div className="app-run">
      <div className="app-tree card">
        <TreeView key={key} store={store} player={player} />
        <div className="app-corner">
          {session.shown !== null && <Speedometer store={store} player={player} />}
          <ShareButton store={store} player={player} />
        </div>
      </div>
      <ReplayBar key={key} store={store} player={player} onImport={(run: Run) => session.open(run)} />
      <details className="card app-insight" open>
        <summary>
          <h2>Insight</h2>
        </summary>
        <InsightPanel key={key} store={store} player={player} device={session.shown?.isImported ? null : device} />
      </details>
    </div>
  );
}
