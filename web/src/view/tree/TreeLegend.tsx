import "./controls.css";

/** What shapes and colours of the tree mean. */
export function TreeLegend() {
  return (
    <ul className="tree-legend" aria-label="Legend">
      <li>
        <Swatch kind="accepted" />
        accepted
      </li>
      <li>
        <Swatch kind="rejected" />
        rejected
      </li>
      <li>
        <Swatch kind="backbone" />
        backbone's own
      </li>
      <li>
        <Swatch kind="lookup" />
        looked up in the text
      </li>
      <li>
        <svg className="tree-legend__link" viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">
          <path d="M1 6C10 6 13 2 25 2" strokeWidth="3" />
          <path d="M1 6C10 6 13 10.5 25 10.5" strokeWidth="1" opacity="0.5" />
        </svg>
        probability
      </li>
    </ul>
  );
}

function Swatch({ kind }: { kind: string }) {
  return <span className={`tree-swatch tree-swatch--${kind}`} aria-hidden="true" />;
}
