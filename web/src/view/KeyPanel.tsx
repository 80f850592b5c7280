// Asks for the key of a gateway that wants one.

import { useState } from "react";

interface Props {
  /** Gives what is wrong with the key; null: nothing. */
  submit: (key: string) => Promise<string | null>;
}

export function KeyPanel({ submit }: Props) {
  const [key, setKey] = useState("");
  const [problem, setProblem] = useState<string | null>(null);
  return (
    <form
      className="key"
      onSubmit={(event) => {
        event.preventDefault();
        void submit(key).then(setProblem);
      }}
    >
      <label htmlFor="api-key">This gateway asks for an API key:</label>
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
