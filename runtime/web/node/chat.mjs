// A bundle in Node: what the page runs in WebAssembly, on onnxruntime-node.
//
//     npm ci --ignore-scripts && node node/chat.mjs BUNDLE "Why do ships need lighthouses?"
import { readFile } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";
import { Model } from "../src/model.js";

/** The files of a bundle's folder; the model compares each with the manifest's size and sha256. */
export function fromFolder(folder) {
  return {
    name: basename(resolve(folder)),
    providers: ["cpu"],
    async read(file, size, progress) {
      const bytes = new Uint8Array(await readFile(join(folder, file)));
      progress?.(bytes.length);
      return bytes;
    },
  };
}

const [folder, question, most = "256"] = process.argv.slice(2);
if (!question) {
  console.error("usage: node node/chat.mjs BUNDLE QUESTION [MOST TOKENS]");
  process.exit(2);
}
const model = await Model.load({ ort, Tokenizer, Template }, fromFolder(folder), { flavour: process.env.FLAVOUR ?? "ort" });
for await (const piece of model.chat(question, { ...model.defaults, maxNewTokens: Number(most) })) process.stdout.write(piece);
process.stdout.write("\n");
