// Choosing the next token from logits: the same choice for the same seed as runtime/generate/sampling.py.
import { UserError } from "./bundle.js";

const MASK64 = (1n << 64n) - 1n;
const MASK128 = (1n << 128n) - 1n;
const MULTIPLIER = (2549297995355413924n << 64n) | 4865540595714422341n;

/** numpy's PCG64 (O'Neill's PCG XSL RR 128/64), seeded as numpy seeds it, by SeedSequence. */
export class Pcg64 {
  constructor(seed) {
    const words = seedSequence(BigInt(seed));
    const state = (words[0] << 64n) | words[1];
    this.increment = ((((words[2] << 64n) | words[3]) << 1n) | 1n) & MASK128;
    this.state = (this.increment + state) & MASK128;
    this.#step();
  }

  #step() {
    this.state = (this.state * MULTIPLIER + this.increment) & MASK128;
  }

  /** The next 64 random bits. */
  next() {
    this.#step();
    const folded = (this.state >> 64n) ^ (this.state & MASK64);
    const turn = this.state >> 122n;
    return ((folded >> turn) | (folded << (-turn & 63n))) & MASK64;
  }

  /** Skip `count` numbers: the power of an affine map, by squaring. */
  advance(count) {
    let [factor, plus, a, b] = [1n, 0n, MULTIPLIER, this.increment];
    for (let left = BigInt(count); left > 0n; left >>= 1n) {
      if (left & 1n) [factor, plus] = [(factor * a) & MASK128, (plus * a + b) & MASK128];
      b = ((a + 1n) * b) & MASK128;
      a = (a * a) & MASK128;
    }
    this.state = (this.state * factor + plus) & MASK128;
  }
}

/** Four 64-bit words from a seed below 2^128, as numpy's SeedSequence gives them. */
function seedSequence(seed) {
  let hash = 0x43b0d7e5;
  const hashed = (value) => {
    value ^= hash;
    hash = Math.imul(hash, 0x931e8875);
    value = Math.imul(value, hash);
    return value ^ (value >>> 16);
  };
  const pool = [0, 1, 2, 3].map((i) => hashed(Number((seed >> BigInt(32 * i)) & 0xffffffffn)));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from === to) continue;
      const mixed = (Math.imul(0xca01f9dd, pool[to]) - Math.imul(0x4973f715, hashed(pool[from]))) | 0;
      pool[to] = mixed ^ (mixed >>> 16);
    }
  }
  hash = 0x8b51f9dd;
  const words = Array.from({ length: 8 }, (_, i) => {
    let value = pool[i % 4] ^ hash;
    hash = Math.imul(hash, 0x58f38ded);
    value = Math.imul(value, hash);
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return [0, 2, 4, 6].map((i) => words[i] | (words[i + 1] << 32n));
}

const RANGES = {
  temperature: [0, 100],
  topP: [0, 1],
  minP: [0, 1],
  topK: [0, 1 << 24],
  repetitionPenalty: [0.01, 100],
};

/** What the content of a generation_config.json asks for, as runtime/generate/sampling.py reads it. */
export function samplingDefaults(settings) {
  const names = { top_k: "topK", top_p: "topP", min_p: "minP", repetition_penalty: "repetitionPenalty" };
  const sample = settings?.do_sample;
  const found = { temperature: sample === false ? 0 : (settings?.temperature ?? (sample === true ? 1 : 0)) };
  for (const [theirs, ours] of Object.entries(names)) {
    if (settings?.[theirs] != null) found[ours] = Math.max(settings[theirs], 0);
  }
  return found;
}

export class Sampler {
  /** temperature 0: greedy; topK, topP, minP, repetitionPenalty: as in runtime/generate/sampling.py; seed: a whole number
   * or null. */
  constructor({ temperature = 0, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1, seed = null } = {}) {
    this.options = { temperature, topK, topP, minP, repetitionPenalty };
    for (const [name, [low, high]] of Object.entries(RANGES)) {
      if (!(this.options[name] >= low && this.options[name] <= high)) {
        throw new UserError(`${name} must be a number from ${low} to ${high}.`);
      }
    }
    this.seed = seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
    if (!Number.isSafeInteger(this.seed) || this.seed < 0) throw new UserError("seed must be a whole number.");
    this.generator = new Pcg64(this.seed);
    this.drawn = 0;
    this.seen = new Set();
  }

  /** Tell which tokens the text holds; only the repetition penalty uses it. */
  observe(tokens) {
    if (this.options.repetitionPenalty !== 1) for (const token of tokens) this.seen.add(token);
  }

  /** The token for `position` (number of tokens before it) from logits Float32Array [V]. */
  choose(logits, position) {
    if (this.seen.size) {
      const penalty = this.options.repetitionPenalty;
      logits = Float64Array.from(logits);
      for (const i of this.seen) logits[i] = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;
    }
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    if (!Number.isFinite(logits[best]) || logits.some(Number.isNaN)) {
      throw new UserError("The model's output is not finite; run `lawcat-edge verify` on the bundle.");
    }
    return this.options.temperature === 0 ? best : this.#draw(logits, position);
  }

  #draw(logits, position) {
    this.generator.advance(position - this.drawn);
    // The number of a position depends on nothing but seed and position.
    const uniform = Number(this.generator.next() >> 11n) * 2 ** -53;
    this.drawn = position + 1;
    const { tokens, cumulative, mass } = this.#kept(Float64Array.from(logits));
    const index = cumulative.findIndex((sum) => sum > uniform * mass);
    return tokens[index < 0 ? tokens.length - 1 : index];
  }

  /** What the filters leave, the most likely first (ties by lower id), with its cumulative weights. */
  #kept(logits) {
    const { temperature, topK, topP, minP } = this.options;
    const scaled = logits.map((value) => value / Math.max(temperature, 1e-6));
    const best = scaled.reduce((a, b) => Math.max(a, b));
    let tokens = Array.from(scaled.keys());
    if (minP > 0) tokens = tokens.filter((i) => scaled[i] >= best + Math.log(minP));
    const order = (a, b) => scaled[b] - scaled[a] || a - b;
    if (topK > 0 && topK < tokens.length) {
      const floor = Float64Array.from(tokens, (i) => scaled[i]).sort().at(-topK);
      tokens = tokens.filter((i) => scaled[i] >= floor).sort(order).slice(0, topK);
    } else {
      tokens.sort(order);
    }
    let total = 0;
    const cumulative = tokens.map((i) => (total += Math.exp(scaled[i] - best)));
    if (topP < 1) {
      const last = cumulative.findIndex((sum) => sum >= total * topP);
      if (last >= 0) [tokens, cumulative.length] = [tokens.slice(0, last + 1), last + 1];
    }
    return { tokens, cumulative, mass: cumulative.at(-1) };
  }
}
