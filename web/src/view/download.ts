/** Milliseconds until a download has surely been read: it is after this task, and browsers do not say when. */
const READ_WITHIN = 10_000;

/** Give the user a file. */
export function download(content: Blob, name: string): void {
  const url = URL.createObjectURL(content);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), READ_WITHIN);
}
