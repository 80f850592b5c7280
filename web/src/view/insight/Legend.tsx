interface Entry {
  name: string;
  /** Names its colour. */
  kind: string;
  value?: string;
}

export function Legend({ entries }: { entries: readonly Entry[] }) {
  return (
    <ul className="insight-legend">
      {entries.map(({ name, kind, value }) => (
        <li key={name}>
          <span className={`insight-swatch insight-fill--${kind}`} />
          {name} {value !== undefined && <b>{value}</b>}
        </li>
      ))}
    </ul>
  );
}
