// Markdown to a tree of elements, and the tree to the page: no HTML is ever parsed, so a text cannot become a script.
//
// A node is a string or {tag, attributes, children}. Headings, paragraphs, lists, quotes, fenced code, tables, rules;
// strong, emphasis, strikethrough, code, links. What is not closed yet (an answer that is being written) stays text,
// but open fenced code is code.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|\s*$)/;
const TABLE_LINE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 12; // quotes and lists in one another

export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").replaceAll("\t", "    ").split("\n"), 0);
}

function element(tag, children, attributes = {}) {
  return { tag, attributes, children };
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at++;
      continue;
    }
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (fence) {
      const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      let end = at + 1;
      while (end < lines.length && !close.test(lines[end])) end++;
      const code = lines.slice(at + 1, end).map((text) => `${text}\n`);
      const attributes = fence[2] ? { class: `language-${fence[2]}` } : {};
      found.push(element("pre", [element("code", [code.join("")], attributes)]));
      at = end + 1;
    } else if (heading) {
      found.push(element(`h${heading[1].length}`, inline(heading[2] ?? "")));
      at++;
    } else if (RULE.test(line)) {
      found.push(element("hr", []));
      at++;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      let end = at;
      while (end < lines.length && QUOTE.test(lines[end])) end++;
      const inner = lines.slice(at, end).map((text) => text.replace(QUOTE, ""));
      found.push(element("blockquote", blocks(inner, depth + 1)));
      at = end;
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const [list, end] = listFrom(lines, at, depth);
      found.push(list);
      at = end;
    } else if (line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "") && cells(line).length === cells(lines[at + 1]).length) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end++;
      found.push(table(lines.slice(at, end)));
      at = end;
    } else {
      let end = at + 1;
      while (end < lines.length && !interrupts(lines[end])) end++;
      found.push(element("p", inline(lines.slice(at, end).map((text) => text.trimStart()).join("\n").trimEnd())));
      at = end;
    }
  }
  return found;
}

/** Whether a line ends the paragraph above it. An ordered list does so only from 1 on, as in CommonMark. */
function interrupts(line) {
  const item = ITEM.exec(line);
  const list = item && item[3] !== undefined && (/[-*+]/.test(item[2]) || Number.parseInt(item[2], 10) === 1);
  return !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || list;
}

function listFrom(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const same = (item) => item && item[2].at(-1) === first[2].at(-1);
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length && same(ITEM.exec(lines[end])) && !RULE.test(lines[end])) {
    const [mark] = ITEM.exec(lines[end]);
    const indent = mark.trimEnd() === lines[end].trimEnd() ? mark.trimEnd().length + 1 : mark.length;
    const inner = [lines[end].slice(mark.length)];
    let empty = 0;
    end++;
    for (; end < lines.length; end++) {
      const line = lines[end];
      const inside = line.search(/\S/) >= indent;
      if (!line.trim()) empty++;
      else if (inside || (!empty && !interrupts(line) && !ITEM.test(line))) {
        if (empty) loose ||= !FENCE.test(inner[0]);
        inner.push(...Array(empty).fill(""), inside ? line.slice(indent) : line);
        empty = 0;
      } else break;
    }
    if (empty && end < lines.length && same(ITEM.exec(lines[end]))) loose = true;
    items.push(blocks(inner, depth + 1));
  }
  const tight = (children) => children.flatMap((child) => (child.tag === "p" ? child.children : [child]));
  const children = items.map((item) => element("li", loose ? item : tight(item)));
  const start = Number.parseInt(first[2], 10);
  return [element(ordered ? "ol" : "ul", children, ordered && start !== 1 ? { start: String(start) } : {}), end];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table([head, rule, ...rows]) {
  const align = cells(rule).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  const row = (line, tag) => {
    const texts = cells(line);
    return element("tr", align.map((side, i) => element(tag, inline(texts[i] ?? ""), side ? { class: side } : {})));
  };
  const body = rows.length ? [element("tbody", rows.map((line) => row(line, "td")))] : [];
  return element("table", [element("thead", [row(head, "th")]), ...body]);
}

const PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";

/** The inside of a paragraph: strings and elements. */
export function inline(text, depth = 0) {
  const found = [];
  let plain = "";
  const add = (node) => {
    if (plain) found.push(plain);
    plain = "";
    found.push(node);
  };
  let at = 0;
  while (at < text.length) {
    const rest = text.slice(at);
    const letter = text[at];
    let match;
    if (letter === "\\" && PUNCTUATION.includes(text[at + 1] ?? " ")) {
      plain += text[at + 1];
      at += 2;
    } else if (letter === "\n" || (match = /^(?: {2,}|\\)\n/.exec(rest))) {
      if (match) add(element("br", []));
      plain = `${plain.trimEnd()}\n`;
      at += match ? match[0].length : 1;
    } else if (letter === "`" && (match = /^(`+)(?!`)([^]*?[^`])\1(?!`)/.exec(rest))) {
      const code = match[2].replaceAll("\n", " ");
      add(element("code", [/^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code]));
      at += match[0].length;
    } else if (letter === "`") {
      const run = /^`+/.exec(rest)[0];
      plain += run;
      at += run.length;
    } else if (depth < DEEPEST && (match = emphasis(text, at))) {
      const inner = inline(match.inner, depth + 1);
      add(match.tag === "both" ? element("em", [element("strong", inner)]) : element(match.tag, inner));
      at = match.end;
    } else if (letter === "[" && (match = /^\[([^[\]]*)\]\(<?([^\s()<>]+(?:\([^\s()]*\))?)>?(?:\s+"[^"]*")?\)/.exec(rest))) {
      const safe = /^(https?:\/\/|mailto:)/i.test(match[2]);
      const inner = inline(match[1], depth + 1);
      if (safe) add(element("a", inner, { href: match[2] }));
      else inner.forEach(add); // where it leads is not for the page to follow
      at += match[0].length;
    } else if (letter === "<" && (match = /^<(https?:\/\/[^\s<>]+)>/.exec(rest))) {
      add(element("a", [match[1]], { href: match[1] }));
      at += match[0].length;
    } else if ("*_~".includes(letter)) {
      const run = /^(?:\*+|_+|~+)/.exec(rest)[0]; // a run that opens nothing
      plain += run;
      at += run.length;
    } else {
      plain += letter;
      at++;
    }
  }
  if (plain) found.push(plain);
  return found;
}

/** Strong or emphasised text that begins at `at`: {tag, inner, end}; null if none does. */
function emphasis(text, at) {
  const run = /^(\*{1,3}|_{1,3}|~~)(?![*_~])/.exec(text.slice(at))?.[1];
  if (!run || /^(?:\s|$)/.test(text.slice(at + run.length))) return null;
  const word = /[\p{L}\p{N}]/u;
  if (run[0] === "_" && word.test(text[at - 1] ?? " ")) return null;
  for (let end = at + run.length; end < text.length; end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "`") {
      const code = /^(`+)(?!`)[^]*?[^`]\1(?!`)/.exec(text.slice(end));
      if (code) end += code[0].length - 1;
    } else if (text.startsWith(run, end) && !/\s/.test(text[end - 1])) {
      const length = /^(?:\*+|_+|~+)/.exec(text.slice(end))[0].length;
      if (length === run.length && !(run[0] === "_" && word.test(text[end + length] ?? " "))) {
        const tag = { 1: "em", 2: run === "~~" ? "s" : "strong", 3: "both" }[run.length];
        return { tag, inner: text.slice(at + run.length, end), end: end + length };
      }
      end += length - 1;
    }
  }
  return null;
}

/** The nodes of `tree` as nodes of the document. */
export function toDom(tree) {
  const fragment = document.createDocumentFragment();
  for (const node of tree) {
    if (typeof node === "string") {
      fragment.append(node);
      continue;
    }
    const made = document.createElement(node.tag);
    for (const [name, value] of Object.entries(node.attributes)) made.setAttribute(name, value);
    if (node.tag === "a") Object.assign(made, { target: "_blank", rel: "noopener noreferrer" });
    made.append(toDom(node.children));
    fragment.append(made);
  }
  return fragment;
}
