// Keys that do something anywhere on the page, and the dialog that lists them.

import { byId, element } from "./dom.js";

const OF_FIELDS = [
  ["Enter", "send the message"],
  ["Shift+Enter", "a line break in it"],
  ["Arrow up", "in an empty message: edit the last one"],
  ["Ctrl+Enter", "complete, fill in, or save an edited answer"],
  ["Arrows", "in a completion: what else a token might have been"],
];

/** Listen for shortcuts, name of the keys -> `{words, act}`, and list them behind the button. */
export function showShortcuts(shortcuts) {
  const dialog = byId("shortcuts");
  const rows = [...OF_FIELDS, ...Object.entries(shortcuts).map(([keys, { words }]) => [keys, words])];
  const entries = rows.flatMap(([keys, words]) => [element("dt", {}, kbd(keys)), element("dd", {}, words)]);
  byId("shortcut-list").append(...entries);
  byId("show-shortcuts").addEventListener("click", () => dialog.showModal());
  byId("hide-shortcuts").addEventListener("click", () => dialog.close());
  document.addEventListener("keydown", (event) => {
    const shortcut = dialog.open ? undefined : shortcuts[nameOf(event)];
    if (shortcut === undefined) return;
    event.preventDefault();
    shortcut.act();
  });
}

/** The keys of an event; letters and digits by their place, since Alt makes other characters of them. */
function nameOf({ key, code, altKey, shiftKey, ctrlKey, metaKey }) {
  if (ctrlKey || metaKey) return "";
  if (altKey && shiftKey) return `Alt+Shift+${code.replace(/^(?:Key|Digit)/, "")}`;
  return altKey || shiftKey ? "" : key;
}

function kbd(keys) {
  return keys
    .split("+")
    .flatMap((key, place) => (place === 0 ? [element("kbd", {}, key)] : ["+", element("kbd", {}, key)]));
}
