// The pleasant side of a bundle in the browser: load, generate, chat, snapshot; as runtime/generate/model.py.
import { Bundle, sha256, UserError } from "./bundle.js";
import { Engine } from "./engine.js";
import { Sampler, samplingDefaults } from "./sampling.js";
import { loadSnapshot, saveSnapshot } from "./snapshot.js";
import { Detokenizer, StopStrings } from "./text.js";

export class Model {
  /**
   * Open the bundle of `source` (bundle.js). `libraries`: {ort, Tokenizer, Template}, the modules it runs on.
   * `progress(done, total)`: bytes loaded so far. `rest()`: awaited between steps, so that the thread can take
   * messages; if it throws, the work ends there and the text so far can be gone on from.
   */
  static async load(libraries, source, { flavour, progress = () => {}, rest = async () => {} } = {}) {
    const model = new Model();
    model.defaults = samplingDefaults(null);
    model.libraries = libraries;
    model.rest = rest;
    const bundle = (model.bundle = await Bundle.open(source, flavour));
    let done = 0;
    const count = (bytes) => progress((done += bytes), bundle.bytesToLoad);
    const tokenizer = JSON.parse(await bundle.text("tokenizer.json"));
    const settings = bundle.has("tokenizer_config.json")
      ? JSON.parse(await bundle.text("tokenizer_config.json"))
      : null;
    // Cleaning up spaces is a habit of old configs that would change the text; the runner never does it.
    model.tokenizer = new libraries.Tokenizer(tokenizer, {
      ...settings,
      clean_up_tokenization_spaces: false,
    });
    if (bundle.has("chat_template.jinja")) {
      model.template = new libraries.Template(await bundle.text("chat_template.jinja"));
    }
    model.engine = await Engine.create(libraries.ort, bundle, count);
    if (bundle.has("generation_config.json")) {
      model.defaults = samplingDefaults(JSON.parse(await bundle.text("generation_config.json")));
    }
    model.eos = new Set(bundle.manifest.tokens.eos);
    model.specialTokens = specialTokens(settings, model.tokenizer, bundle.manifest.tokens);
    model.reset();
    return model;
  }

  /** Forget the text and its conversation. */
  reset() {
    // mark: the template text that the tokens stand for; null if they stand for no exact text.
    this.context = { state: this.engine.newState(), tokens: [], messages: [], mark: null, hasBase: false };
  }

  /** Stand in a conversation of earlier: it is read with the next message. */
  resume(messages) {
    this.reset();
    this.context.messages = messages;
  }

  encode(text, special) {
    return this.tokenizer.encode(text, { add_special_tokens: special }).ids;
  }

  decode(ids, skipSpecial = true) {
    return this.tokenizer.decode(ids, { skip_special_tokens: skipSpecial });
  }

  /**
   * Continue `prompt` (text or token ids) in a new context; yields pieces of text. Options: maxNewTokens,
   * stop (strings), ignoreEos, and those of Sampler. The last value is {tokens, stopReason, stats}.
   */
  async *generate(prompt, options = {}) {
    this.reset();
    const ids = typeof prompt === "string" ? this.encode(prompt, true) : [...prompt];
    if (!ids.length) throw new UserError("The prompt is empty; give some text to go on from.");
    this.context.tokens.push(...ids);
    this.context.hasBase = true;
    return yield* this.#stream(options);
  }

  /** Answer a message in the conversation that is going on. `system`: at the start of a new one. */
  async *chat(message, { system, ...options } = {}) {
    if (!this.template) throw new UserError("The bundle has no chat template; use a plain prompt.");
    const { context } = this;
    const history = [...context.messages];
    if (system && !history.length) history.push({ role: "system", content: system });
    history.push({ role: "user", content: message });
    const text = this.render(history);
    await this.#append(text, history);
    let reply = "";
    let result = { tokens: [] };
    try {
      const stream = this.#stream(options, result);
      for (;;) {
        const { done, value } = await stream.next();
        if (done) return value;
        reply += value;
        yield value;
      }
    } finally {
      this.context.messages = [...history, { role: "assistant", content: reply }];
      // Known only if the tokens say what the reply says: not after a stop string, for example.
      this.context.mark = this.decode(result.tokens, false) === reply ? text + reply : null;
    }
  }

  render(messages, generationPrompt = true) {
    try {
      return this.template.render({
        tools: null,
        documents: null,
        ...this.specialTokens,
        messages,
        add_generation_prompt: generationPrompt,
      });
    } catch (error) {
      throw new UserError(`The chat template failed: ${error.message}; export the bundle again.`);
    }
  }

  /** Add what `text`, the rendered `history`, has beyond what the context stands for. */
  async #append(text, history) {
    const { context } = this;
    let fresh = text;
    const known = context.mark;
    if (known && (typeof known === "string" ? text.startsWith(known) : await begins(known, text))) {
      fresh = typeof known === "string" ? text.slice(known.length) : codePoints(text, known.length)[1];
    } else if (context.tokens.length && !(context.hasBase && !context.messages.length)) {
      if (context.hasBase) {
        // The text before the conversation cannot be read again: add the last turn alone.
        const before = this.render(history.slice(0, -1), false);
        if (text.startsWith(before)) fresh = text.slice(before.length);
      } else {
        this.reset();
      }
    }
    this.context.tokens.push(...this.encode(fresh, false));
    this.context.mark = null;
  }

  async *#stream({ maxNewTokens = 256, stop = [], ignoreEos = false, ...sampling }, result = { tokens: [] }) {
    const { context, engine, rest } = this;
    const { state } = context;
    const sampler = new Sampler(sampling);
    sampler.observe(context.tokens);
    const detokenizer = new Detokenizer((ids) => this.decode(ids), context.tokens);
    const stops = new StopStrings(stop);
    const read = context.tokens.length - state.position;
    const begin = performance.now();
    let logits = await engine.prefill(context.tokens.slice(state.position), state, rest);
    const first = performance.now();
    let stopReason = maxNewTokens > 0 ? null : "length";
    let text = "";
    while (stopReason === null) {
      const token = sampler.choose(logits, context.tokens.length);
      if (!ignoreEos && this.eos.has(token)) {
        // Not added to the text: what comes after it is for the template to say.
        stopReason = "eos";
      } else {
        context.tokens.push(token);
        sampler.observe([token]);
        result.tokens.push(token);
        text = stops.push(detokenizer.push(token));
        if (stops.found !== null) stopReason = "stop";
        else if (result.tokens.length >= maxNewTokens) stopReason = "length";
      }
      if (stopReason !== null && stopReason !== "stop") {
        text += stops.push(detokenizer.flush());
        if (stops.found !== null) stopReason = "stop";
        text += stops.flush();
      }
      if (text) yield text;
      text = "";
      if (stopReason !== null) break;
      await rest(); // before the step: if the user stops here, the last token is still to be read
      logits = await engine.forward(context.tokens.slice(state.position), state);
    }
    const seconds = (performance.now() - first) / 1000;
    const written = result.tokens.length;
    return {
      tokens: result.tokens,
      stopReason,
      stats: {
        promptTokens: read,
        newTokens: written,
        contextTokens: context.tokens.length,
        prefillTokensPerSecond: read / ((first - begin) / 1000),
        decodeTokensPerSecond: written > 1 ? (written - 1) / seconds : null,
        seed: sampler.seed,
      },
    };
  }

  /** The context as a snapshot file's bytes; the runner's `--load-snapshot` takes it. */
  async snapshot() {
    const { messages, mark, hasBase, state, tokens } = this.context;
    if (!tokens.length) throw new UserError("There is nothing to save yet; say something first.");
    const known = typeof mark === "string" ? await toMark(mark) : mark;
    const extra = messages.length ? { messages, mark: known, has_base: hasBase } : {};
    return saveSnapshot({ state, tokens, extra }, this.bundle);
  }

  /** Go on from a snapshot's bytes, made here or by the runner. */
  async restore(bytes) {
    const { state, tokens, extra } = await loadSnapshot(bytes, this.bundle, this.libraries.ort);
    const { messages = [], mark = null, has_base: hasBase = true } = extra;
    this.context = { state, tokens, messages, mark, hasBase };
  }

  /** Replay the bundle's recorded parity vectors; the largest relative error, or UserError beyond the bound. */
  async verify() {
    const { parity } = this.bundle.manifest;
    if (!parity) throw new UserError("The bundle records no parity vectors; export it again.");
    const state = this.engine.newState();
    let at = 0;
    let worst = 0;
    for (const piece of parity.pieces) {
      const logits = await this.engine.forward(parity.tokens.slice(at, at + piece), state);
      at += piece;
      const row = parity.positions.indexOf(at - 1);
      if (row < 0) continue;
      const want = parity.top_logits[row];
      const scale = Math.max(...want.map(Math.abs), 1e-9);
      for (const [i, id] of parity.top_ids[row].entries()) {
        worst = Math.max(worst, Math.abs(logits[id] - want[i]) / scale);
      }
      await this.rest();
    }
    return { error: worst, bound: parity.bound, passed: worst <= parity.bound };
  }
}

// A mark in a snapshot: length in characters (code points, as Python counts) and sha256 of the text.
async function toMark(text) {
  return { length: Array.from(text).length, sha256: await sha256(new TextEncoder().encode(text)) };
}

async function begins(mark, text) {
  const found = await toMark(codePoints(text, mark.length)[0]);
  return found.length === mark.length && found.sha256 === mark.sha256;
}

/** `text` as its first `count` characters and the rest. */
function codePoints(text, count) {
  const all = Array.from(text);
  return [all.slice(0, count).join(""), all.slice(count).join("")];
}

/** By name, for the template: the tokenizer's own; a bundle without its settings has only ids. */
function specialTokens(settings, tokenizer, { bos, eos }) {
  const written = (id) => (id == null ? "" : (tokenizer.id_to_token(id) ?? ""));
  if (settings === null) return { bos_token: written(bos), eos_token: written(eos[0]) };
  const found = {};
  for (const name of ["bos", "eos", "unk", "sep", "pad", "cls", "mask"].map((short) => `${short}_token`)) {
    const text = settings[name]?.content ?? settings[name];
    if (typeof text === "string") found[name] = text;
  }
  return found;
}
