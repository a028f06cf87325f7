// The model's thread: takes messages from page.js one after the other, answers with pieces of text.
import { Template } from "./vendor/jinja.mjs";
import * as ort from "./vendor/ort.mjs";
import { Tokenizer } from "./vendor/tokenizers.mjs";
import { fromFiles, fromUrl, UserError } from "./bundle.js";
import { Model } from "./model.js";
import { mostBytes } from "./state.js";

ort.env.wasm.numThreads = 1; // more need headers that a plain static server does not send
ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;

let model = null;
let stopped = false;

/** Let the messages in that have arrived: unlike a timer, at no delay. */
const channel = new MessageChannel();
async function rest() {
  await new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
  if (stopped) throw new Stopped();
}

class Stopped extends Error {}

const actions = {
  async load({ url, files, flavour }) {
    model = null; // the old one's memory is free before the new one's is taken
    const source = files ? fromFiles(files) : fromUrl(url);
    const progress = (done, total) => self.postMessage({ type: "progress", done, total });
    const begin = performance.now();
    model = await Model.load({ ort, Tokenizer, Template }, source, { flavour, progress, rest });
    const { manifest, flavour: used, sha256 } = model.bundle;
    return {
      name: manifest.name,
      scheme: manifest.scheme,
      flavour: used,
      checked: sha256 !== null,
      chat: Boolean(model.template),
      defaults: model.defaults,
      stateBytes: mostBytes(manifest),
      seconds: (performance.now() - begin) / 1000,
    };
  },
  chat: ({ message, options }, id) => stream(model.chat(message, options), id),
  generate: ({ prompt, options }, id) => stream(model.generate(prompt, options), id),
  encode: ({ text }) => model.encode(text, true),
  verify: () => model.verify(),
  reset: () => model.reset(),
  resume: ({ messages }) => model.resume(messages),
  snapshot: () => model.snapshot(),
  async restore({ bytes }) {
    await model.restore(bytes);
    return { messages: model.context.messages, tokens: model.context.tokens.length };
  },
};

async function stream(pieces, id) {
  try {
    for (;;) {
      const { done, value } = await pieces.next();
      if (done) return value;
      self.postMessage({ type: "piece", id, text: value });
    }
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
    return { tokens: [], stopReason: "closed", stats: null };
  }
}

let last = Promise.resolve();
self.onmessage = ({ data }) => {
  if (data.action === "stop") {
    stopped = true;
    return;
  }
  last = last.then(async () => {
    stopped = false;
    try {
      if (!model && data.action !== "load") throw new UserError("Load a bundle first.");
      const result = await actions[data.action](data, data.id);
      self.postMessage({ type: "done", id: data.id, result });
    } catch (error) {
      if (!(error instanceof UserError)) console.error(error);
      self.postMessage({ type: "error", id: data.id, message: error.message ?? String(error) });
    }
  });
};
