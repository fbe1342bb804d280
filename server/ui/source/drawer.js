// A column that can be put away. Where there is little room it lies over the page, and any other place puts it away.

import { load, save } from "./storage.js";

export class Drawer {
  /** `minWidth` is the page's width in pixels from which the column stands beside the rest. */
  constructor(column, toggle, minWidth) {
    this._column = column;
    this._toggle = toggle;
    this._place = `is-open/${column.id}`;
    this._wide = matchMedia(`(min-width: ${minWidth}px)`);
    this._wide.addEventListener("change", () => this._fit());
    toggle.addEventListener("click", () => this.set(this._column.hidden));
    document.addEventListener("pointerdown", ({ target }) => this.isOver && !this._holds(target) && this.set(false));
    this._fit();
  }

  /** Whether it lies over the page now. */
  get isOver() {
    return !this._wide.matches && !this._column.hidden;
  }

  set(isOpen) {
    this._column.hidden = !isOpen;
    this._toggle.setAttribute("aria-expanded", String(isOpen));
    if (this._wide.matches) save(this._place, isOpen);
  }

  _holds(target) {
    return this._column.contains(target) || this._toggle.contains(target);
  }

  _fit() {
    this.set(this._wide.matches && load(this._place) !== false);
  }
}
