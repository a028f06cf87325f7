// The page: shows what worker.js says. `lawcat` on window is the same for programs (and for the test).
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const by = (id) => document.getElementById(id);
const waiting = new Map();
let lastId = 0;

/** Ask the worker; `onPiece(text)` while it writes. Rejects with what the user can do about it. */
function ask(action, details = {}, onPiece = () => {}) {
  const id = ++lastId;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, onPiece });
    worker.postMessage({ action, id, ...details });
  });
}

worker.onmessage = ({ data }) => {
  if (data.type === "progress") {
    by("progress").value = data.done / data.total;
    return;
  }
  const call = waiting.get(data.id);
  if (data.type === "piece") return call.onPiece(data.text);
  waiting.delete(data.id);
  if (data.type === "error") call.reject(new Error(data.message));
  else call.resolve(data.result);
};
worker.onerror = (event) => showError(event.message || "The page's worker could not start.");

function showError(message) {
  by("about").textContent = message;
  by("about").className = "error";
}

function enable(on) {
  for (const id of ["message", "send", "reset", "save", "restore", "verify"]) by(id).disabled = !on;
}

function show(role, text = "") {
  const line = document.createElement("p");
  line.className = role;
  line.textContent = text;
  by("talk").append(line);
  return line;
}

/** Open the bundle at `url`, or of the chosen `files`. */
async function load(place) {
  enable(false);
  by("talk").replaceChildren();
  by("about").className = "";
  by("about").textContent = "Loading…";
  by("progress").hidden = false;
  try {
    const about = await ask("load", place);
    by("about").textContent =
      `${about.name} (${about.scheme}, ${about.flavour}), loaded in ${about.seconds.toFixed(1)} s` +
      `${about.checked ? ", every file as exported" : ", files unchecked: this page has no https"}. ` +
      `It remembers any text in at most ${(about.stateBytes / 1e6).toFixed(1)} MB.`;
    enable(true);
    if (!about.chat) showError("This bundle has no chat template, so it cannot chat.");
    return about;
  } catch (error) {
    showError(error.message);
    throw error;
  } finally {
    by("progress").hidden = true;
  }
}

async function say(message, options) {
  show("user", message);
  const line = show("assistant");
  enable(false);
  by("stop").disabled = false;
  try {
    const result = await ask("chat", { message, options }, (piece) => {
      line.textContent += piece;
      line.scrollIntoView({ block: "end" });
    });
    if (result.stats) {
      const { promptTokens, newTokens, contextTokens, prefillTokensPerSecond, decodeTokensPerSecond } = result.stats;
      by("stats").textContent =
        `${promptTokens} tokens read at ${prefillTokensPerSecond.toFixed(0)}/s, ${newTokens} written` +
        `${decodeTokensPerSecond ? ` at ${decodeTokensPerSecond.toFixed(1)}/s` : ""}, ` +
        `${contextTokens} in the conversation`;
    }
    return result;
  } catch (error) {
    line.className = "error";
    line.textContent = error.message;
    throw error;
  } finally {
    enable(true);
    by("stop").disabled = true;
    by("message").focus();
  }
}

function options() {
  return {
    maxNewTokens: Number(by("most").value),
    temperature: Number(by("temperature").value),
    topP: Number(by("top-p").value),
    seed: by("seed").value === "" ? null : Number(by("seed").value),
  };
}

async function save() {
  const bytes = await ask("snapshot");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = "talk.snapshot";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function restore(file) {
  const { messages, tokens } = await ask("restore", { bytes: new Uint8Array(await file.arrayBuffer()) });
  by("talk").replaceChildren();
  for (const { role, content } of messages) show(role, content);
  by("stats").textContent = `${tokens} tokens restored`;
}

async function verify() {
  by("stats").textContent = "Verifying…";
  const { error, bound, passed } = await ask("verify");
  by("stats").textContent =
    `${passed ? "As exported" : "NOT as exported"}: largest relative error ${error.toExponential(1)}, ` +
    `allowed ${bound.toExponential(1)}`;
}

/** Run an action of a button; its error is shown and not thrown. */
const shown = (work) => work.catch((error) => (by("stats").textContent = error.message));

by("open").addEventListener("submit", (event) => {
  event.preventDefault();
  const files = Array.from(by("folder").files);
  load(files.length ? { files } : { url: new URL(by("url").value || "bundle/", location.href).href }).catch(() => {});
});
by("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const message = by("message").value.trim();
  if (!message) return;
  by("message").value = "";
  say(message, options()).catch(() => {});
});
by("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("say").requestSubmit();
  }
});
by("stop").addEventListener("click", () => worker.postMessage({ action: "stop" }));
by("reset").addEventListener("click", () => {
  by("talk").replaceChildren();
  shown(ask("reset"));
});
by("save").addEventListener("click", () => shown(save()));
by("restore").addEventListener("change", () => shown(restore(by("restore").files[0])));
by("verify").addEventListener("click", () => shown(verify()));

window.lawcat = { ask, load, say };

// index.html?bundle=ADDRESS opens that bundle at once.
const wanted = new URLSearchParams(location.search).get("bundle");
if (wanted !== null) {
  by("url").value = wanted;
  load({ url: new URL(wanted, location.href).href }).catch(() => {});
}
