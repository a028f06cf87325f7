// What is remembered of a text: tensors of constant size, and buffers of keys and values; as runtime/engine/state.py.
const BLOCK = 256; // rows by which a buffer grows
const AT_ONCE = 512; // a buffer that never needs more has all its slots from the first token on
const LEAST_SLACK = 32;

/** Tokens that layers with buffers of each kind see, the newest included: a Map from its name. */
export function spansOf({ geometry, lawcat }) {
  const spans = new Map();
  const kinds = lawcat.layer_types?.length ? lawcat.layer_types : ["linear_attention"];
  if (lawcat.window && kinds.includes("linear_attention")) spans.set("window", lawcat.window);
  if (kinds.includes("full_attention")) {
    spans.set("full", Math.min(lawcat.attention_span, geometry.sliding_window ?? lawcat.attention_span));
  }
  return spans;
}

/** Bytes of the state of one text at most, as a snapshot holds it. */
export function mostBytes(manifest) {
  const spans = spansOf(manifest);
  const rows = ({ buffer }) => (buffer ? spans.get(buffer) - 1 : 0);
  const bytes = (entry) => count(entry.shape.slice(1).map((size) => (size === "tokens" ? rows(entry) : size)));
  return manifest.state.reduce((sum, entry) => sum + 4 * bytes(entry), 0);
}

/** The state of one text of `position` tokens. */
export class State {
  constructor(ort, manifest) {
    this.ort = ort;
    this.entries = manifest.state;
    this.position = 0;
    this.buffers = new Map();
    for (const [name, span] of spansOf(manifest)) this.buffers.set(name, { span, fill: 0, slots: 0 });
    this.tensors = new Map();
    for (const entry of this.entries) this.tensors.set(entry.input, this.zeros(this.dims(entry, 0)));
  }

  /** The shape of a tensor; with so many rows where it is a buffer. */
  dims({ shape }, rows) {
    return [1, ...shape.slice(1).map((size) => (size === "tokens" ? rows : size))];
  }

  zeros(dims) {
    return new this.ort.Tensor("float32", new Float32Array(count(dims)), dims);
  }

  /** Slots for so many more tokens in every buffer. */
  makeRoom(tokens) {
    for (const [name, buffer] of this.buffers) {
      const most = buffer.span - 1 + Math.max(tokens, LEAST_SLACK, Math.floor(buffer.span / 16));
      if (buffer.fill + tokens > most) this.forget(name);
      const after = buffer.fill + tokens;
      if (after <= buffer.slots) continue;
      const wanted = most <= AT_ONCE ? most : Math.min(most, Math.ceil(after / BLOCK) * BLOCK);
      this.resize(name, Math.max(after, wanted));
    }
  }

  /** Move the rows that a later token will see to the front. */
  forget(name) {
    const buffer = this.buffers.get(name);
    const kept = Math.min(buffer.fill, buffer.span - 1);
    this.each(name, (data, width, heads) => {
      for (let h = 0; h < heads; h++) {
        const start = h * buffer.slots * width;
        data.copyWithin(start, start + (buffer.fill - kept) * width, start + buffer.fill * width);
      }
    });
    buffer.fill = kept;
  }

  resize(name, slots) {
    const buffer = this.buffers.get(name);
    for (const entry of this.entries) {
      if (entry.buffer !== name) continue;
      const old = this.tensors.get(entry.input);
      const made = this.zeros(this.dims(entry, slots));
      copyRows(old.data, buffer.slots, 0, made.data, slots, buffer.fill, old.dims);
      this.tensors.set(entry.input, made);
    }
    buffer.slots = slots;
  }

  each(name, change) {
    for (const entry of this.entries) {
      if (entry.buffer !== name) continue;
      const { data, dims } = this.tensors.get(entry.input);
      change(data, dims[3], dims[1]);
    }
  }

  /** The tensors after `tokens` more, from a session's results. */
  take(results, tokens) {
    for (const { input, output } of this.entries) this.tensors.set(input, results[output]);
    this.position += tokens;
    for (const buffer of this.buffers.values()) buffer.fill += tokens;
  }

  /** What the text goes on from: {shape, data} of every tensor, in the manifest's order. */
  kept() {
    return this.entries.map((entry) => {
      const { data, dims } = this.tensors.get(entry.input);
      if (!entry.buffer) return { shape: dims.slice(1), data };
      const { fill, span, slots } = this.buffers.get(entry.buffer);
      const rows = Math.min(fill, span - 1);
      const out = new Float32Array(dims[1] * rows * dims[3]);
      copyRows(data, slots, fill - rows, out, rows, rows, dims);
      return { shape: [dims[1], rows, dims[3]], data: out };
    });
  }

  /** The shapes of `kept()` after so many tokens. */
  keptShapes(position) {
    return this.entries.map((entry) => {
      const rows = entry.buffer ? Math.min(position, this.buffers.get(entry.buffer).span - 1) : 0;
      return this.dims(entry, rows).slice(1);
    });
  }

  /** Become the text whose `kept()` these Float32Arrays are. */
  load(arrays, position) {
    const shapes = this.keptShapes(position);
    this.entries.forEach((entry, i) => {
      const dims = [1, ...shapes[i]];
      this.tensors.set(entry.input, new this.ort.Tensor("float32", arrays[i], dims));
      if (entry.buffer) this.buffers.get(entry.buffer).slots = dims[2];
    });
    for (const buffer of this.buffers.values()) buffer.fill = Math.min(position, buffer.span - 1);
    this.position = position;
  }

  get bytes() {
    return [...this.tensors.values()].reduce((sum, { data }) => sum + data.byteLength, 0);
  }
}

/** Copy `rows` rows of every head, from row `start` of a buffer with `slots` to the front of another. */
function copyRows(from, slots, start, to, targetSlots, rows, [, heads, , width]) {
  for (let h = 0; h < heads; h++) {
    const at = (h * slots + start) * width;
    to.set(from.subarray(at, at + rows * width), h * targetSlots * width);
  }
}

export function count(dims) {
  return dims.reduce((product, size) => product * size, 1);
}
