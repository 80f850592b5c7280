// Fields of a form, each with its label and, beside it, what is wrong with its value.

import { type ReactNode, useId } from "react";

interface FieldProps {
  label: string;
  value: string;
  problem?: string | undefined;
  hint?: string | undefined;
  /** What an empty field means. */
  empty?: string | undefined;
  change: (value: string) => void;
}

export function Field({ label, value, problem, hint, empty, change }: FieldProps) {
  const id = useId();
  return (
    <Labelled id={id} label={label} note={problem ?? hint} isProblem={problem !== undefined}>
      <input
        id={id}
        className="input"
        inputMode="decimal"
        autoComplete="off"
        value={value}
        placeholder={empty}
        aria-invalid={problem !== undefined}
        aria-describedby={`${id}-note`}
        onChange={(event) => change(event.target.value)}
      />
    </Labelled>
  );
}

export function Area({ label, value, problem, hint, change }: FieldProps) {
  const id = useId();
  return (
    <Labelled id={id} label={label} note={problem ?? hint} isProblem={problem !== undefined}>
      <textarea
        id={id}
        className="input"
        rows={2}
        value={value}
        aria-invalid={problem !== undefined}
        aria-describedby={`${id}-note`}
        onChange={(event) => change(event.target.value)}
      />
    </Labelled>
  );
}

interface ChoiceProps<Value extends string> {
  label: string;
  value: Value;
  options: Readonly<Record<Value, string>>;
  change: (value: Value) => void;
}

export function Choice<Value extends string>({ label, value, options, change }: ChoiceProps<Value>) {
  const id = useId();
  return (
    <Labelled id={id} label={label} note={undefined} isProblem={false}>
      <select id={id} className="input" value={value} onChange={(event) => change(event.target.value as Value)}>
        {(Object.keys(options) as Value[]).map((option) => (
          <option key={option} value={option}>
            {options[option]}
          </option>
        ))}
      </select>
    </Labelled>
  );
}

interface LabelledProps {
  id: string;
  label: string;
  note: string | undefined;
  isProblem: boolean;
  children: ReactNode;
}

function Labelled({ id, label, note, isProblem, children }: LabelledProps) {
  return (
    <div className="controls-field">
      <label htmlFor={id}>{label}</label>
      {children}
      <span id={`${id}-note`} className={isProblem ? "controls-problem" : "controls-hint"}>
        {note}
      </span>
    </div>
  );
}
