// Answers from a bundle in this page: talks to the model's thread (worker.js).
export class Local {
  constructor(onProgress) {
    this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.waiting = new Map();
    this.lastId = 0;
    this.worker.onmessage = ({ data }) => {
      if (data.type === "progress") return onProgress(data.done, data.total);
      const call = this.waiting.get(data.id);
      if (data.type === "piece") return call.onPiece(data.text);
      this.waiting.delete(data.id);
      if (data.type === "error") call.reject(new Error(data.message));
      else call.resolve(data.result);
    };
    this.worker.onerror = (event) => {
      const error = new Error(event.message || "The page's worker could not start.");
      for (const call of this.waiting.values()) call.reject(error);
      this.waiting.clear();
    };
  }

  /** Ask the worker; `onPiece(text)` while it writes. Rejects with what the user can do about it. */
  ask(action, details = {}, onPiece = () => {}) {
    const id = ++this.lastId;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onPiece });
      this.worker.postMessage({ action, id, ...details });
    });
  }

  stop() {
    this.worker.postMessage({ action: "stop" });
  }
}
