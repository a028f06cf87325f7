// The state after some text, in a file: the format of runtime/generate/snapshot.py, so that files go both ways.
import { sha256, UserError } from "./bundle.js";
import { count, State } from "./state.js";

const MAGIC = "LAWCATS1";

/** The file's bytes. `context`: {state, tokens, extra}; `bundle`: the one that the state belongs to. */
export async function saveSnapshot(context, bundle) {
  if (bundle.sha256 === null) throw new UserError("Snapshots need https or localhost: the page has no hashes.");
  const kept = context.state.kept();
  const header = new TextEncoder().encode(
    JSON.stringify({
      bundle: bundle.sha256,
      tokens: context.tokens.length,
      fed: context.state.position,
      shapes: kept.map(({ shape }) => shape),
      extra: context.extra,
    }),
  );
  const floats = kept.map(({ data }) => data);
  const size = 12 + header.length + 4 * context.tokens.length + 4 * floats.reduce((n, f) => n + f.length, 0);
  const bytes = new Uint8Array(size + 32);
  const view = new DataView(bytes.buffer);
  bytes.set(new TextEncoder().encode(MAGIC));
  view.setUint32(8, header.length, true);
  bytes.set(header, 12);
  let at = 12 + header.length;
  for (const token of context.tokens) at = (view.setUint32(at, token, true), at + 4);
  for (const values of floats) {
    bytes.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), at);
    at += values.byteLength;
  }
  bytes.set(fromHex(await sha256(bytes.subarray(0, size))), size);
  return bytes;
}

/** {state, tokens, extra} from a snapshot's bytes; UserError for another bundle's or a damaged one. */
export async function loadSnapshot(bytes, bundle, ort) {
  const damaged = new UserError("The snapshot is damaged; copy or make it again.");
  const text = (from, to) => new TextDecoder().decode(bytes.subarray(from, to));
  if (bytes.length < 44 || text(0, 8) !== MAGIC) throw new UserError("That file is not a snapshot.");
  const found = await sha256(bytes.subarray(0, -32));
  if (found === null) throw new UserError("Snapshots need https or localhost: the page has no hashes.");
  if (fromHex(found).some((byte, i) => byte !== bytes[bytes.length - 32 + i])) throw damaged;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const size = view.getUint32(8, true);
  if (size > bytes.length - 44) throw damaged;
  let header;
  try {
    header = JSON.parse(text(12, 12 + size));
  } catch {
    throw damaged;
  }
  if (header.bundle !== bundle.sha256) {
    throw new UserError("The snapshot belongs to another bundle; load the bundle that made it.");
  }
  const { manifest } = bundle;
  const state = new State(ort, manifest);
  const shapes = state.keptShapes(header.fed);
  const values = shapes.reduce((n, shape) => n + count(shape), 0);
  if (
    JSON.stringify(header.shapes) !== JSON.stringify(shapes) ||
    !(header.fed >= 0 && header.fed <= header.tokens) ||
    bytes.length !== 12 + size + 4 * header.tokens + 4 * values + 32
  ) {
    throw damaged;
  }
  let at = 12 + size;
  const tokens = Array.from({ length: header.tokens }, (_, i) => view.getUint32(at + 4 * i, true));
  if (tokens.some((token) => token >= manifest.geometry.vocab_size)) throw damaged;
  at += 4 * header.tokens;
  const arrays = shapes.map((shape) => {
    const data = new Float32Array(bytes.slice(at, at + 4 * count(shape)).buffer);
    if (!data.every(Number.isFinite)) throw damaged;
    at += data.byteLength;
    return data;
  });
  state.load(arrays, header.fed);
  return { state, tokens, extra: header.extra ?? {} };
}

function fromHex(text) {
  return Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));
}
