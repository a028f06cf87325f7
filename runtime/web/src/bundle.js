// A bundle: a folder of files behind a URL or on the user's disk, checked as far as a page needs.
import { spansOf } from "./state.js";

/** A mistake that the user can mend; its message says how. */
export class UserError extends Error {}

const MANIFEST = "lawcat_bundle.json";
const MAX_SMALL = 64 << 20; // bytes of any file but the weights
// As a bundle's member: no folders, nothing hidden.
const MEMBER = /^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}$/;

/** Files under the URL `base`. A source is {name, read(file, size, progress) -> Uint8Array}. */
export function fromUrl(base) {
  const folder = new URL(base.endsWith("/") ? base : `${base}/`, self.location.href);
  return {
    name: folder.pathname.split("/").filter(Boolean).at(-1) ?? "bundle",
    async read(file, size, progress) {
      let response;
      try {
        response = await fetch(new URL(file, folder));
      } catch {
        throw new UserError(`${folder} cannot be reached; is the server running?`);
      }
      if (!response.ok) throw new UserError(`${new URL(file, folder)} cannot be read (${response.status}).`);
      if (size === undefined) return new Uint8Array(await response.arrayBuffer());
      // Straight into one array: a 150 MB file is not held twice.
      const bytes = new Uint8Array(size);
      let at = 0;
      const reader = response.body.getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        if (at + value.length > size) throw wrongSize(file);
        bytes.set(value, at);
        at += value.length;
        progress(value.length);
      }
      if (at !== size) throw wrongSize(file);
      return bytes;
    },
  };
}

/** Files that the user chose (`<input type="file" webkitdirectory>`); nothing leaves the machine. */
export function fromFiles(files) {
  const byName = new Map(files.map((file) => [file.name, file]));
  return {
    name: files[0]?.webkitRelativePath.split("/")[0] || "bundle",
    async read(name, size, progress) {
      const file = byName.get(name);
      if (!file) throw new UserError(`The folder has no ${name}; choose one made by \`lawcat-edge export\`.`);
      if (size !== undefined && file.size !== size) throw wrongSize(name);
      const bytes = new Uint8Array(await file.arrayBuffer());
      progress?.(bytes.length);
      return bytes;
    },
  };
}

export class Bundle {
  /** Read and check the manifest of `source`. `flavour`: the operators to use (default: the fastest it has). */
  static async open(source, flavour) {
    const data = await source.read(MANIFEST);
    let manifest;
    try {
      manifest = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
    } catch {
      throw new UserError(`${MANIFEST} is not valid JSON; export or copy the bundle again.`);
    }
    checkManifest(manifest);
    const bundle = new Bundle();
    bundle.source = source;
    bundle.manifest = manifest;
    bundle.sha256 = await sha256(data); // null where the browser has no hashes
    // In wasm the product with 8-bit weights unpacks them at every step, the portable graph once, at loading, to
    // float32: nine times as fast (LOG.md). No "onnx": this onnxruntime-web has no opset 27.
    bundle.flavour = flavour ?? ["portable", "ort"].find((op) => manifest.ops.includes(op));
    if (!manifest.graphs[bundle.flavour]) {
      throw new UserError(
        `The bundle has no ${flavour ?? "portable"} graph; export it with \`--ops ort,portable\`.`,
      );
    }
    return bundle;
  }

  has(name) {
    return Object.hasOwn(this.manifest.files, name);
  }

  /** The bytes of a file that the manifest lists, of its size and (where the browser can) its sha256. */
  async read(name, progress = () => {}) {
    if (!this.has(name)) throw new UserError(`The bundle lists no ${name}; export it again.`);
    const { size, sha256: expected } = this.manifest.files[name];
    if (!name.endsWith(".data") && size > MAX_SMALL) throw new UserError(`${name} is too large.`);
    const bytes = await this.source.read(name, size, progress);
    const found = await sha256(bytes);
    if (found !== null && found !== expected) {
      throw new UserError(`${name} is not the file that was exported (sha256 differs); copy it again.`);
    }
    return bytes;
  }

  async text(name) {
    return new TextDecoder("utf-8", { fatal: true }).decode(await this.read(name));
  }

  get graph() {
    return this.manifest.graphs[this.flavour].last;
  }

  /** The weights' files: all that a graph may point into. */
  get weights() {
    return Object.keys(this.manifest.files).filter((name) => name.endsWith(".data"));
  }

  get bytesToLoad() {
    const names = [this.graph, ...this.weights, "tokenizer.json"];
    return names.reduce((sum, name) => sum + this.manifest.files[name].size, 0);
  }
}

/** sha256 in hexadecimal; null where the page has no crypto.subtle (plain http from another machine). */
export async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function checkManifest(manifest) {
  const bad = (what) => new UserError(`${MANIFEST}: ${what}; export or copy the bundle again.`);
  if (manifest?.format !== 3 && manifest?.format !== 4) {
    throw new UserError(`The bundle's format ${manifest?.format} is unknown here; update this page.`);
  }
  const { files, graphs, state, geometry, lawcat, tokens } = manifest;
  const tables = { files, graphs, geometry, lawcat, tokens };
  for (const [key, value] of Object.entries(tables)) {
    if (typeof value !== "object" || value === null) throw bad(`${key} must be an object`);
  }
  for (const [name, entry] of Object.entries(files)) {
    if (!MEMBER.test(name)) throw bad(`${name.slice(0, 40)} is no file name`);
    if (!Number.isSafeInteger(entry?.size) || entry.size < 0) throw bad(`files.${name} has no size`);
  }
  if (!Array.isArray(manifest.ops)) throw bad("ops must be a list");
  for (const graph of Object.values(graphs)) {
    if (!Object.hasOwn(files, graph?.last)) throw bad("a graph is not among the files");
  }
  if (!Array.isArray(state) || !state.length || state.length > 8192) throw bad("state must be a list");
  if (!Number.isSafeInteger(lawcat.window ?? 0)) throw bad("lawcat.window must be a number");
  const spans = spansOf(manifest);
  for (const { tokens: span, sinks, step } of spans.values()) {
    const fits = Number.isSafeInteger(sinks) && sinks >= 0 && (!sinks || sinks + step < span);
    if (!fits) throw bad("lawcat.attention_sinks does not fit the span");
  }
  let total = 0;
  for (const { input, output, shape, dtype, buffer } of state) {
    const sizes = Array.isArray(shape) && shape[0] === "B" ? shape.slice(1) : [];
    if (typeof input !== "string" || typeof output !== "string" || dtype !== "float32" || !sizes.length) {
      throw bad("state has a wrong entry");
    }
    const rows = spans.get(buffer)?.tokens;
    if (buffer !== undefined && !(Number.isSafeInteger(rows) && rows > 0)) throw bad("state has a wrong buffer");
    const most = sizes.map((size, i) => (buffer !== undefined && i === 1 && size === "tokens" ? rows : size));
    if (!most.every((size) => Number.isSafeInteger(size) && size > 0)) throw bad("state has a wrong shape");
    total += most.reduce((product, size) => product * size, 4);
  }
  if (total > 1 << 30) throw bad("the state would take more than 1 GB");
  if (!Number.isSafeInteger(geometry.vocab_size)) throw bad("geometry.vocab_size must be a number");
  if (!Array.isArray(tokens.eos)) throw bad("tokens.eos must be a list");
}

function wrongSize(name) {
  return new UserError(`${name} has not the size it should have; copy the bundle again.`);
}
