// Rotary angles for bundles with softmax attention or a rotary linear branch; as in runtime/engine/rotary.py.
import { UserError } from "./bundle.js";

/** Radians a token, [d/2], for the rope types default, linear and llama3. */
export function inverseFrequencies(geometry) {
  const d = geometry.head_dim;
  const theta = geometry.rope_theta;
  if (!(theta > 0 && theta < 1e12)) throw new UserError("The bundle gives no valid rope_theta.");
  const base = Array.from({ length: d / 2 }, (_, i) => theta ** -((2 * i) / d));
  const scaling = geometry.rope_scaling ?? { rope_type: "default" };
  const factor = Number(scaling.factor);
  switch (scaling.rope_type) {
    case "default":
      return base;
    case "linear":
      return base.map((f) => f / factor);
    case "llama3": {
      const low = Number(scaling.low_freq_factor);
      const high = Number(scaling.high_freq_factor);
      const length = Number(scaling.original_max_position_embeddings);
      return base.map((f) => {
        // Slow dimensions are stretched by the factor, fast ones kept, those between blended.
        const turns = (length * f) / (2 * Math.PI);
        const keep = Math.min(1, Math.max(0, (turns - low) / (high - low)));
        return f * keep + (f / factor) * (1 - keep);
      });
    }
    default:
      throw new UserError(`The bundle uses rope scaling ${scaling.rope_type}, unknown here; update this page.`);
  }
}

/** [cos, sin] of positions start .. start+count-1, each float32 [rows, d/2]; rows beyond the tokens are zero. */
export function cosSin(frequencies, start, count, rows) {
  const half = frequencies.length;
  const [cos, sin] = [new Float32Array(rows * half), new Float32Array(rows * half)];
  for (let t = 0; t < count; t++) {
    for (let i = 0; i < half; i++) {
      const angle = (start + t) * frequencies[i];
      cos[t * half + i] = Math.cos(angle);
      sin[t * half + i] = Math.sin(angle);
    }
  }
  return [cos, sin];
}
