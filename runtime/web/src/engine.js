// onnxruntime-web behind a bundle: tokens and state in, logits and state out; as runtime/engine.py.
import { UserError } from "./bundle.js";
import { cosSin, inverseFrequencies } from "./rotary.js";

/** The recurrent state of one text of `position` tokens: a Map from input name to ort.Tensor. Constant size. */
export class State {
  constructor(tensors, position = 0) {
    this.tensors = tensors;
    this.position = position;
  }
}

export class Engine {
  /** Load the bundle's graph. `ort`: the onnxruntime-web module; `progress(bytes)` as files arrive. */
  static async create(ort, bundle, progress = () => {}) {
    const engine = new Engine();
    const { manifest } = bundle;
    engine.ort = ort;
    engine.manifest = manifest;
    engine.vocabSize = manifest.geometry.vocab_size;
    engine.window = manifest.lawcat.window ?? 0;
    engine.frequencies = manifest.lawcat.rope || engine.window ? inverseFrequencies(manifest.geometry) : null;
    // The portable graph takes memory for every pair of tokens of a chunk.
    engine.chunk = bundle.flavour === "portable" ? 32 : 128;
    const graph = await bundle.read(bundle.graph, progress);
    const externalData = [];
    for (const path of bundle.weights) externalData.push({ path, data: await bundle.read(path, progress) });
    try {
      engine.session = await ort.InferenceSession.create(graph, {
        executionProviders: ["wasm"],
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
    engine.wants = (name) => names.has(name);
    return engine;
  }

  /** The state before any token, zeros. */
  newState() {
    const { Tensor } = this.ort;
    const zeros = this.manifest.state.map(({ input, shape }) => {
      const dims = [1, ...shape.slice(1)];
      return [input, new Tensor("float32", new Float32Array(count(dims)), dims)];
    });
    return new State(new Map(zeros));
  }

  /** Feed tokens (at least one), updating `state`; logits Float32Array [V] of the last one. */
  async forward(tokens, state) {
    const T = tokens.length;
    if (!T) throw new UserError("There is nothing to read: the prompt has no tokens.");
    const ids = BigInt64Array.from(tokens, (token) => {
      if (!(token >= 0 && token < this.vocabSize)) {
        throw new UserError(`A token is outside the vocabulary of ${this.vocabSize}; export the bundle again.`);
      }
      return BigInt(token);
    });
    const { Tensor } = this.ort;
    const feeds = { input_ids: new Tensor("int64", ids, [1, T]), ...Object.fromEntries(state.tensors) };
    if (this.wants("window_fill")) {
      const fill = BigInt(Math.min(state.position, this.window - 1));
      feeds.window_fill = new Tensor("int64", BigInt64Array.of(fill), [1]);
    }
    if (this.wants("rotary_cos")) {
      const [cos, sin] = cosSin(this.frequencies, state.position, T);
      feeds.rotary_cos = new Tensor("float32", cos, [T, cos.length / T]);
      feeds.rotary_sin = new Tensor("float32", sin, [T, sin.length / T]);
    }
    let results;
    try {
      results = await this.session.run(feeds);
    } catch (error) {
      throw new UserError(`onnxruntime-web failed to run the model: ${firstLine(error)}.`);
    }
    for (const { input, output } of this.manifest.state) state.tensors.set(input, results[output]);
    state.position += T;
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

export function count(dims) {
  return dims.reduce((product, size) => product * size, 1);
}

function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0].slice(0, 300).replace(/\.$/, "");
}
