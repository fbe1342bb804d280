// The list of the conversations, by which one is opened, begun, or forgotten.

import { allConversations, titleOf } from "./conversations.js";
import { button, element } from "./dom.js";

export class ConversationList {
  /** `open` and `forget` are called with a conversation, `isRunningIn` says whether the model writes in it. */
  constructor(list, { open, forget, isRunningIn }) {
    this._list = list;
    this._open = open;
    this._forget = forget;
    this._isRunningIn = isRunningIn;
    this.conversations = allConversations();
  }

  add(conversation) {
    if (!this.conversations.includes(conversation)) this.conversations.unshift(conversation);
  }

  remove(conversation) {
    this.conversations = this.conversations.filter((one) => one !== conversation);
  }

  /** Show the list, with the one that is open marked. Those without turns are not there yet. */
  show(current) {
    const shown = this.conversations.filter((one) => one.turns.length > 0);
    this._list.replaceChildren(...shown.map((conversation) => this._entry(conversation, conversation === current)));
  }

  _entry(conversation, isOpen) {
    const title = titleOf(conversation);
    const attributes = { class: "bare title", "aria-current": isOpen ? "true" : null };
    const opener = button(title, () => this._open(conversation), attributes);
    if (this._isRunningIn(conversation)) {
      opener.prepend(element("span", { class: "dot" }), element("span", { class: "for-readers" }, "Being written: "));
    }
    const label = `Delete ${title}`;
    const remover = button("×", () => this._forget(conversation), {
      class: "bare small remove",
      "aria-label": label,
      title: label,
    });
    return element("li", {}, opener, remover);
  }
}
