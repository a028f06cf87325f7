// onnxruntime-web behind a bundle: tokens and state in, logits and state out; as runtime/engine/session.py.
import { UserError } from "./bundle.js";
import { cosSin } from "./rotary.js";
import { State } from "./state.js";

export class Engine {
  /** Load the bundle's graph. `ort`: the onnxruntime-web module; `progress(bytes)` as files arrive. */
  static async create(ort, bundle, progress = () => {}) {
    const engine = new Engine();
    const { manifest } = bundle;
    engine.ort = ort;
    engine.manifest = manifest;
    engine.vocabSize = manifest.geometry.vocab_size;
    // The portable graph takes memory for every pair of tokens of a chunk.
    engine.chunk = bundle.flavour === "portable" ? 32 : 128;
    const graph = await bundle.read(bundle.graph, progress);
    const externalData = [];
    for (const path of bundle.weights) externalData.push({ path, data: await bundle.read(path, progress) });
    try {
      engine.session = await ort.InferenceSession.create(graph, {
        executionProviders: bundle.source.providers ?? ["wasm"],
        externalData,
        enableMemPattern: false, // one is kept for every length of text that occurs
        logSeverityLevel: 3,
      });
    } catch (error) {
      throw new UserError(
        `onnxruntime-web cannot load ${bundle.graph}: ${firstLine(error)}; try a bundle exported with ` +
          "`--ops portable`.",
      );
    }
    const names = new Set(engine.session.inputNames);
    for (const { input } of manifest.state) {
      if (!names.has(input)) throw new UserError(`${bundle.graph} lacks ${input}; export the bundle again.`);
    }
    return engine;
  }

  /** The state before any token. */
  newState() {
    return new State(this.ort, this.manifest);
  }

  /** Feed tokens (at least one), updating `state`; logits Float32Array [V] of the last one. */
  async forward(tokens, state) {
    if (!tokens.length) throw new UserError("There is nothing to read: the prompt has no tokens.");
    let logits;
    for (let at = 0; at < tokens.length; ) {
      const count = Math.min(tokens.length - at, state.room);
      logits = await this.read(tokens.slice(at, at + count), state);
      at += count;
    }
    return logits;
  }

  /** The same for as many tokens as the state has room for at once. */
  async read(tokens, state) {
    const T = tokens.length;
    const ids = BigInt64Array.from(tokens, (token) => {
      if (!(token >= 0 && token < this.vocabSize)) {
        throw new UserError(`A token is outside the vocabulary of ${this.vocabSize}; export the bundle again.`);
      }
      return BigInt(token);
    });
    const { Tensor } = this.ort;
    state.makeRoom(T);
    const feeds = { input_ids: new Tensor("int64", ids, [1, T]), ...Object.fromEntries(state.tensors) };
    for (const [name, buffer] of state.buffers) {
      feeds[`${name}_seqlens_k`] = new Tensor("int32", Int32Array.of(buffer.fill + T - 1), [1]);
    }
    if (state.frequencies) {
      // The tables have the rows of these tokens and then as many more as onnxruntime asks for.
      const rows = Math.max(T, ...[...state.buffers.values()].map(({ slots }) => slots));
      const [cos, sin] = cosSin(state.frequencies, state.position, T, rows);
      feeds.cos_cache = new Tensor("float32", cos, [rows, state.frequencies.length]);
      feeds.sin_cache = new Tensor("float32", sin, [rows, state.frequencies.length]);
      feeds.position_ids = new Tensor("int64", BigInt64Array.from({ length: T }, (_, t) => BigInt(t)), [1, T]);
    }
    let results;
    try {
      results = await this.session.run(feeds);
    } catch (error) {
      throw new UserError(`onnxruntime-web failed to run the model: ${firstLine(error)}.`);
    }
    state.take(results, T);
    return results.logits.data;
  }

  /** Feed a text of any length in chunks, at flat memory; logits of its last token. `rest()`: between chunks. */
  async prefill(tokens, state, rest = async () => {}) {
    let logits = null;
    for (let at = 0; at < tokens.length; at += this.chunk) {
      logits = await this.forward(tokens.slice(at, at + this.chunk), state);
      await rest();
    }
    return logits;
  }
}

function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0].slice(0, 300).replace(/\.$/, "");
}
