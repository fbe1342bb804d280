// The conversations: kept in this browser, each under a name of its own, so that two tabs do not undo each other's.

import { load, names, save, watchOtherTabs } from "./storage.js";

const PLACE = "conversation/";
const MAX_TITLE = 60;

/**
 * A new conversation. `changed` is the time of its turns, and `before` that of the turns that they were made from.
 * Turns are
 * `{role: "user", text}`,
 * `{role: "assistant", text, reasoning, calls: [{id, name, arguments}], isJson, error, note, finish, stats}` and
 * `{role: "tool", id, name, text}`.
 */
export function newConversation(settings) {
  return {
    id: crypto.getRandomValues(new Uint32Array(2)).join("-"),
    changed: Date.now(),
    turns: [],
    draft: "",
    settings,
  };
}

/** All of them, the one that changed last first. What is not ours or damaged is left out. */
export function allConversations() {
  return names(PLACE)
    .map(load)
    .filter(isConversation)
    .sort((one, other) => other.changed - one.changed);
}

function isConversation(one) {
  return typeof one?.id === "string" && Array.isArray(one.turns) && one.turns.every(isTurn);
}

function isTurn(turn) {
  const { role, text, reasoning, calls } = turn ?? {};
  if (typeof text !== "string" || !["user", "assistant", "tool"].includes(role)) return false;
  if (role !== "assistant") return true;
  return (
    typeof reasoning === "string" && Array.isArray(calls) && calls.every((call) => typeof call?.arguments === "string")
  );
}

/** Call `act` with an id when another tab keeps a conversation, which comes with it, or forgets it: then null does. */
export function watchConversations(act) {
  watchOtherTabs(PLACE, (name, kept) => {
    if (kept === null || isConversation(kept)) act(name.slice(PLACE.length), kept);
  });
}

/** Keep a conversation. Returns whether the browser took it. */
export function keep(conversation) {
  return save(PLACE + conversation.id, conversation);
}

export function forget(conversation) {
  save(PLACE + conversation.id, null);
}

/** The beginning of what was asked first. */
export function titleOf(conversation) {
  const first = conversation.turns.find((turn) => turn.role === "user");
  const line = first?.text.trim().split("\n")[0] ?? "";
  if (line.length <= MAX_TITLE) return line || "New conversation";
  return `${line.slice(0, MAX_TITLE).replace(/[\ud800-\udbff]$/, "")}…`; // not in the middle of a character
}
