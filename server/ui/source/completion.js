// Completions: a prompt goes on, or what lies between two texts is filled in. Each token shows what it might have been.

import { button, element } from "./dom.js";
import { completionRequest } from "./requests.js";
import { factsOf, Run } from "./run.js";
import { load, save } from "./storage.js";
import { TokenView } from "./token_view.js";

const MAX_ALTERNATIVES = 20;
const DEFAULT_ALTERNATIVES = 5;

export class Completion {
  /**
   * `panel` gets the fields. `words` are `{mode, prompt, suffix, act, result}`, its labels; without a suffix's label
   * there is no suffix. The rest is as in `Chat`.
   */
  constructor(panel, words, { settings, model, onChange, onFailure }) {
    this._words = words;
    Object.assign(this, { _settings: settings, _model: model, _onChange: onChange, _onFailure: onFailure });
    this._run = null;
    this._ending = Promise.resolve();
    const kept = load(`texts/${words.mode}`) ?? {};
    this._prompt = this._field("prompt", words.prompt, kept.prompt);
    this._suffix = words.suffix === undefined ? null : this._field("suffix", words.suffix, kept.suffix);
    this._alternatives = this._numberField(kept.alternatives ?? DEFAULT_ALTERNATIVES);
    this._act = button(words.act, () => this.run(), { class: "main" });
    this._stop = button("Stop", () => this.stop(), { hidden: true });
    this._take = button("Add to the text", () => this._takeOver(), { hidden: true });
    this._view = new TokenView(words.result, (place, name) => this._chooseOther(place, name));
    this._facts = element("p", { class: "facts" });
    this._failure = element("div", { class: "failure", role: "alert", hidden: true });
    const fields = [this._prompt, this._suffix].filter((field) => field !== null);
    const result = { class: "result", "aria-label": words.result };
    panel.append(
      element("div", { class: "texts" }, fields.map((field) => field.parentElement)),
      element("div", { class: "acts" }, this._act, this._stop, this._take, this._alternatives.parentElement),
      element("section", result, this._view.element, this._failure, this._facts),
    );
    panel.addEventListener("input", () => this._keep());
    for (const field of fields) field.addEventListener("keydown", (event) => this._onKey(event));
  }

  _field(name, label, text) {
    const id = `${this._words.mode}-${name}`;
    const field = element("textarea", { id, rows: "7", class: "code", spellcheck: "false" });
    field.value = text ?? "";
    element("div", { class: "field" }, element("label", { for: id }, label), field);
    return field;
  }

  _numberField(value) {
    const id = `${this._words.mode}-alternatives`;
    const field = element("input", { id, type: "number", min: "0", max: MAX_ALTERNATIVES, value });
    element("div", { class: "field beside" }, element("label", { for: id }, "Alternatives"), field);
    return field;
  }

  get isRunning() {
    return this._run !== null;
  }

  focus() {
    this._prompt.focus();
  }

  /** The request that the button makes, or that which goes on behind tokens of the answer. */
  request(settings, start = []) {
    const prompt = this._prompt.value + start.map(({ text }) => text).join("");
    const suffix = this._suffix === null ? null : this._suffix.value;
    return completionRequest(this._model(), prompt, suffix, this._numAlternatives, settings);
  }

  get _numAlternatives() {
    return Math.max(0, Math.min(MAX_ALTERNATIVES, Math.round(this._alternatives.valueAsNumber || 0)));
  }

  stop() {
    this._run?.stop();
  }

  /** Let the model write, behind tokens of its answer that are kept. */
  run(start = []) {
    const settings = this.isRunning ? null : this._settings.read();
    if (settings === null) return;
    this._view.clear();
    for (const token of start) this._view.add(token);
    this._run = new Run();
    this._show(null);
    this._ending = this._follow(this.request(settings, start));
  }

  async _follow(request) {
    try {
      const { error } = await this._run.follow(request, (choice) =>
        tokensOf(choice).forEach((token) => this._view.add(token)),
      );
      this._show(error);
      if (error !== null) this._onFailure(error);
    } finally {
      this._run = null;
      this._showButtons();
    }
  }

  _show(error) {
    this._failure.hidden = error === null;
    this._failure.replaceChildren(
      ...(error === null ? [] : [error.message, button("Try again", () => this.run(), { class: "small" })]),
    );
    this._facts.textContent = this._run.stats.totalMs === undefined ? "" : factsOf(this._run.stats).join(" · ");
    this._showButtons();
  }

  _showButtons() {
    this._act.disabled = this.isRunning;
    this._stop.hidden = !this.isRunning;
    this._take.hidden = this.isRunning || this._view.tokens.length === 0;
    this._onChange();
  }

  /** The token that the person has chosen stands there from now on, and the model goes on behind it. */
  async _chooseOther(place, name) {
    const token = this._view.tokens[place];
    const [, logprob] = token.tops.find(([other]) => other === name);
    this.stop();
    await this._ending;
    this.run([...this._view.tokens.slice(0, place), { ...token, text: name, name, logprob }]);
  }

  _takeOver() {
    this._prompt.value += this._view.tokens.map(({ text }) => text).join("");
    this._view.clear();
    this._keep();
    this._showButtons();
    this._prompt.focus();
  }

  _keep() {
    const texts = { prompt: this._prompt.value, suffix: this._suffix?.value, alternatives: this._numAlternatives };
    save(`texts/${this._words.mode}`, texts);
    this._onChange();
  }

  _onKey(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    this.run();
  }
}

/** The tokens of an event. Of a token by itself the event's text is shown: parts of a character are nothing yet. */
function tokensOf({ text, logprobs }) {
  if (!logprobs) return text === "" ? [] : [{ text, name: text, logprob: 0, tops: [] }];
  const { tokens, token_logprobs: scores, top_logprobs: tops } = logprobs;
  return tokens.map((name, place) => ({
    text: tokens.length === 1 ? text : name,
    name,
    logprob: scores[place],
    tops: tops === null ? [] : Object.entries(tops[place] ?? {}),
  }));
}
