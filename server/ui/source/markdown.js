// Markdown as models write it -> a tree of blocks and inline nodes. HTML in it is text. Knows no document.

const MAX_DEPTH = 24; // of quotes, lists and emphasis in each other
const MAX_INLINE = 20_000; // characters of a paragraph that is read for marks
const MAX_MARKED = 1000; // characters between two marks: without a bound openings alone take quadratic time

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>[ ]?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const INDENTED = /^(?: {4}|\t)/;
const DELIMITER = /^:?-+:?$/;
const MATH = /^ {0,3}(\$\$|\\\[)/;
const BLANK = /^\s*$/;

/** The blocks of a text, each with the lines of its source: `{type, source, ...}`. */
export function blocksOf(text) {
  return readBlocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function readBlocks(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (BLANK.test(lines[at])) {
      at += 1;
      continue;
    }
    const reader = depth < MAX_DEPTH ? READERS.find((one) => one.begins(lines, at)) : PARAGRAPH;
    const [block, end] = reader.read(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

/** The first line from `at` on for which `isEnd` holds, or the end of all. */
function lineAfter(lines, at, isEnd) {
  let end = at;
  while (end < lines.length && !isEnd(lines[end], end)) end += 1;
  return end;
}

function readFence(lines, at) {
  const [, indent, mark, info] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
  const end = lineAfter(lines, at + 1, (line) => closing.test(line));
  const code = lines.slice(at + 1, end).map((line) => line.replace(new RegExp(`^ {0,${indent.length}}`), ""));
  const language = info.trim().split(/\s+/)[0].toLowerCase();
  return [{ type: "code", language, text: code.join("\n") }, Math.min(end + 1, lines.length)];
}

function readIndented(lines, at) {
  let end = lineAfter(lines, at, (line) => !INDENTED.test(line) && !BLANK.test(line));
  while (BLANK.test(lines[end - 1])) end -= 1;
  const code = lines.slice(at, end).map((line) => line.replace(INDENTED, ""));
  return [{ type: "code", language: "", text: code.join("\n") }, end];
}

function readMath(lines, at) {
  const [, mark] = MATH.exec(lines[at]);
  const closing = mark === "$$" ? "$$" : "\\]";
  const isClosed = lines[at].indexOf(closing, lines[at].indexOf(mark) + 2) > 0;
  const end = isClosed ? at : lineAfter(lines, at + 1, (line) => line.includes(closing) || BLANK.test(line));
  const text = lines.slice(at, end + 1).join("\n");
  return [{ type: "math", text: text.trim() }, Math.min(end + 1, lines.length)];
}

function readHeading(lines, at) {
  const [, marks, text = ""] = HEADING.exec(lines[at]);
  const words = text.trim().replace(/(?:^|[ \t])#+$/, "");
  return [{ type: "heading", level: marks.length, children: inlineOf(words.trimEnd()) }, at + 1];
}

function readQuote(lines, at, depth) {
  const isEnd = (line, place) => !QUOTE.test(line) && (BLANK.test(line) || beginsBlock(lines, place));
  const end = lineAfter(lines, at, isEnd);
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", children: readBlocks(inner, depth + 1) }, end];
}

function isOrdered(line) {
  return /\d/.test(ITEM.exec(line)[2]);
}

function readList(lines, at, depth) {
  const [, indent] = ITEM.exec(lines[at]);
  const ordered = isOrdered(lines[at]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    const isNext = match && match[1].length <= indent.length + 1 && isOrdered(lines[end]) === ordered;
    if (!isNext || RULE.test(lines[end])) break;
    const width = match[0].length > match[1].length + 6 ? match[1].length + 2 : match[0].length;
    const first = end;
    end = endOfItem(lines, first, match[1].length + 2);
    const further = lines.slice(first + 1, end).map((line) => withoutIndent(line, width));
    items.push(readBlocks([lines[first].slice(match[0].length), ...further], depth + 1));
    const next = lineAfter(lines, end, (line) => !BLANK.test(line));
    if (next < lines.length && ITEM.test(lines[next])) end = next;
  }
  return [{ type: "list", start: ordered ? parseInt(lines[at].trim(), 10) : null, items }, end];
}

/** The line after an item: it goes on in lines that are indented, and in a paragraph's further lines. */
function endOfItem(lines, first, width) {
  const isInside = (line) => line.search(/\S/) >= width;
  let next = first; // the first line with words after the one that is looked at
  return lineAfter(lines, first + 1, (line, place) => {
    if (!BLANK.test(line)) return !isInside(line) && (BLANK.test(lines[place - 1]) || beginsBlock(lines, place));
    if (next < place) next = lineAfter(lines, place, (other) => !BLANK.test(other));
    return next === lines.length || !isInside(lines[next]);
  });
}

function withoutIndent(line, width) {
  return line.slice(Math.min(width, Math.max(line.search(/\S/), 0)));
}

function beginsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  return cellsOf(lines[at + 1]).every((cell) => DELIMITER.test(cell));
}

function readTable(lines, at) {
  const end = lineAfter(lines, at + 2, (line) => BLANK.test(line) || !line.includes("|"));
  const [head, marks, ...rows] = lines.slice(at, end).map(cellsOf);
  const alignments = marks.map((mark) => (/^:-+:$/.test(mark) ? "center" : /-:$/.test(mark) ? "right" : "left"));
  return [{ type: "table", alignments, head: head.map(inlineOf), rows: rows.map((row) => row.map(inlineOf)) }, end];
}

function cellsOf(line) {
  const inner = line
    .trim()
    .replace(/^\|/, "")
    .replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
}

function readParagraph(lines, at) {
  const end = lineAfter(lines, at + 1, (line, place) => BLANK.test(line) || beginsBlock(lines, place));
  const text = lines
    .slice(at, end)
    .map((line) => line.trimStart())
    .join("\n");
  return [{ type: "paragraph", children: inlineOf(text.trimEnd()) }, end];
}

const byPattern = (pattern) => (lines, at) => pattern.test(lines[at]);

const PARAGRAPH = { begins: () => true, read: readParagraph };
const INTERRUPTING = [
  { begins: byPattern(FENCE), read: readFence },
  { begins: byPattern(HEADING), read: readHeading },
  { begins: byPattern(RULE), read: (lines, at) => [{ type: "rule" }, at + 1] },
  { begins: byPattern(QUOTE), read: readQuote },
  { begins: byPattern(ITEM), read: readList },
  { begins: byPattern(MATH), read: readMath },
  { begins: beginsTable, read: readTable },
];
const READERS = [...INTERRUPTING, { begins: byPattern(INDENTED), read: readIndented }, PARAGRAPH];

/** Whether a line ends the paragraph before it. */
function beginsBlock(lines, at) {
  return INTERRUPTING.some((reader) => reader.begins(lines, at));
}

// ---- inline ----

const ANY = String.raw`[\s\S]{0,${MAX_MARKED}}?`;
const INLINE = new RegExp(
  [
    String.raw`(?<math>\\\(${ANY}\\\)|\\\[${ANY}\\\]|\$\$(?=[^$])${ANY}\$\$)`,
    String.raw`\\(?<escaped>[!-/:-@[-\x60{-~])`,
    String.raw`(?<!\x60)(?<ticks>\x60+)(?!\x60)(?<code>${ANY}[^\x60])\k<ticks>(?!\x60)`,
    String.raw`!?\[(?<label>[^\[\]]*)\]\((?<target>[^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)(?:\s+"[^"]*")?\)`,
    String.raw`<(?<address>https?:\/\/[^\s<>]+)>`,
    String.raw`(?<bare>https?:\/\/[^\s<>()\[\]"'\x60*]+[^\s<>()\[\]"'\x60*.,;:!?])`,
    String.raw`\*\*(?=\S)(?<strong>${ANY}\S)\*\*(?!\*)`,
    String.raw`(?<!\w)__(?=\S)(?<strong2>${ANY}\S)__(?!\w)`,
    String.raw`(?<!\w)\*(?=[^\s*])(?<emphasis>${ANY}[^\s*])\*(?!\*)`,
    String.raw`(?<!\w)_(?=[^\s_])(?<emphasis2>${ANY}[^\s_])_(?!\w)`,
    String.raw`~~(?=\S)(?<struck>${ANY}\S)~~`,
  ].join("|"),
  "g",
);

/** The inline nodes of a paragraph: texts, and `{type, children | text, target}`. */
function inlineOf(text, depth = 0) {
  if (depth > MAX_DEPTH || text.length > MAX_INLINE) return [text];
  const nodes = [];
  let done = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > done) nodes.push(text.slice(done, match.index));
    nodes.push(nodeOf(match, depth + 1));
    done = match.index + match[0].length;
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

function nodeOf(match, depth) {
  const found = match.groups;
  if (found.math !== undefined) return { type: "math", text: found.math };
  if (found.escaped !== undefined) return found.escaped;
  if (found.code !== undefined) return { type: "code", text: found.code.replace(/^ (.*) $/s, "$1") };
  if (found.label !== undefined) {
    return { type: "link", target: found.target, children: inlineOf(found.label || found.target, depth) };
  }
  const address = found.address ?? found.bare;
  if (address !== undefined) return { type: "link", target: address, children: [address] };
  for (const type of ["strong", "emphasis", "struck"]) {
    const inner = found[type] ?? found[`${type}2`];
    if (inner !== undefined) return { type, children: inlineOf(inner, depth) };
  }
  return match[0];
}
