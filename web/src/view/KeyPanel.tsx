// Asks for the key of a gateway that wants one.

import { useState } from "react";

interface Props {
  /** Whether one was given already. */
  known: boolean;
  /** Gives what is wrong with the key; null: nothing. */
  submit: (key: string) => string | null;
}

export function KeyPanel({ known, submit }: Props) {
  const [key, setKey] = useState("");
  const [problem, setProblem] = useState<string | null>(null);
  return (
    <form
      className="key"
      onSubmit={(event) => {
        event.preventDefault();
        setProblem(submit(key));
      }}
    >
      <label htmlFor="api-key">
        {known ? "The gateway does not know this API key. Another one:" : "This gateway asks for an API key:"}
      </label>
      <input
        id="api-key"
        className="input"
        type="password"
        autoComplete="off"
        value={key}
        aria-invalid={problem !== null}
        aria-describedby="api-key-problem"
        onChange={(event) => setKey(event.target.value)}
      />
      <button type="submit" className="button button--primary">
        Use it
      </button>
      <span id="api-key-problem" className="key-problem" role="alert">
        {problem}
      </span>
    </form>
  );
}
