// A page to see that it works: text and the last tree, as they come. Everything from outside is set as text.

const MAX_SHOWN_CHARACTERS = 200_000;
const POLL_MILLISECONDS = 3000;

const element = (id) => document.getElementById(id);
let socket = null;
let pending = null; // what the next animation frame shows

function key() {
  return element("key").value.trim();
}

function protocols() {
  if (!key()) return ["gorgon"];
  const encoded = btoa(key()).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["gorgon", `key.${encoded}`];
}

async function showServed() {
  let text = "the gateway does not answer";
  try {
    const ready = await (await fetch("/health/ready")).json();
    text = ready.state;
    if (ready.state === "loading" && ready.progress != null) text += ` ${Math.round(100 * ready.progress)} %`;
    if (ready.state === "ready") {
      const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
      const info = await fetch("/info", { headers });
      text = info.ok ? (await info.json()).models.join(", ") : "ready; an API key is needed";
    }
  } catch {
    // said above
  }
  element("served").textContent = text;
}

function show() {
  const { text, tree, figures, error } = pending;
  pending = null;
  const answer = element("answer");
  const follows = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 40;
  if (text) answer.textContent = (answer.textContent + text).slice(-MAX_SHOWN_CHARACTERS);
  if (follows) answer.scrollTop = answer.scrollHeight;
  if (tree) element("tree").replaceChildren(...tree.candidates.map((_, i) => node(tree, i)));
  if (figures) element("figures").textContent = figures;
  element("figures").className = error ? "error" : "";
}

function node(tree, i) {
  const item = document.createElement("li");
  const share = tree.probabilities[i].toFixed(3);
  item.textContent = `${"  ".repeat(tree.depths[i])}${JSON.stringify(tree.candidates[i])}  ${share}  ${tree.sources[i]}`;
  item.className = tree.accepted[i] ? "accepted" : "";
  return item;
}

function later(change) {
  if (pending === null) {
    pending = { text: "" };
    requestAnimationFrame(show);
  }
  const text = pending.text + (change.text ?? "");
  Object.assign(pending, change, { text });
}

function speeds(tokensPerSecond, speedup) {
  const parts = [];
  if (tokensPerSecond != null) parts.push(`${tokensPerSecond.toFixed(1)} tokens/s`);
  if (speedup != null) parts.push(`${speedup.toFixed(2)}x plain decoding`);
  return parts.join(" · ");
}

function receive(message) {
  if (message.type === "token") {
    const tree = message.tree_debug;
    later({ text: message.text, ...(tree && { tree, figures: speeds(tree.tokens_per_second, tree.speedup) }) });
  } else if (message.type === "status") {
    const share = message.progress == null ? "" : ` ${Math.round(100 * message.progress)} %`;
    later({ figures: `${message.state}${share}` });
  } else if (message.type === "finished") {
    const { metrics, usage } = message;
    const length = metrics.speculative_decoding.mean_acceptance_length.toFixed(2);
    const figures = [`${usage.completion_tokens} tokens`, speeds(metrics.tokens_per_second, metrics.speedup)];
    later({ text: message.text, figures: [...figures, `${length} tokens/step`, message.finish_reason].join(" · ") });
    running(false);
  } else {
    later({ figures: `${message.code}: ${message.message}`, error: true });
    running(false);
  }
}

function running(is) {
  element("go").disabled = is;
  element("stop").disabled = !is;
}

function generate(event) {
  event.preventDefault();
  element("answer").textContent = "";
  element("tree").replaceChildren();
  running(true);
  const request = {
    messages: [{ role: "user", content: element("prompt").value }],
    max_tokens: Number(element("max-tokens").value),
    temperature: Number(element("temperature").value),
    speculation: { enabled: element("speculate").checked },
    tree_debug: true,
  };
  const url = new URL("/generate_stream", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  socket = new WebSocket(url, protocols());
  let hasEnded = false;
  socket.onopen = () => socket.send(JSON.stringify(request));
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    hasEnded = message.type === "finished" || message.type === "error";
    receive(message);
    if (hasEnded) socket.close();
  };
  socket.onclose = () => {
    if (!hasEnded) {
      later({ figures: "the connection was lost or refused", error: true });
      running(false);
    }
  };
}

element("form").addEventListener("submit", generate);
element("stop").addEventListener("click", () => {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: "cancel" }));
  else socket.close();
});
showServed();
setInterval(showServed, POLL_MILLISECONDS);
