export function Icon({ path, isFilled = false }: { path: string; isFilled?: boolean }) {
  return (
    <svg
      className={isFilled ? "replay-icon replay-icon--filled" : "replay-icon"}
      viewBox="0 0 16 16"
      width="16"
      height="16"
      aria-hidden="true"
    >
      <path d={path} />
    </svg>
  );
}
