// The playground: the parts of the page, and what each tells the others.

import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { ConversationList } from "./conversation_list.js";
import { forget, keep, newConversation, watchConversations } from "./conversations.js";
import { button, byId, element } from "./dom.js";
import { Drawer } from "./drawer.js";
import { askForKey, keyFields } from "./key.js";
import { limitsOf } from "./parameters.js";
import { RequestBar } from "./request_bar.js";
import { ServerStatus, shortName } from "./server_status.js";
import { NO_SETTINGS, Settings } from "./settings.js";
import { showShortcuts } from "./shortcuts.js";
import { load, save } from "./storage.js";
import { Tabs } from "./tabs.js";

const SUGGESTIONS = [
  "Explain how a hash map works, with a small example.",
  "Write a Python function that merges two sorted lists.",
  "A haiku about rain on a tin roof.",
  "Compare tea and coffee in a table.",
];
const NOTICE_MS = 8000;

const message = byId("message");
const settings = new Settings(onSettings, onFault);
const status = new ServerStatus(byId("server"), onServer);
const model = () => settings.model || status.model;
const chat = new Chat({ log: byId("log"), settings, model, onChange: onTurns, keep: keepIfKnown, onFailure });
const shared = { settings, model, onChange: showRequest, onFailure };
const completion = new Completion(
  byId("panel-completion"),
  { mode: "completion", prompt: "Prompt", act: "Complete", result: "Completion" },
  shared,
);
const infill = new Completion(
  byId("panel-infill"),
  { mode: "infill", prompt: "Before", suffix: "After", act: "Fill in", result: "Middle" },
  shared,
);
const list = new ConversationList(byId("conversation-list"), {
  open,
  forget: forgetWithWayBack,
  isRunningIn: (conversation) => chat.isRunningIn(conversation),
});
const bar = new RequestBar(settings, currentRequest);
const tabs = new Tabs(document.querySelector("[role=tablist]"), onMode);
const conversationDrawer = new Drawer(byId("conversations"), byId("show-conversations"), 760);
const settingsDrawer = new Drawer(byId("settings"), byId("show-settings"), 1080);
let noticeTimer = 0;

function writer() {
  return { chat, completion, infill }[tabs.mode];
}

function currentRequest(values) {
  return tabs.mode === "chat" ? chat.request(message.value, values) : writer().request(values);
}

function showRequest() {
  bar.show();
}

// ---- conversations ----

function keepIfKnown(conversation) {
  if (!list.conversations.includes(conversation) || keep(conversation)) return;
  notify("This browser keeps no more: delete conversations to keep this one.");
}

function open(conversation) {
  if (tabs.mode !== "chat") tabs.choose("chat");
  keepDraft();
  list.add(conversation);
  chat.open(conversation);
  settings.raw = conversation.settings;
  message.value = conversation.draft ?? "";
  if (conversationDrawer.isOver) conversationDrawer.set(false);
  showState();
  message.focus();
}

/** Begin another conversation, with the settings of this one. */
function begin() {
  list.conversations = list.conversations.filter(({ turns }) => turns.length > 0);
  open(newConversation(chat.conversation === null ? (load("settings") ?? NO_SETTINGS) : settings.raw));
}

function forgetWithWayBack(conversation) {
  chat.stop(conversation);
  list.remove(conversation);
  forget(conversation);
  if (conversation === chat.conversation) begin();
  showState();
  notify("The conversation is deleted.", "Undo", () => {
    list.add(conversation);
    list.conversations.sort((one, other) => other.changed - one.changed);
    keepIfKnown(conversation);
    open(conversation);
  });
}

/**
 * Another tab has gone on with a conversation, or forgotten it: what is here would undo that when it is kept. Where
 * both have gone on from an older state each tab stays with its own.
 */
function takeOver(id, kept) {
  const own = list.conversations.find((one) => one.id === id) ?? null;
  if (own !== null && (chat.isRunningIn(own) || (kept !== null && kept.before !== own.changed))) return;
  if (kept === null) list.remove(own);
  else if (own === null) list.add(kept);
  else Object.assign(own, { changed: kept.changed, turns: kept.turns });
  if (own === chat.conversation) openAgain(kept === null);
  showState();
}

/** Show what has become of the conversation that is open; what was begun in the message stays. */
function openAgain(isForgotten) {
  const draft = message.value;
  if (isForgotten) begin();
  else chat.open(chat.conversation);
  message.value = draft;
}

function keepDraft() {
  const { conversation } = chat;
  if (conversation === null) return;
  conversation.draft = message.value;
  conversation.settings = settings.raw;
  save("settings", conversation.settings);
  if (conversation.turns.length > 0) keepIfKnown(conversation);
}

// ---- what happens ----

function onSettings() {
  keepDraft();
  showRequest();
}

function onTurns(conversation) {
  keepIfKnown(conversation);
  showState();
}

function onServer() {
  settings.offer(status.models);
  byId("welcome-model").textContent = shortName(model());
  applyLimits();
  showRequest();
}

function onMode() {
  applyLimits();
  showRequest();
}

function onFault(error) {
  settingsDrawer.set(true);
  error.show();
}

function onFailure(error) {
  if (error.isGone) status.check();
  if (error.status !== 401) return;
  settingsDrawer.set(true);
  askForKey();
}

function applyLimits() {
  settings.limitTo(limitsOf(tabs.mode, status.description, status.info), tabs.mode);
}

function showState() {
  const { isRunning, conversation } = chat;
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  byId("welcome").hidden = conversation.turns.length > 0;
  list.show(conversation);
  showRequest();
}

function send(text = message.value) {
  if (text.trim() === "" || chat.isRunning || !chat.send(text)) return;
  message.value = "";
  keepDraft();
  message.focus();
}

/** Say something at the bottom of the page for a while, with something that can be done about it. */
function notify(words, label, act) {
  const notice = byId("notice");
  const hide = () => (notice.hidden = true);
  const acts = label === undefined ? [] : [button(label, () => (hide(), act()), { class: "small" })];
  notice.replaceChildren(element("span", {}, words), ...acts);
  notice.hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(hide, NOTICE_MS);
}

function onEscape() {
  const over = [settingsDrawer, conversationDrawer].find((drawer) => drawer.isOver);
  if (over === undefined) writer().stop();
  else over.set(false);
}

// ---- the page ----

message.addEventListener("input", showRequest);
message.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // Enter ends a word of an input method
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && message.value === "") {
    event.preventDefault();
    chat.editLast();
  }
});
byId("send").addEventListener("click", () => send());
byId("stop").addEventListener("click", () => chat.stop());
byId("new-conversation").addEventListener("click", begin);
byId("suggestions").append(...SUGGESTIONS.map((text) => button(text, () => send(text))));
byId("key").append(keyFields(showRequest));
addEventListener("pagehide", keepDraft);
watchConversations(takeOver);
showShortcuts({
  Escape: { words: "stop the model, or put the settings away where they lie over the page", act: onEscape },
  "Alt+Shift+N": { words: "new conversation", act: begin },
  "Alt+Shift+S": { words: "show or hide the settings", act: () => byId("show-settings").click() },
  "Alt+Shift+M": {
    words: "go to the message, or the prompt",
    act: () => (tabs.mode === "chat" ? message : writer()).focus(),
  },
  "Alt+Shift+1": { words: "chat", act: () => tabs.choose("chat") },
  "Alt+Shift+2": { words: "completion", act: () => tabs.choose("completion") },
  "Alt+Shift+3": { words: "fill in the middle", act: () => tabs.choose("infill") },
});
applyLimits();
if (list.conversations.length > 0) open(list.conversations[0]);
else begin();
