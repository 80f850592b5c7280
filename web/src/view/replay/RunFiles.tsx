import { useRef } from "react";
import { exportRun, fileName } from "../../run/exchange";
import type { Run } from "../../run/run";
import { download } from "../download";
import { Icon } from "./Icon";

interface Props {
  run: Run;
  onFile: (file: File) => void;
}

/** Saves the run as a file, opens one. */
export function RunFiles({ run, onFile }: Props) {
  const picker = useRef<HTMLInputElement>(null);
  const save = () => download(new Blob([exportRun(run)], { type: "application/json" }), fileName(run));
  return (
    <div className="replay-files">
      <button
        type="button"
        className="replay-button"
        disabled={run.steps.length === 0}
        title="Save this run as a JSON file"
        onClick={save}
      >
        <Icon path="M8 2v8M4.5 6.5 8 10l3.5-3.5M2.5 13.5h11" />
        <span className="replay-files__label">Export</span>
      </button>
      <button
        type="button"
        className="replay-button"
        title="Open a run that was saved as JSON; or drop the file here"
        onClick={() => picker.current?.click()}
      >
        <Icon path="M8 10V2M4.5 5.5 8 2l3.5 3.5M2.5 13.5h11" />
        <span className="replay-files__label">Import</span>
      </button>
      <input
        ref={picker}
        type="file"
        accept="application/json,.json"
        aria-label="Run to import"
        tabIndex={-1}
        hidden
        onChange={(event) => {
          const file = event.currentTarget.files?.[0];
          // The same file may be chosen again, after it was mended.
          event.currentTarget.value = "";
          if (file !== undefined) onFile(file);
        }}
      />
    </div>
  );
}
