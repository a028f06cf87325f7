// Conversations that survive a reload: in the browser's localStorage, the newest first, a few dozen of them.
const KEY = "lawcat-edge.conversations";
const MOST = 50;
const MOST_CHARACTERS = 4_000_000; // browsers give a page about 5 million

const isMessage = (m) => ["system", "user", "assistant"].includes(m?.role) && typeof m.content === "string";

export class Conversations {
  constructor(storage = window.localStorage) {
    this.storage = storage;
    this.list = [];
    try {
      const found = JSON.parse(storage.getItem(KEY) ?? "[]");
      this.list = found.filter((c) => typeof c?.id === "string" && Array.isArray(c.messages) && c.messages.every(isMessage));
    } catch {
      // Storage is turned off, or holds something else: start without.
    }
  }

  get(id) {
    return this.list.find((conversation) => conversation.id === id);
  }

  /** Keep `messages` as the newest conversation. */
  put(id, messages) {
    this.list = [{ id, messages }, ...this.list.filter((other) => other.id !== id)].slice(0, MOST);
    this.#write();
  }

  remove(id) {
    this.list = this.list.filter((conversation) => conversation.id !== id);
    this.#write();
  }

  #write() {
    for (;;) {
      try {
        const text = JSON.stringify(this.list);
        if (text.length > MOST_CHARACTERS && this.list.length > 1) throw new RangeError("too much");
        this.storage.setItem(KEY, text);
        return;
      } catch {
        if (this.list.length <= 1) return; // not kept, but still on the page
        this.list.pop(); // the oldest makes room
      }
    }
  }
}

/** What a conversation is called in the list. */
export function titleOf({ messages }) {
  const first = messages.find(({ role }) => role === "user")?.content.trim() ?? "";
  return first.length > 60 ? `${first.slice(0, 60)}…` : first || "Empty";
}
