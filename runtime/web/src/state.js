// What is remembered of a text: tensors of constant size, and buffers of keys and values; as runtime/engine/state.py.
import { inverseFrequencies } from "./rotary.js";

const BLOCK = 256; // rows by which a buffer grows
const AT_ONCE = 512; // a buffer that never needs more has all its slots from the first token on
const LEAST_SLACK = 32;

/** How far back softmax attention sees, and what it is remembered by: the rules of runtime/bundle/span.py. */
export class Span {
  constructor(tokens, sinks = 0) {
    this.tokens = tokens;
    this.sinks = sinks;
    this.step = Math.max(1, Math.floor(tokens / 16), Math.min(128, Math.floor(tokens / 4))); // rows that are forgotten at once, with sinks
    this.most = tokens - 1;
  }

  /** Rows that a text of so many tokens goes on from. */
  kept(count) {
    if (!this.sinks || count < this.tokens) return Math.min(count, this.most);
    return this.tokens - this.step + ((count - this.tokens) % this.step);
  }

  /** Tokens that can be read at once when there are so many rows. */
  room(rows) {
    return this.sinks ? this.tokens - rows : Infinity;
  }

  /** Slots that a buffer needs at most when so many tokens are read at once. */
  slots(count) {
    if (this.sinks) return this.tokens;
    return this.most + Math.max(count, LEAST_SLACK, Math.floor(this.tokens / 16));
  }
}

/** What layers with buffers of each kind see: a Map from its name. */
export function spansOf({ geometry, lawcat }) {
  const spans = new Map();
  const kinds = lawcat.layer_types?.length ? lawcat.layer_types : ["linear_attention"];
  if (lawcat.window && kinds.includes("linear_attention")) spans.set("window", new Span(lawcat.window));
  if (kinds.includes("full_attention")) {
    const tokens = Math.min(lawcat.attention_span, geometry.sliding_window ?? lawcat.attention_span);
    spans.set("full", new Span(tokens, lawcat.attention_sinks ?? 0));
  }
  return spans;
}

/** Bytes of the state of one text at most, as a snapshot holds it. */
export function mostBytes(manifest) {
  const spans = spansOf(manifest);
  const rows = ({ buffer }) => (buffer ? spans.get(buffer).most : 0);
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
    const spans = spansOf(manifest);
    const rotary = manifest.lawcat.rope || spans.size > 0;
    this.frequencies = rotary ? inverseFrequencies(manifest.geometry) : null; // radians a token
    for (const [name, span] of spans) this.buffers.set(name, { span, fill: 0, slots: 0 });
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

  /** Tokens that can be read at once: at least one. */
  get room() {
    return Math.min(...[...this.buffers.values()].map(({ span, fill }) => span.room(fill)));
  }

  /** Slots for so many more tokens in every buffer, at most `room` of them. */
  makeRoom(tokens) {
    for (const [name, buffer] of this.buffers) {
      const most = buffer.span.slots(tokens);
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
    const kept = Math.min(buffer.fill, buffer.span.most);
    this.each(name, (data, width, heads) => {
      for (let h = 0; h < heads; h++) {
        const start = h * buffer.slots * width;
        data.copyWithin(start, start + (buffer.fill - kept) * width, start + buffer.fill * width);
      }
    });
    buffer.fill = kept;
  }

  /** Forget the oldest rows behind the sinks, and move both up. */
  forgetBetween(name) {
    const buffer = this.buffers.get(name);
    const { tokens, sinks, step } = buffer.span;
    this.each(name, (data, width, heads, key) => {
      for (let h = 0; h < heads; h++) {
        const start = h * buffer.slots * width;
        if (key) this.rotateOn(data, start, sinks, width, step);
        data.copyWithin(start + sinks * width, start + (sinks + step) * width, start + tokens * width);
      }
    });
    buffer.fill -= step;
  }

  /** Keys of `rows` rows as if they stood `positions` later, in place. */
  rotateOn(data, start, rows, width, positions) {
    const half = width / 2;
    for (let row = 0; row < rows; row++) {
      for (let i = 0; i < half; i++) {
        const at = start + row * width + i;
        const [a, b] = [data[at], data[at + half]];
        const [cos, sin] = [Math.cos(positions * this.frequencies[i]), Math.sin(positions * this.frequencies[i])];
        data[at] = a * cos - b * sin;
        data[at + half] = b * cos + a * sin;
      }
    }
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
      change(data, dims[3], dims[1], entry.input.endsWith(".key"));
    }
  }

  /** The tensors after `tokens` more, from a session's results. */
  take(results, tokens) {
    for (const { input, output } of this.entries) this.tensors.set(input, results[output]);
    this.position += tokens;
    for (const [name, buffer] of this.buffers) {
      buffer.fill += tokens;
      if (buffer.span.sinks && buffer.fill === buffer.span.tokens) this.forgetBetween(name);
    }
  }

  /** What the text goes on from: {shape, data} of every tensor, in the manifest's order. */
  kept() {
    return this.entries.map((entry) => {
      const { data, dims } = this.tensors.get(entry.input);
      if (!entry.buffer) return { shape: dims.slice(1), data };
      const { fill, span, slots } = this.buffers.get(entry.buffer);
      const rows = Math.min(fill, span.most);
      const out = new Float32Array(dims[1] * rows * dims[3]);
      copyRows(data, slots, fill - rows, out, rows, rows, dims);
      return { shape: [dims[1], rows, dims[3]], data: out };
    });
  }

  /** The shapes of `kept()` after so many tokens. */
  keptShapes(position) {
    return this.entries.map((entry) => {
      const rows = entry.buffer ? this.buffers.get(entry.buffer).span.kept(position) : 0;
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
    for (const buffer of this.buffers.values()) buffer.fill = buffer.span.kept(position);
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
