// Tokens with their probabilities: a text whose parts tell, when pointed at, what else might have stood there.

import { button, element } from "./dom.js";

const LEAVE_MS = 250;
const LEVELS = [0.9, 0.6, 0.3, 0.1]; // probabilities between the shades
const INVISIBLE = { "\n": "↵", "\t": "⇥", " ": "␣" };
let numViews = 0;

export class TokenView {
  /** `onChoose(place, name)` is called when the person takes another token for a place. */
  constructor(label, onChoose) {
    this._onChoose = onChoose;
    this._id = `tokens-${++numViews}`;
    this._card = element("div", { class: "token-card", role: "group", "aria-label": "Alternatives", hidden: true });
    this._text = element("div", { class: "tokens", role: "listbox", "aria-label": label, tabindex: "0", hidden: true });
    this.element = element("div", { class: "token-box" }, this._text, this._card);
    this._tokens = [];
    this._at = null;
    this._text.addEventListener("pointerover", ({ target }) => {
      if (target.dataset.place !== undefined) this._show(Number(target.dataset.place));
    });
    this._text.addEventListener("keydown", (event) => this._onKey(event));
    this._text.addEventListener("focusout", () => this._leaveSoon());
    this._card.addEventListener("keydown", (event) => this._onKey(event));
    this._card.addEventListener("focusout", () => this._leaveSoon());
    for (const part of [this._text, this._card]) {
      part.addEventListener("pointerleave", () => this._leaveSoon());
      part.addEventListener("pointerenter", () => clearTimeout(this._timer));
    }
  }

  clear() {
    this._tokens = [];
    this._at = null;
    this._text.hidden = true;
    this._text.removeAttribute("aria-activedescendant");
    this._text.replaceChildren();
    this._hide(false);
  }

  /** Add a token `{text, name, logprob, tops: [[name, logprob], ...]}`. Of a part of a character the text is empty. */
  add(token) {
    const place = this._tokens.push(token) - 1;
    const chance = Math.exp(token.logprob);
    const level = LEVELS.filter((bound) => chance < bound).length;
    const attributes = {
      class: `token level-${level}${/^\s*\n/.test(token.text) ? " is-break" : ""}`,
      id: `${this._id}-${place}`,
      role: "option",
      "aria-selected": "false",
      "aria-label": `${visible(token.name)}, ${percent(token.logprob)}`,
      "data-place": place,
    };
    this._text.append(element("span", attributes, token.text));
    this._text.hidden = false;
  }

  get tokens() {
    return this._tokens;
  }

  _show(place) {
    clearTimeout(this._timer);
    if (place === this._at && !this._card.hidden) return;
    this._select(place);
    const { name, logprob, tops } = this._tokens[place];
    const others = tops.filter(([other]) => other !== name);
    const rows = [[name, logprob], ...others].sort(([, one], [, other]) => other - one);
    this._card.replaceChildren(...rows.map((row) => this._row(place, row, row[0] === name)));
    this._card.hidden = false;
    this._move(this._text.children[place]);
  }

  _row(place, [name, logprob], isChosen) {
    const bar = element("span", { class: "bar" });
    bar.style.setProperty("--chance", String(Math.exp(logprob)));
    const parts = [element("code", {}, visible(name)), bar, element("span", { class: "chance" }, percent(logprob))];
    if (isChosen) return element("div", { class: "row is-chosen" }, parts);
    const attributes = { class: "row bare", "aria-label": `Go on with ${visible(name)}, ${percent(logprob)}` };
    const row = button("", () => this._onChoose(place, name), { ...attributes, disabled: name.startsWith("bytes:") });
    row.append(...parts);
    return row;
  }

  _move(token) {
    const box = this.element.getBoundingClientRect();
    const line = token.getClientRects()[0] ?? token.getBoundingClientRect();
    this._card.style.left = `${Math.max(0, Math.min(line.left - box.left, box.width - this._card.offsetWidth))}px`;
    this._card.style.top = `${line.bottom - box.top + 2}px`;
  }

  _select(place) {
    this._text.children[this._at]?.setAttribute("aria-selected", "false");
    this._at = place;
    this._text.children[place].setAttribute("aria-selected", "true");
    this._text.setAttribute("aria-activedescendant", `${this._id}-${place}`);
  }

  _onKey(event) {
    const last = this._tokens.length - 1;
    const at = this._at ?? -1;
    const places = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last };
    if (event.currentTarget === this._text && event.key in places && last >= 0) {
      event.preventDefault();
      this._show(Math.max(0, Math.min(places[event.key], last)));
      this._text.children[this._at].scrollIntoView({ block: "nearest" });
    }
    if (event.key === "Escape" && !this._card.hidden) {
      event.stopPropagation();
      this._hide(true);
    }
    if (event.currentTarget === this._text && event.key === "Enter") {
      this._card.querySelector("button:not(:disabled)")?.focus();
    }
  }

  _leaveSoon() {
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this.element.contains(document.activeElement) || this._hide(false), LEAVE_MS);
  }

  _hide(isFocused) {
    this._card.hidden = true;
    this._text.children[this._at]?.setAttribute("aria-selected", "false");
    if (isFocused) this._text.focus();
  }
}

function visible(text) {
  return text.replace(/^ | $|[\n\t]/g, (character) => INVISIBLE[character]) || "(nothing)";
}

function percent(logprob) {
  const chance = 100 * Math.exp(logprob);
  return chance >= 0.1 ? `${chance.toFixed(1)} %` : "< 0.1 %";
}
