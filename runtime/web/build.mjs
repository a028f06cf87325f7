// Put the page and what it needs of the pinned packages into dist/, ready for any static file server.
//
//     npm ci && npm run build
//
// Nothing is bundled or minified: the packages ship modules that a browser loads as they are.
import { cp, mkdir, rename, rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const packages = {
  "onnxruntime-web/dist/ort.wasm.min.mjs": "ort.mjs",
  // onnxruntime looks for these two by their own names.
  "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
  "onnxruntime-web/package.json": "onnxruntime-web.json", // names its version and licence
  "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.mjs",
  "@huggingface/tokenizers/LICENSE": "tokenizers.LICENSE",
  "@huggingface/jinja/dist/index.js": "jinja.mjs",
  "@huggingface/jinja/LICENSE": "jinja.LICENSE",
};

const target = join(here, "dist");
const fresh = `${target}.new`;
await rm(fresh, { recursive: true, force: true });
await mkdir(join(fresh, "vendor"), { recursive: true });
await cp(join(here, "src"), fresh, { recursive: true });
for (const [from, to] of Object.entries(packages)) {
  await cp(join(here, "node_modules", from), join(fresh, "vendor", to)).catch((error) => {
    console.error(`${from} is missing (${error.code}); run \`npm ci\` first.`);
    process.exit(2);
  });
}
await rm(target, { recursive: true, force: true });
await rename(fresh, target);
console.log(`wrote ${target}`);
