// Answers from `lawcat-edge serve`, which shows this page: OpenAI's API of the same address.
const KEY = "lawcat-edge.key";

export class Remote {
  constructor() {
    this.key = sessionStorage.getItem(KEY) ?? "";
    this.controller = null;
  }

  setKey(key) {
    this.key = key;
    sessionStorage.setItem(KEY, key);
  }

  async #fetch(path, options = {}) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached; is it still running?");
    }
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      const error = new Error(body?.error?.message ?? `The server answered ${response.status}.`);
      error.needsKey = response.status === 401;
      throw error;
    }
    return response;
  }

  /** {name}: what is served. */
  async about() {
    const { data } = await (await this.#fetch("v1/models")).json();
    return { name: data[0].id };
  }

  /** Answer `messages`; `onPiece(text)` while it is written. {stopReason, stats}. */
  async chat(messages, options, onPiece) {
    this.controller = new AbortController();
    const begin = performance.now();
    let first = null;
    let usage = null;
    let stopReason = "closed";
    const names = { maxNewTokens: "max_tokens", topP: "top_p", minP: "min_p", repetitionPenalty: "repetition_penalty" };
    const asked = Object.fromEntries(Object.entries(options).map(([key, value]) => [names[key] ?? key, value]));
    const body = { messages, stream: true, stream_options: { include_usage: true }, ...asked };
    try {
      const response = await this.#fetch("v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: this.controller.signal,
      });
      for await (const event of events(response.body)) {
        if (event.error) throw new Error(event.error.message);
        usage = event.usage ?? usage;
        const choice = event.choices?.[0];
        if (choice?.delta?.content) {
          first ??= performance.now();
          onPiece(choice.delta.content);
        }
        stopReason = choice?.finish_reason ?? stopReason;
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
    if (!usage) return { stopReason, stats: null };
    const seconds = (performance.now() - (first ?? begin)) / 1000;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    return {
      stopReason,
      stats: {
        promptTokens: usage.prompt_tokens - cached,
        newTokens: usage.completion_tokens,
        contextTokens: usage.total_tokens,
        prefillTokensPerSecond: first ? (usage.prompt_tokens - cached) / ((first - begin) / 1000) : 0,
        decodeTokensPerSecond: usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : null,
      },
    };
  }

  stop() {
    this.controller?.abort();
  }
}

/** The JSON of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
