// The request that the page would send now: shown, and copied as a program.

import { addressOf } from "./api.js";
import { copyButton } from "./copy.js";
import { byId, element } from "./dom.js";
import { hasKey } from "./key.js";
import { codeBlock } from "./markdown_view.js";
import { LANGUAGES } from "./snippets.js";

const FAULT = "A setting is wrong: there is no request.";

export class RequestBar {
  /** `settings` are those on the page, `request(settings)` makes the request. */
  constructor(settings, request) {
    this._settings = settings;
    this._request = request;
    const buttons = LANGUAGES.map(([name, write]) =>
      copyButton(name, () => this._program(write), { "aria-label": `Copy as ${name}`, class: "small" }),
    );
    byId("copy-buttons").append(...buttons);
    byId("request").addEventListener("toggle", () => this.show());
  }

  _program(write) {
    const settings = this._settings.read();
    return settings === null ? null : write(this._request(settings), addressOf(""), hasKey());
  }

  /** Show the request as it is now, if the person looks at it. */
  show() {
    if (!byId("request").open) return;
    const settings = this._settings.readQuietly();
    const parts = settings === null ? [element("p", { class: "fault" }, FAULT)] : partsOf(this._request(settings));
    byId("request-text").replaceChildren(...parts);
  }
}

function partsOf({ path, body }) {
  const head = element("p", { class: "code" }, `POST ${addressOf(path)}`);
  return [head, codeBlock(JSON.stringify(body, null, 2), "json")];
}
