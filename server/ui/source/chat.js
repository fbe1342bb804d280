// The chat: turns of the conversation that is open, and runs of the model, which go on when another one is opened.

import { chatRequest } from "./requests.js";
import { Run } from "./run.js";
import { TurnView } from "./turn_view.js";

const KEEP_MS = 2000;
const NEAR_END_PX = 80;
const EXAMPLE = "Why is the sky blue?"; // stands in requests that are shown or copied before anything is said

export class Chat {
  /**
   * `log` is the element of the turns. `settings` are those on the page, `model()` is the name that requests have;
   * `onChange(conversation)` is called when turns or runs have changed, `keep(conversation)` now and then while the
   * model writes, `onFailure(error)` with a run's RequestError.
   *
   * While a setting is wrong nothing is sent, nor forgotten: `settings.read()` is null, and has told the person why.
   */
  constructor({ log, settings, model, onChange, keep, onFailure }) {
    this._log = log;
    this._settings = settings;
    this._model = model;
    this._onChange = onChange;
    this._keep = keep;
    this._onFailure = onFailure;
    this._runs = new Map(); // conversation's id -> its run
    this._views = [];
    this._frame = null;
    this.conversation = null;
    this._actions = {
      edit: (turn, text) => this._edit(turn, text),
      regenerate: (turn) => this.isRunning || this._runFrom(this._place(turn)),
      goOn: (turn) => this.isRunning || this._runAfter(() => {}, turn),
      answer: (turn, texts) => this.isRunning || this._answer(turn, texts),
    };
  }

  get isRunning() {
    return this._runs.has(this.conversation?.id);
  }

  isRunningIn(conversation) {
    return this._runs.has(conversation.id);
  }

  open(conversation) {
    this.conversation = conversation;
    const last = conversation.turns.at(-1);
    const isCut = last?.role === "assistant" && !last.finish && !last.error && !this.isRunning;
    if (isCut) last.finish = "stopped"; // the page was left while the model wrote
    this._log.replaceChildren();
    this._views = [];
    this._show();
    this._log.scrollTop = this._log.scrollHeight;
  }

  /** The request that Send makes with a draft; without one, that which writes the last answer again. */
  request(draft, settings) {
    const turns = [...this.conversation.turns];
    if (draft.trim() !== "") turns.push({ role: "user", text: draft });
    else while (turns.at(-1)?.role === "assistant") turns.pop();
    if (turns.length === 0) turns.push({ role: "user", text: EXAMPLE });
    return chatRequest(this._model(), turns, settings);
  }

  /** Say something. Returns whether it was sent. */
  send(text) {
    return this._runAfter(() => this.conversation.turns.push({ role: "user", text }));
  }

  stop(conversation = this.conversation) {
    this._runs.get(conversation?.id)?.stop();
  }

  /** Let the person change what they said last. */
  editLast() {
    const view = this._views.findLast(({ turn }) => turn.role === "user");
    if (view !== undefined && !this.isRunning) view.edit();
  }

  _place(turn) {
    return this.conversation.turns.indexOf(turn);
  }

  _edit(turn, text) {
    const isSaid = turn.role === "user";
    if (text !== null) turn.text = text;
    if (text !== null && isSaid && !this.isRunning) this._runFrom(this._place(turn) + 1);
    else this._changed(this.conversation);
  }

  _answer(turn, texts) {
    const answers = turn.calls.map(({ id, name }, place) => ({ role: "tool", id, name, text: texts[place] }));
    this._runAfter(() => this.conversation.turns.push(...answers));
  }

  /** Forget the turns from a place on, and let the model write the next one. */
  _runFrom(place) {
    this._runAfter(() => this.conversation.turns.splice(place));
  }

  /** Change the turns, and let the model write the next one or go on with the last. Returns whether it does. */
  _runAfter(change, continued = null) {
    const settings = this._settings.read();
    if (settings === null) {
      this._changed(this.conversation);
      return false;
    }
    change();
    this._run(settings, continued);
    return true;
  }

  async _run(settings, continued) {
    const { conversation } = this;
    const request = chatRequest(this._model(), conversation.turns, settings);
    const turn = continued ?? newTurn(settings.format !== "text");
    if (continued === null) conversation.turns.push(turn);
    Object.assign(turn, { error: null, finish: null });
    const run = new Run();
    this._runs.set(conversation.id, run);
    this._changed(conversation);
    this._log.scrollTop = this._log.scrollHeight;
    await this._follow(conversation, turn, run, request);
  }

  async _follow(conversation, turn, run, request) {
    let keptAt = performance.now();
    try {
      const { error, note } = await run.follow(request, ({ delta }) => {
        addDelta(turn, delta);
        this._showSoon(conversation);
        if (performance.now() - keptAt < KEEP_MS) return;
        keptAt = performance.now();
        this._keep(conversation);
      });
      Object.assign(turn, { error: error?.message ?? null, note, finish: run.finish, stats: run.stats });
      if (error !== null) this._onFailure(error);
    } finally {
      this._runs.delete(conversation.id);
      this._changed(conversation);
    }
  }

  _changed(conversation) {
    Object.assign(conversation, { before: conversation.changed, changed: Date.now() });
    this._onChange(conversation);
    if (conversation === this.conversation) this._show();
  }

  /** Show the turns in the next frame: there may be hundreds of events in a second. */
  _showSoon(conversation) {
    if (conversation !== this.conversation || this._frame !== null) return;
    this._frame = requestAnimationFrame(() => {
      this._frame = null;
      this._update(this._views.slice(-1));
    });
  }

  _show() {
    const { turns } = this.conversation;
    const isSame = (view, place) => view.turn === turns[place];
    while (this._views.length > 0 && !this._views.every(isSame)) this._views.pop().element.remove();
    for (const turn of turns.slice(this._views.length)) {
      const view = new TurnView(turn, this._actions);
      this._views.push(view);
      this._log.append(view.element);
    }
    this._update(this._views);
  }

  /** Show turns as they are now. The log is measured once: that lays it out, which takes long where it is long. */
  _update(views) {
    const isNearEnd = this._log.scrollHeight - this._log.scrollTop - this._log.clientHeight < NEAR_END_PX;
    const isBusy = this.isRunning;
    for (const view of views) {
      const isLast = view === this._views.at(-1);
      view.update({ isLast, isRunning: isBusy && isLast, isBusy });
    }
    if (isNearEnd) this._log.scrollTop = this._log.scrollHeight;
  }
}

function newTurn(isJson) {
  return {
    role: "assistant",
    text: "",
    reasoning: "",
    calls: [],
    isJson,
    error: null,
    note: null,
    finish: null,
    stats: null,
  };
}

/** Add what an event brings to the turn. A call's id and name come first, its arguments part by part. */
function addDelta(turn, delta) {
  turn.text += delta.content ?? "";
  turn.reasoning += delta.reasoning_content ?? "";
  for (const { index, id, function: called } of delta.tool_calls ?? []) {
    turn.calls[index] ??= { id, name: "", arguments: "" };
    turn.calls[index].name += called.name ?? "";
    turn.calls[index].arguments += called.arguments ?? "";
  }
}
