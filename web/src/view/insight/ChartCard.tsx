import { type ReactNode, useId, useState } from "react";
import type { TableData } from "../../insight/charts";

interface Props {
  title: string;
  unit: string;
  /** One line: what the chart tells. */
  explanation: string;
  /** Made when it is opened. */
  table: () => TableData;
  children: ReactNode;
}

export function ChartCard({ title, unit, explanation, table, children }: Props) {
  const id = useId();
  const [isOpen, setIsOpen] = useState(false);
  return (
    <section className="insight-card" aria-labelledby={id}>
      <header className="insight-card__head">
        <h3 id={id}>{title}</h3>
        <span className="insight-card__unit">{unit}</span>
      </header>
      {children}
      <p className="insight-card__explanation">{explanation}</p>
      <details className="insight-card__details" onToggle={(event) => setIsOpen(event.currentTarget.open)}>
        <summary aria-label={`${title} as a table`}>Table</summary>
        {isOpen && <Table title={title} {...table()} />}
      </details>
    </section>
  );
}

function Table({ title, columns, rows }: TableData & { title: string }) {
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls has to be reachable by keyboard
    <section className="insight-table" tabIndex={0} aria-label={`${title}, table`}>
      <table>
        <thead>
          <tr>
            {columns.map((column) => (
              <th key={column} scope="col">
                {column}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={row[0]}>
              {row.map((cell, i) => (
                <td key={columns[i]}>{cell}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}
