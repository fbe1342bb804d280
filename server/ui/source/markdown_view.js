// Markdown on the page: elements and texts, made one by one, for what `markdown.js` and `highlight.js` have read.

import { copyButton } from "./copy.js";
import { element } from "./dom.js";
import { partsOf } from "./highlight.js";
import { blocksOf } from "./markdown.js";

const INLINE_ELEMENTS = { strong: "strong", emphasis: "em", struck: "del" };
const SAFE_SCHEMES = ["http:", "https:", "mailto:"];
const shownSources = new WeakMap(); // container -> the sources of its blocks

/** Show a text in a container. Blocks that did not change stay the same elements, so a selection in them lasts. */
export function showMarkdown(container, text) {
  const blocks = blocksOf(text);
  const before = shownSources.get(container) ?? [];
  for (const [index, block] of blocks.entries()) {
    if (before[index] === block.source) continue;
    const made = blockElement(block);
    if (index < container.children.length) container.children[index].replaceWith(made);
    else container.append(made);
  }
  while (container.children.length > blocks.length) container.lastElementChild.remove();
  const sources = blocks.map(({ source }) => source);
  shownSources.set(container, sources);
}

function blockElement(block) {
  switch (block.type) {
    case "code":
      return codeBlock(block.text, block.language);
    case "math":
      return element("div", { class: "math code" }, block.text);
    case "heading": // the page has the first two levels for itself
      return element(`h${Math.min(block.level + 2, 6)}`, {}, inlineNodes(block.children));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, block.children.map(blockElement));
    case "list":
      return listElement(block);
    case "table":
      return tableElement(block);
    default:
      return element("p", {}, inlineNodes(block.children));
  }
}

function listElement({ start, items }) {
  const entries = items.map((blocks) => {
    const isLine = blocks.length > 0 && blocks[0].type === "paragraph";
    const first = isLine ? inlineNodes(blocks[0].children) : [];
    return element("li", {}, first, blocks.slice(isLine ? 1 : 0).map(blockElement));
  });
  return start === null ? element("ul", {}, entries) : element("ol", { start: start === 1 ? null : start }, entries);
}

function tableElement({ alignments, head, rows }) {
  const cells = (name, row) =>
    row.map((cell, place) => element(name, { class: `at-${alignments[place] ?? "left"}` }, inlineNodes(cell)));
  return element(
    "div",
    { class: "table", tabindex: "0" },
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, cells("th", head))),
      element(
        "tbody",
        {},
        rows.map((row) => element("tr", {}, cells("td", row))),
      ),
    ),
  );
}

/** Code with its colours, its language and a button that copies it. */
export function codeBlock(text, language) {
  const name = language || "text";
  return element(
    "figure",
    { class: "code-block", "aria-label": `Code, ${name}` },
    element(
      "figcaption",
      {},
      element("span", {}, name),
      copyButton("Copy", () => text, { "aria-label": "Copy code" }),
    ),
    element("pre", { tabindex: "0" }, element("code", {}, codeNodes(text, language))),
  );
}

/** Elements and texts for code. */
function codeNodes(text, language) {
  return partsOf(text, language).map(([kind, part]) =>
    kind === null ? part : element("span", { class: `is-${kind}` }, part),
  );
}

function inlineNodes(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return node;
    if (node.type === "code") return element("code", {}, node.text);
    if (node.type === "math") return element("span", { class: "math code" }, node.text);
    if (node.type === "link") return linkElement(node);
    return element(INLINE_ELEMENTS[node.type], {}, inlineNodes(node.children));
  });
}

/** A link that leaves nothing of this page to the other, or only its text if it leads anywhere else than to a page. */
function linkElement({ target, children }) {
  if (!isSafe(target)) return element("span", {}, inlineNodes(children));
  const attributes = { href: target, rel: "noopener noreferrer nofollow", target: "_blank", title: target };
  return element("a", attributes, inlineNodes(children));
}

function isSafe(target) {
  try {
    return SAFE_SCHEMES.includes(new URL(target).protocol);
  } catch {
    return false; // a relative one would lead into this server
  }
}
