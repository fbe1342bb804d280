// A field of the settings: its label, its control, its limits, and the reason why its value is none.

import { element, setAttribute } from "./dom.js";
import { rangeOf, READERS } from "./parameters.js";

const LONG_KINDS = ["lines", "object", "integers"];

/** A value that a field cannot have. The field has said why; `show` brings the person there. */
export class FieldError extends Error {
  constructor(words, control) {
    super(words);
    this.control = control;
  }

  show() {
    for (let box = this.control.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    this.control.focus();
  }
}

/** The control with its fault beside it. `read` makes a value of the control's text, or raises Error. */
export class CheckedControl {
  constructor(control, read) {
    this.control = control;
    this.fault = element("span", { class: "fault", id: `${control.id}-fault`, role: "alert", hidden: true });
    this._read = read;
    setAttribute(control, "aria-describedby", `${control.id}-hint ${control.id}-fault`);
    control.addEventListener("input", () => this.tell(null));
  }

  /** The value. Raises FieldError. */
  read() {
    try {
      const value = this._read(this.control.value, this.control);
      this.tell(null);
      return value;
    } catch (error) {
      this.tell(error.message);
      throw new FieldError(error.message, this.control);
    }
  }

  tell(words) {
    this.fault.hidden = words === null;
    this.fault.textContent = words ?? "";
    setAttribute(this.control, "aria-invalid", words === null ? null : "true");
  }
}

/** The field of a sampling parameter. Its `raw` value is what the person typed, or whether the box is ticked. */
export class ParameterField {
  constructor(parameter) {
    this.name = parameter.name;
    this._kind = parameter.kind;
    this._hintText = parameter.hint ?? "";
    this._limit = {};
    this._isOnByDefault = parameter.isOnByDefault ?? false;
    const id = `parameter-${parameter.name}`;
    this._control = this._makeControl(id, parameter);
    this._hint = element("span", { class: "hint", id: `${id}-hint` }, this._hintText);
    if (parameter.kind === "box") {
      this.element = element("label", { class: "check" }, this._control, parameter.name);
    } else {
      this._checked = new CheckedControl(this._control, (text) => this._valueOf(text));
      const parts = [element("label", { for: id }, parameter.name), this._control, this._hint, this._checked.fault];
      const isWide = LONG_KINDS.includes(parameter.kind) || parameter.isLong;
      this.element = element("div", { class: isWide ? "field wide" : "field" }, parts);
    }
  }

  _makeControl(id, { kind, step, placeholder = "default" }) {
    if (kind === "box") return element("input", { id, type: "checkbox" });
    if (kind === "lines" || kind === "object") {
      return element("textarea", { id, rows: "2", spellcheck: "false", class: "code" });
    }
    if (kind === "number" || kind === "integer") {
      return element("input", { id, type: "number", step: step ?? 1, placeholder, inputmode: "decimal" });
    }
    return element("input", { id, type: "text", placeholder: "default", spellcheck: "false", autocomplete: "off" });
  }

  /** Follow what the server says of a mode: null if it has said nothing, else name -> limit. */
  limitTo(limits) {
    this.element.hidden = limits !== null && limits[this.name] === undefined;
    this._limit = limits?.[this.name] ?? {};
    if (this._kind === "number" || this._kind === "integer") {
      setAttribute(this._control, "min", this._limit.min);
      setAttribute(this._control, "max", this._limit.max);
      const parts = [this._hintText, rangeOf(this._limit)];
      this._hint.textContent = parts.filter((part) => part !== "").join(" · ");
    }
  }

  get raw() {
    if (this._kind === "box") return this._control.checked === this._fallback ? undefined : this._control.checked;
    return this._control.value === "" ? undefined : this._control.value;
  }

  set raw(value) {
    if (this._kind === "box") this._control.checked = value ?? this._fallback;
    else this._control.value = value ?? "";
    this._checked?.tell(null);
  }

  get _fallback() {
    return this._limit.fallback ?? this._isOnByDefault;
  }

  /** The value for a request, or undefined. Raises FieldError. */
  read() {
    if (this.element.hidden) return undefined;
    return this._kind === "box" ? this.raw : this._checked.read();
  }

  _valueOf(text) {
    if (this._control.validity.badInput) throw new Error("This is not a number.");
    const value = READERS[this._kind](text);
    if (typeof value === "number") this._check(value);
    return value;
  }

  _check(value) {
    const { min, max, isMinExcluded } = this._limit;
    const isLow = min !== undefined && (value < min || (isMinExcluded && value === min));
    if (isLow || (max !== undefined && value > max)) throw new Error(`It must be ${rangeOf(this._limit)}.`);
    if (this._kind === "integer" && !Number.isInteger(value)) throw new Error("It must be a whole number.");
  }
}
