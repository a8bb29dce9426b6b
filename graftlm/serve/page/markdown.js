// Markdown of an answer -> a tree of {tag, children, ...} -> nodes. What is not markdown is text, HTML above all.
//
// A subset of CommonMark and of GitHub's tables, as models write them: a line break in a paragraph stays one, and any
// deeper indentation nests a list. Pictures are links, as a picture from elsewhere would tell its host who reads.

import { el } from "./dom.js";

const DEEPEST = 12; // of quotes, lists and emphasis within each other: what is nested deeper is text

const node = (tag, children, more = {}) => ({ tag, children, ...more });

// Blocks --------------------------------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const COLUMNS = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:?)? *$|^ *\| *:?-+:? *\|? *$/;

/** The blocks of a text. */
export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

function blocks(lines, depth) {
  if (depth > DEEPEST) return [node("p", [lines.join("\n")])];
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (lines[at].trim() === "") {
      at++;
      continue;
    }
    const [block, end] =
      fenced(lines, at) ?? simple(lines, at) ?? quoted(lines, at, depth) ?? listed(lines, at, depth) ??
      table(lines, at) ?? paragraph(lines, at);
    found.push(block);
    at = end;
  }
  return found;
}

function fenced(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const indent = lines[at].search(/\S/);
  let end = at + 1;
  for (; end < lines.length; end++) {
    const close = FENCE.exec(lines[end]);
    if (close && close[1].startsWith(open[1]) && lines[end].trim() === close[1]) break;
  }
  // An answer that is not complete may end within: then the rest is code.
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, line.search(/\S|$/))));
  return [node("pre", [code.join("\n")], { language: open[2] }), end + 1];
}

function simple(lines, at) {
  if (RULE.test(lines[at])) return [node("hr", []), at + 1];
  const heading = HEADING.exec(lines[at]);
  return heading && [node(`h${heading[1].length}`, inline(heading[2] ?? "")), at + 1];
}

function quoted(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  if (end === at) return null;
  return [node("blockquote", blocks(lines.slice(at, end).map((line) => line.replace(QUOTE, "")), depth + 1)), end];
}

function listed(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = /\d/.test(first[2]);
  const kind = first[2].slice(-1);
  const items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[2].slice(-1) !== kind || RULE.test(lines[at])) break;
    const indent = item[1].length;
    const content = [lines[at].slice(item[0].length)];
    for (at++; at < lines.length; at++) {
      const own = lines[at].search(/\S|$/);
      const blank = own === lines[at].length;
      if (blank ? !continues(lines, at, indent) : own <= indent && (startsBlock(lines[at]) || lines[at - 1].trim() === ""))
        break;
      content.push(lines[at].slice(Math.min(own, item[0].length)));
    }
    items.push(node("li", blocks(content, depth + 1)));
    while (at < lines.length && lines[at].trim() === "") at++;
    if (ITEM.exec(lines[at] ?? "")?.[1].length < indent) break;
  }
  const start = ordered ? parseInt(first[2], 10) : 1;
  return [node(ordered ? "ol" : "ul", items, start === 1 ? {} : { start }), at];
}

/** Whether what follows a blank line still belongs to the item at this indentation. */
function continues(lines, at, indent) {
  while (at < lines.length && lines[at].trim() === "") at++;
  return at < lines.length && lines[at].search(/\S/) > indent;
}

function table(lines, at) {
  if (!lines[at].includes("|") || !COLUMNS.test(lines[at + 1] ?? "")) return null;
  const align = cells(lines[at + 1]).map((cell) => (/^:.*:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : ""));
  const head = cells(lines[at]);
  if (head.length !== align.length) return null;
  const row = (line, tag) => {
    const texts = cells(line);
    return node("tr", align.map((side, i) => node(tag, inline(texts[i] ?? ""), { align: side })));
  };
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim() !== "") end++;
  const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
  return [node("table", [node("thead", [row(lines[at], "th")]), node("tbody", body)]), end];
}

const cells = (line) =>
  line
    .trim()
    .replace(/^\||(?<!\\)\|$/g, "")
    .split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));

const startsBlock = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines[end]) && !table(lines, end)) end++;
  return [node("p", inline(lines.slice(at, end).map((line) => line.trim()).join("\n"))), end];
}

// Inline --------------------------------------------------------------------------------------------------------------

const MARKS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const BARE = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_|]/y;
const LINK = /!?\[((?:[^[\]\\]|\\.)*)\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/y;
const WORD = /[\p{L}\p{N}]/u;

/** Text with emphasis, code, links and line breaks -> nodes and strings. */
export function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const found = [];
  const unclosed = new Set();
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const taken = taking(text, at, depth, unclosed);
    if (taken === null) {
      plain += text[at++];
      continue;
    }
    const [piece, end] = taken;
    if (typeof piece === "string") plain += piece;
    else {
      if (plain) found.push(plain);
      plain = "";
      found.push(piece);
    }
    at = end;
  }
  if (plain) found.push(plain);
  return found;
}

function taking(text, at, depth, unclosed) {
  switch (text[at]) {
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? [text[at + 1], at + 2] : null;
    case "\n":
      return [node("br", []), at + 1];
    case "`":
      return code(text, at);
    case "!":
    case "[":
      return link(text, at, depth);
    case "h":
      return bare(text, at);
    case "<":
      return text[at + 1] === "h" ? angled(text, at) : null;
    default:
      return emphasis(text, at, depth, unclosed);
  }
}

function code(text, at) {
  const [run] = /^`+/.exec(text.slice(at, at + 64));
  const start = at + run.length;
  for (let end = start; (end = text.indexOf(run, end)) >= 0; ) {
    let after = end + run.length;
    if (text[after] !== "`") return [node("code", [text.slice(start, end).replace(/^ (.+) $/, "$1")]), after];
    while (text[after] === "`") after++;
    end = after; // a longer run closes nothing
  }
  return [run, start];
}

function link(text, at, depth) {
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  if (!found) return null;
  const label = found[1] || found[2];
  const href = safe(found[2]);
  return [href ? node("a", inline(label, depth + 1), { href }) : found[0], at + found[0].length];
}

function bare(text, at) {
  BARE.lastIndex = at;
  const found = WORD.test(text[at - 1] ?? "") ? null : BARE.exec(text);
  const href = found && safe(found[0]);
  return href ? [node("a", [found[0]], { href }), at + found[0].length] : null;
}

function angled(text, at) {
  const found = bare(text, at + 1);
  return found && text[found[1]] === ">" ? [found[0], found[1] + 1] : null;
}

/** An address that may be a link: of the web or of mail, and nothing that a browser would run. */
export function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null; // relative ones would lead to this server
  }
}

function emphasis(text, at, depth, unclosed) {
  const mark = MARKS[text.slice(at, at + 2)] ? text.slice(at, at + 2) : text[at];
  if (!MARKS[mark] || unclosed.has(mark)) return null;
  const start = at + mark.length;
  const within = mark[0] === "_" && WORD.test(text[at - 1] ?? ""); // snake_case
  if (within || /^\s?$/.test(text[start] ?? "")) return null;
  for (let run = start; (run = text.indexOf(mark, run + 1)) >= 0; ) {
    const first = run;
    while (text[run] === mark[0]) run++;
    const length = run - first;
    if (/[\s\\]/.test(text[first - 1]) || (mark[0] === "_" && WORD.test(text[run] ?? ""))) continue;
    if (length !== mark.length && length !== 3) continue; // of three, the inner mark closes first
    return [node(MARKS[mark], inline(text.slice(start, run - mark.length), depth + 1)), run];
  }
  unclosed.add(mark); // nor will any further on: else a text of open marks would take the square of its length
  return null;
}

// Nodes ---------------------------------------------------------------------------------------------------------------

const TAGS = new Set(
  "p h1 h2 h3 h4 h5 h6 hr br pre code blockquote ul ol li table thead tbody tr th td strong em del a".split(" "),
);

const drawn = new WeakMap(); // element -> its blocks, as JSON

/** Draw a text. Blocks at its beginning that are as they were keep their nodes, and so what is selected in them. */
export function draw(element, text) {
  const trees = parse(text);
  const blocks = trees.map((tree) => JSON.stringify(tree));
  const before = drawn.get(element) ?? [];
  let same = 0;
  while (same < Math.min(before.length, blocks.length) && before[same] === blocks[same]) same++;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...trees.slice(same).map(toNode));
  drawn.set(element, blocks);
}

function toNode(tree) {
  if (typeof tree === "string") return document.createTextNode(tree);
  const { tag, children, href, start, align, language } = tree;
  if (!TAGS.has(tag)) throw new Error(`markdown makes no ${tag}`);
  if (tag === "pre") {
    const label = language ? `code, ${language}` : "code";
    return el("pre", { tabindex: 0, role: "group", "aria-label": label }, el("code", {}, ...children));
  }
  const link = href ? { href, rel: "noopener noreferrer nofollow", target: "_blank" } : {};
  // Headings of an answer are below those of the page.
  const name = /^h[1-6]$/.test(tag) ? `h${Math.min(6, Number(tag[1]) + 2)}` : tag;
  const made = el(name, { ...link, start, class: align || undefined }, ...children.map(toNode));
  return tag === "table" ? el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "table" }, made) : made;
}
