// A WebSocket whose other end is the test: what the page sends is kept, what the gateway would say is said by hand.

export class ScriptedSocket extends EventTarget {
  onopen: ((event: Event) => unknown) | null = null;
  onmessage: ((event: MessageEvent) => unknown) | null = null;
  onclose: ((event: CloseEvent) => unknown) | null = null;
  readyState: number = WebSocket.CONNECTING;
  readonly sent: unknown[] = [];
  readonly url: string;
  readonly protocols: string[];

  constructor(url: string, protocols: string[]) {
    super();
    this.url = url;
    this.protocols = protocols;
  }

  send(data: string): void {
    if (this.readyState !== WebSocket.OPEN) throw new DOMException("not open", "InvalidStateError");
    this.sent.push(JSON.parse(data));
  }

  close(): void {
    this.readyState = WebSocket.CLOSED;
  }

  accept(): void {
    this.readyState = WebSocket.OPEN;
    this.onopen?.(new Event("open"));
  }

  say(...messages: unknown[]): void {
    for (const message of messages) this.frame(JSON.stringify(message));
  }

  frame(data: unknown): void {
    this.onmessage?.(new MessageEvent("message", { data }));
  }

  lose(): void {
    this.readyState = WebSocket.CLOSED;
    this.onclose?.(new CloseEvent("close", { code: 1006 }));
  }
}
