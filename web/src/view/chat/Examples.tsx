// What a first visitor may ask.

const CHAT = [
  "Explain to a child why the sky is blue.",
  "Write a short poem about a lighthouse, four lines.",
  "List ten fruits, one a line, in alphabetical order.",
  "What is a hash table? Answer in three sentences.",
  "Repeat after me, three times: the quick brown fox jumps over the lazy dog.",
];
const COMPLETION = [
  "The capital of France is",
  "Once upon a time, in a small village by the sea,",
  "def fibonacci(n):\n",
  "1, 2, 3, 4, 5, 6,",
];

interface Props {
  isChat: boolean;
  choose: (prompt: string) => void;
}

export function Examples({ isChat, choose }: Props) {
  return (
    <div className="chat-first">
      <h2>Watch the tree grow</h2>
      <p>
        Small heads guess the next tokens, the model verifies a whole tree of guesses in one pass, and keeps what it
        would have said itself: the same text, in fewer steps.
      </p>
      <ExampleList isChat={isChat} choose={choose} />
    </div>
  );
}

export function ExampleList({ isChat, choose }: Props) {
  return (
    <ul className="chat-examples" aria-label="Examples">
      {(isChat ? CHAT : COMPLETION).map((example) => (
        <li key={example}>
          <button type="button" className="button" onClick={() => choose(example)}>
            {example}
          </button>
        </li>
      ))}
    </ul>
  );
}
