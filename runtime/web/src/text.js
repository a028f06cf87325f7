// Tokens to text, piece by piece, without ever splitting a character or a stop string; as runtime/generate/text.py.

const BROKEN = "\ufffd"; // what decoders put for bytes that are not (yet) a character
const HOLD = 8; // tokens held back for the rest of a character before it is taken to be garbage

/**
 * Turns a stream of tokens into a stream of text; the parts joined equal the text of all tokens.
 * `decode(ids)`: text of ids. `context`: the tokens before the stream, whose text is not given out.
 */
export class Detokenizer {
  constructor(decode, context = []) {
    this.decode = (ids) => (ids.length ? decode(ids) : "");
    this.ids = context.slice(-HOLD);
    this.done = this.ids.length; // tokens at the front of the window whose text was given out
  }

  /** The text that became certain with `token`; often empty. */
  push(token) {
    this.ids.push(token);
    const text = this.decode(this.ids);
    if (!text.endsWith(BROKEN)) return this.#give(this.ids.length, text);
    if (this.ids.length - this.done > HOLD) {
      // Invalid bytes, not an unfinished character (at most three): give out what lies before a cut that
      // no character crosses.
      for (let cut = this.ids.length - 3; cut > this.done; cut--) {
        const head = this.decode(this.ids.slice(0, cut));
        if (head && text === head + this.decode(this.ids.slice(cut))) return this.#give(cut, head);
      }
    }
    return "";
  }

  /** The rest, at the end of the text; an unfinished character comes out as U+FFFD. */
  flush() {
    return this.#give(this.ids.length, this.decode(this.ids));
  }

  #give(upto, text) {
    const before = this.decode(this.ids.slice(0, this.done));
    const fresh = text.startsWith(before) ? text.slice(before.length) : text;
    // The last given tokens stay as the context that the next ones are decoded in.
    if (fresh || this.ids.length > 64) {
      this.ids = this.ids.slice(this.done);
      upto -= this.done;
    }
    this.done = upto;
    return fresh;
  }
}

/** Ends a stream at the first of `stops`, across any number of pieces; it is not given out itself. */
export class StopStrings {
  constructor(stops = []) {
    this.stops = stops;
    this.found = null;
    this.held = "";
  }

  /** What can be given out now; sets `found` when a stop string is complete. */
  push(piece) {
    if (this.found !== null) return "";
    const text = this.held + piece;
    // The one that is complete first wins: that does not depend on how the text was cut into pieces.
    let end = Infinity;
    for (const stop of this.stops) {
      const at = text.indexOf(stop);
      if (at >= 0 && at + stop.length < end) [end, this.found] = [at + stop.length, stop];
    }
    if (this.found !== null) {
      this.held = "";
      return text.slice(0, end - this.found.length);
    }
    let keep = 0;
    for (const stop of this.stops) {
      for (let size = Math.min(stop.length - 1, text.length); size > keep; size--) {
        if (text.endsWith(stop.slice(0, size))) keep = size;
      }
    }
    this.held = text.slice(text.length - keep);
    return text.slice(0, text.length - keep);
  }

  /** What was held back in case it began a stop string. */
  flush() {
    const held = this.held;
    this.held = "";
    return held;
  }
}
