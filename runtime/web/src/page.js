// The page: conversations, shown as Markdown and kept in the browser. Answers come from the server that shows the page
// (remote.js) or from a bundle that runs in the page itself (local.js). `lawcat` on window is for programs and tests.
import { Local } from "./local.js";
import { Remote } from "./remote.js";
import { Conversations, titleOf } from "./store.js";
import { parse, toDom } from "./markdown.js";

const by = (id) => document.getElementById(id);
const ofServer = document.querySelector('meta[name="lawcat-answers"]').content === "server";
const IDEAS = [
  "What can I cook with eggs, rice and spinach?",
  "Explain what inflation is to a ten-year-old.",
  "Write a short poem about autumn.",
];

const kept = new Conversations();
const remote = ofServer ? new Remote() : null;
const local = ofServer ? null : new Local(showProgress);
let defaults = {}; // how tokens are chosen where the settings say nothing; the server knows its own
let current = { id: newId(), messages: [] };
let ready = false;
let loadedConversation = null; // the one that the page's model stands in

function newId() {
  return `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
}

function showProgress(done, total) {
  by("progress").value = done / total;
  const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
  by("loaded").textContent =
    done < total ? `${megabytes(done)} of ${megabytes(total)} MB` : "Preparing the model…";
}

function showError(message) {
  by("about").textContent = message;
  by("about").className = "error";
}

function enable(on) {
  ready = on;
  for (const id of ["message", "send", "reset", "save", "restore", "verify"]) by(id).disabled = !on;
  showHello();
}

function showHello() {
  by("hello").hidden = !ready || by("talk").childElementCount > 0;
}

function show(role, text = "") {
  const line = document.createElement("div");
  line.className = role;
  by("talk").append(line);
  write(line, text);
  showHello();
  return line;
}

/** Put `text` into a message; an answer as Markdown. What it was written as stays in data-source. */
function write(line, text) {
  line.dataset.source = text;
  if (!line.classList.contains("assistant")) {
    line.textContent = text;
    return;
  }
  const answer = document.createElement("div");
  answer.className = "answer";
  answer.append(toDom(parse(text)));
  line.replaceChildren(answer);
}

function addCopy(line) {
  const button = document.createElement("button");
  button.className = "copy";
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(line.dataset.source);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  line.append(button);
}

function showConversation(conversation) {
  current = { id: conversation.id, messages: [...conversation.messages] };
  by("talk").replaceChildren();
  for (const { role, content } of current.messages) {
    if (role === "system") continue;
    const line = show(role, content);
    if (role === "assistant") addCopy(line);
  }
  by("stats").textContent = "";
  listConversations();
  showHello();
  by("talk").scrollTop = by("talk").scrollHeight;
}

function listConversations() {
  by("conversations").replaceChildren(
    ...kept.list.map((conversation) => {
      const item = document.createElement("li");
      if (conversation.id === current.id) item.setAttribute("aria-current", "true");
      const name = document.createElement("button");
      name.type = "button";
      name.className = "name";
      name.textContent = name.title = titleOf(conversation);
      name.addEventListener("click", () => {
        if (document.body.classList.contains("writing")) return;
        showConversation(conversation);
        menu(false);
      });
      const remove = document.createElement("button");
      remove.type = "button";
      remove.className = "remove";
      remove.textContent = "×";
      remove.setAttribute("aria-label", `Delete “${titleOf(conversation)}”`);
      remove.addEventListener("click", () => {
        kept.remove(conversation.id);
        if (conversation.id === current.id && !document.body.classList.contains("writing")) begin();
        else listConversations();
      });
      item.append(name, remove);
      return item;
    }),
  );
}

/** A new conversation. */
function begin() {
  showConversation({ id: newId(), messages: [] });
  if (local && ready) shown(ask("reset").then(() => (loadedConversation = current.id)));
}

function menu(open) {
  document.body.classList.toggle("menu", open);
  by("menu").setAttribute("aria-expanded", String(open));
}

/** Ask the page's model (worker.js). */
function ask(action, details, onPiece) {
  return local.ask(action, details, onPiece);
}

/** Open the bundle at `url`, or of the chosen `files`. */
async function load(place) {
  enable(false);
  by("open").hidden = true;
  by("about").className = "";
  by("about").textContent = "Loading…";
  by("loading").hidden = false;
  by("progress").value = 0;
  by("loaded").textContent = "";
  try {
    const about = await ask("load", place);
    by("about").textContent =
      `${about.name} (${about.scheme}, ${about.flavour}), loaded in ${about.seconds.toFixed(1)} s` +
      `${about.checked ? ", every file as exported" : ", files unchecked: this page has no https"}. ` +
      `It remembers any text in at most ${(about.stateBytes / 1e6).toFixed(1)} MB.`;
    defaults = about.defaults;
    loadedConversation = null;
    enable(true);
    if (!about.chat) showError("This bundle has no chat template, so it cannot chat.");
    return about;
  } catch (error) {
    by("open").hidden = false;
    showError(error.message);
    throw error;
  } finally {
    by("loading").hidden = true;
  }
}

async function answerFrom(message, options, onPiece) {
  if (remote) return remote.chat([...current.messages, { role: "user", content: message }], options, onPiece);
  if (loadedConversation !== current.id) {
    if (current.messages.length || loadedConversation !== null) await ask("resume", { messages: current.messages });
    loadedConversation = current.id;
  }
  return ask("chat", { message, options }, onPiece);
}

async function say(message, options) {
  show("user", message);
  const line = show("assistant");
  line.classList.add("waiting");
  enable(false);
  by("stop").disabled = false;
  document.body.classList.add("writing");
  const { id } = current;
  let text = "";
  let waiting = 0; // for the next frame
  const draw = () => {
    waiting = 0;
    const talk = by("talk");
    const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
    write(line, text);
    if (atEnd) talk.scrollTop = talk.scrollHeight; // somebody who scrolled up stays there
  };
  line.scrollIntoView({ block: "end" });
  try {
    const result = await answerFrom(message, options, (piece) => {
      line.classList.remove("waiting");
      text += piece;
      // Drawn once a frame, however fast the pieces come; each is seen in data-source.
      line.dataset.source = text;
      waiting ||= requestAnimationFrame(draw);
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
    if (!text) line.className = "error";
    if (error.needsKey) askForKey();
    by("stats").textContent = error.message;
    if (!text) text = error.message;
    throw error;
  } finally {
    line.classList.remove("waiting");
    cancelAnimationFrame(waiting);
    write(line, text);
    if (line.classList.contains("assistant")) {
      addCopy(line);
      current.messages.push({ role: "user", content: message }, { role: "assistant", content: text });
      kept.put(id, current.messages);
      listConversations();
    }
    by("talk").scrollTop = by("talk").scrollHeight;
    document.body.classList.remove("writing");
    enable(true);
    by("stop").disabled = true;
    by("message").focus();
  }
}

function options() {
  const fields = {
    maxNewTokens: "most", temperature: "temperature", topP: "top-p", minP: "min-p", repetitionPenalty: "penalty", seed: "seed",
  };
  const given = Object.entries(fields).filter(([, id]) => by(id).value !== "");
  return { ...defaults, ...Object.fromEntries(given.map(([name, id]) => [name, Number(by(id).value)])) };
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
  showConversation({ id: newId(), messages });
  loadedConversation = current.id;
  by("stats").textContent = `${tokens} tokens restored`;
}

async function verify() {
  by("stats").textContent = "Verifying…";
  const { error, bound, passed } = await ask("verify");
  by("stats").textContent =
    `${passed ? "As exported" : "NOT as exported"}: largest relative error ${error.toExponential(1)}, ` +
    `allowed ${bound.toExponential(1)}`;
}

function askForKey() {
  showError("This server asks for a key.");
  if (!by("options").open) by("options").showModal();
  by("key").focus();
}

async function connect() {
  try {
    const { name } = await remote.about();
    by("about").className = "";
    by("about").textContent = `${name}, on the machine that serves this page`;
    document.title = name;
    enable(true);
    by("message").focus();
  } catch (error) {
    if (error.needsKey) askForKey();
    else showError(error.message);
  }
}

/** Run an action of a button; its error is shown and not thrown. */
const shown = (work) => work.catch((error) => (by("stats").textContent = error.message));

by("open").addEventListener("submit", (event) => {
  event.preventDefault();
  const files = Array.from(by("folder").files);
  const address = by("url").value || "bundle/";
  if (!files.length) history.replaceState(null, "", `?bundle=${encodeURIComponent(address)}`); // a reload loads it again
  load(files.length ? { files } : { url: new URL(address, location.href).href }).catch(() => {});
});
by("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const message = by("message").value.trim();
  if (!message || !ready) return;
  by("message").value = "";
  say(message, options()).catch(() => {});
});
by("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("say").requestSubmit();
  }
});
by("stop").addEventListener("click", () => (remote ?? local).stop());
by("reset").addEventListener("click", () => {
  begin();
  menu(false);
  by("message").focus();
});
by("menu").addEventListener("click", () => menu(!document.body.classList.contains("menu")));
by("shade").addEventListener("click", () => menu(false));
by("settings").addEventListener("click", () => by("options").showModal());
by("options").addEventListener("close", () => {
  if (remote && by("key").value) {
    remote.setKey(by("key").value);
    by("key").value = "";
    connect();
  }
});
by("save").addEventListener("click", () => shown(save()));
by("restore").addEventListener("change", () => shown(restore(by("restore").files[0])));
by("verify").addEventListener("click", () => shown(verify()));
for (const idea of IDEAS) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = idea;
  button.addEventListener("click", () => say(idea, options()).catch(() => {}));
  by("ideas").append(button);
}

window.lawcat = {
  ask(action, details, onPiece) {
    // A program that changes what the model stands in has the word: the conversation shown is not read again.
    if (["restore", "reset", "generate"].includes(action)) loadedConversation = current.id;
    return ask(action, details, onPiece);
  },
  load,
  say,
};
if (kept.list.length) showConversation(kept.list[0]);
else listConversations();
if (ofServer) {
  document.body.classList.add("server");
  connect();
} else {
  by("open").hidden = false;
  // index.html?bundle=ADDRESS opens that bundle at once.
  const wanted = new URLSearchParams(location.search).get("bundle");
  if (wanted !== null) {
    by("url").value = wanted;
    load({ url: new URL(wanted, location.href).href }).catch(() => {});
  }
}
