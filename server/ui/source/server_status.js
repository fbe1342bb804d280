// What is known of the server: its model, its limits, and whether it is there. Asks again until it is.

import { getJson, reasonToWait } from "./api.js";
import { element } from "./dom.js";

const CALM_MS = 15_000;
const URGENT_MS = 2_000;

/** A model's name for people: the last part of a folder's path, any other name as it is. */
export function shortName(model) {
  return model.startsWith("/") ? model.replace(/\/+$/, "").split("/").at(-1) || model : model;
}

export class ServerStatus {
  /** `onChange` is called when the server has said what it is, for the first time or after it was gone. */
  constructor(line, onChange) {
    this._line = line;
    this._onChange = onChange;
    this._isThere = false;
    this._isAsking = false;
    this.info = null;
    this.description = null;
    this.models = [];
    this._say("is-waiting", "Asking the server…");
    this._ask();
    document.addEventListener("visibilitychange", () => document.hidden || this.check());
  }

  /** The name that requests give the model. */
  get model() {
    return this.models[0] ?? this.info?.model_id ?? "tgi";
  }

  /** Ask now, as something has failed. */
  check() {
    if (!this._isAsking) this._ask();
  }

  async _ask() {
    clearTimeout(this._timer);
    this._isAsking = true;
    const isResting = document.hidden && this._isThere;
    const reason = isResting ? null : await reasonToWait();
    if (reason !== null) {
      this._isThere = false;
      this._say("is-gone", reason);
    } else if (!this._isThere) {
      await this._learn();
    }
    this._isAsking = false;
    this._timer = setTimeout(() => this._ask(), this._isThere ? CALM_MS : URGENT_MS);
  }

  async _learn() {
    try {
      const [info, models, description] = await Promise.all(["info", "v1/models", "openapi.json"].map(getJson));
      Object.assign(this, { info, description, models: models.data.map(({ id }) => id), _isThere: true });
    } catch {
      this._isThere = false;
      return;
    }
    this._say("is-there", `${shortName(this.model)} · ready`);
    this._onChange();
  }

  _say(kind, words) {
    if (this._line.textContent === words) return;
    this._line.className = `server ${kind}`;
    this._line.replaceChildren(element("span", { class: "dot" }), element("span", { class: "words" }, words));
  }
}
