// Copying texts. Without a secure context browsers have no clipboard, but still copy what is selected.

import { button, element } from "./dom.js";

const SHOWN_MS = 1500;

/** A button that copies what `text` returns, and says so for a moment. There may be nothing to copy: null. */
export function copyButton(label, text, attributes = {}) {
  const word = element("span", {}, label);
  let timer = 0;
  async function act() {
    const copied = text();
    word.textContent = copied !== null && (await copy(copied)) ? "Copied" : "Not copied";
    clearTimeout(timer);
    timer = setTimeout(() => (word.textContent = label), SHOWN_MS);
  }
  return button(word, act, { class: "bare small", "aria-label": label, ...attributes });
}

/** Whether the text is in the clipboard now. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text);
  }
}

function copySelected(text) {
  const holder = element("textarea", { class: "for-readers", "aria-hidden": "true" });
  holder.value = text;
  document.body.append(holder);
  const focused = document.activeElement;
  holder.select();
  const isCopied = document.execCommand("copy");
  holder.remove();
  focused?.focus();
  return isCopied;
}
