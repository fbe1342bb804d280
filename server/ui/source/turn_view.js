// A turn on the page: an article with what was said, and what can be done about it.

import { copyButton } from "./copy.js";
import { button, element } from "./dom.js";
import { codeBlock, showMarkdown } from "./markdown_view.js";
import { factsOf } from "./run.js";

const NAMES = { user: "You", assistant: "Model", tool: "Tool" };
const FINISHES = { length: "cut off at its length", stopped: "stopped" };
let numViews = 0;

export class TurnView {
  /**
   * `actions` are called with the turn: edit(turn, text), whose text is null if the person gave up, regenerate(turn),
   * goOn(turn), answer(turn, texts).
   */
  constructor(turn, actions) {
    this.turn = turn;
    this._id = ++numViews;
    this._actions = actions;
    this._isEditing = false;
    this._body = element("div", { class: "body" });
    this._foot = element("footer");
    const head = element("header", {}, turn.role === "tool" ? `Tool ${turn.name}` : NAMES[turn.role]);
    const attributes = { class: `turn of-${turn.role}`, "aria-label": NAMES[turn.role] };
    this.element = element("article", attributes, head, this._body, this._foot);
    if (turn.role === "assistant") this._makeParts();
  }

  _makeParts() {
    this._thoughts = element("div", { class: "markdown" });
    this._reasoning = element("details", { class: "reasoning" }, element("summary", {}, "Reasoning"), this._thoughts);
    this._words = element("div", { class: "markdown" });
    this._calls = element("div", { class: "calls" });
    this._end = element("div");
    this._body.append(this._words, this._calls, this._end);
  }

  /** Show the turn as it is now. `isLast` and `isRunning` (is it being written?) decide what can be done. */
  update({ isLast, isRunning, isBusy }) {
    this.element.setAttribute("aria-busy", String(isRunning));
    if (this._isEditing) return;
    if (this.turn.role === "assistant") this._updateModel(isLast, isRunning);
    else this._body.replaceChildren(element("div", { class: "said" }, this.turn.text));
    this._foot.hidden = isRunning;
    this._foot.replaceChildren(...(isRunning ? [] : this._footParts(isLast, isBusy)));
  }

  _updateModel(isLast, isRunning) {
    const { text, reasoning, isJson } = this.turn;
    if (reasoning !== "" && !this._reasoning.isConnected) this._body.prepend(this._reasoning);
    showMarkdown(this._thoughts, reasoning);
    if (isJson) this._words.replaceChildren(...(text === "" ? [] : [codeBlock(text, "json")]));
    else showMarkdown(this._words, text);
    this.element.classList.toggle("is-waiting", isRunning && text === "");
    this.element.classList.toggle("is-writing", isRunning && text !== "");
    if (isRunning) this._calls.replaceChildren(...this.turn.calls.map(callElement));
    else this._showCalls(isLast);
    this._end.replaceChildren(...this._endParts());
  }

  _showCalls(isLast) {
    const calls = this.turn.calls;
    if (calls.length === 0 || !isLast) {
      this._calls.replaceChildren(...calls.map(callElement));
      return;
    }
    const fields = calls.map(({ name }, place) => {
      const id = `answer-${this._id}-${place}`;
      const field = element("textarea", { id, rows: "2", class: "code", spellcheck: "false" });
      return { field, label: element("label", { for: id }, `Answer of ${name}`) };
    });
    const valuesOf = () => fields.map(({ field }) => field.value);
    const send = () => this._actions.answer(this.turn, valuesOf());
    const parts = calls.map((call, place) => {
      const { field, label } = fields[place];
      return [callElement(call), element("div", { class: "field" }, label, field)];
    });
    const label = calls.length === 1 ? "Send answer" : "Send answers";
    this._calls.replaceChildren(...parts.flat(), button(label, send, { class: "main small" }));
  }

  _endParts() {
    const { error, note } = this.turn;
    const again = () => this._actions.regenerate(this.turn);
    const parts = note ? [element("p", { class: "note" }, note)] : [];
    if (error) {
      const what = [element("span", {}, error), button("Try again", again, { class: "small" })];
      parts.push(element("div", { class: "failure", role: "alert" }, what));
    }
    return parts;
  }

  _footParts(isLast, isBusy) {
    const { role, text, error, finish, stats } = this.turn;
    const isModel = role === "assistant";
    const tools = [copyButton("Copy", () => text, { class: "bare small" })];
    if (!isBusy) {
      if (role !== "tool") tools.push(button("Edit", () => this.edit(), { class: "bare small" }));
      if (isModel) tools.push(button("Regenerate", () => this._actions.regenerate(this.turn), { class: "bare small" }));
      const isCut = FINISHES[finish] !== undefined || Boolean(error);
      if (isModel && isLast && text !== "" && isCut) {
        tools.push(button("Continue", () => this._actions.goOn(this.turn), { class: "bare small" }));
      }
    }
    const facts = [FINISHES[finish], ...(stats ? factsOf(stats) : [])].filter((fact) => fact !== undefined);
    return [...tools, element("span", { class: "facts" }, facts.join(" · "))];
  }

  /** Let the person change the text. What they wrote is sent again; what the model wrote is only changed. */
  edit() {
    this._isEditing = true;
    const isOwn = this.turn.role === "user";
    const label = isOwn ? "Edit message" : "Edit answer";
    const field = element("textarea", { "aria-label": label, rows: "4", class: "editor" });
    field.value = this.turn.text;
    const save = () => this._endEdit(field.value);
    const cancel = () => this._endEdit(null);
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      const isEnter = event.key === "Enter" && (event.ctrlKey || event.metaKey || (isOwn && !event.shiftKey));
      if (isEnter || event.key === "Escape") {
        event.preventDefault();
        event.stopPropagation();
        (isEnter ? save : cancel)();
      }
    });
    this._body.replaceChildren(field);
    const saver = button(isOwn ? "Send again" : "Save", save, { class: "main small" });
    this._foot.replaceChildren(saver, button("Cancel", cancel, { class: "small" }));
    field.focus();
  }

  _endEdit(text) {
    this._isEditing = false;
    if (this.turn.role === "assistant") this._body.replaceChildren(this._words, this._calls, this._end);
    this._actions.edit(this.turn, text);
  }
}

function callElement({ name, arguments: text }) {
  const call = element("div", { class: "call" }, element("p", { class: "label" }, "Calls ", element("code", {}, name)));
  call.append(codeBlock(pretty(text), "json"));
  return call;
}

/** JSON with line breaks, or the text as it is while it is no JSON yet. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
