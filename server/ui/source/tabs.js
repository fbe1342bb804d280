// Tabs: one panel is in sight. Arrows move between them, as in every list of tabs.

import { byId } from "./dom.js";

export class Tabs {
  /** `onChange(mode)` is called with the `data-mode` of the tab that is chosen. */
  constructor(list, onChange) {
    this._tabs = [...list.querySelectorAll("[role=tab]")];
    this._onChange = onChange;
    this.mode = this._tabs[0].dataset.mode;
    for (const tab of this._tabs) tab.addEventListener("click", () => this.choose(tab.dataset.mode));
    list.addEventListener("keydown", (event) => this._onKey(event));
  }

  choose(mode) {
    this.mode = mode;
    for (const tab of this._tabs) {
      const isChosen = tab.dataset.mode === mode;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !isChosen;
    }
    this._onChange(mode);
  }

  _onKey(event) {
    const at = this._tabs.findIndex((tab) => tab.dataset.mode === this.mode);
    const count = this._tabs.length;
    const places = { ArrowRight: (at + 1) % count, ArrowLeft: (at + count - 1) % count, Home: 0, End: count - 1 };
    if (!(event.key in places)) return;
    event.preventDefault();
    const tab = this._tabs[places[event.key]];
    this.choose(tab.dataset.mode);
    tab.focus();
  }
}
