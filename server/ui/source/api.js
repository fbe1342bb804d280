// Requests to the server, and its refusals in words. Addresses are relative: a proxy may have put the server anywhere.

import { dataOf } from "./events.js";
import { parsed } from "./json.js";
import { authorization } from "./key.js";

const NO_ANSWER = "The server does not answer. It may have stopped, or the network is gone.";
const BROKEN_OFF = "The answer broke off: the server has stopped, or the network is gone.";
const STRANGE = "The answer is none of this API. Something between this page and the server may have written it.";
const NO_REASON = "The server gives no reason.";
export const KEY_REFUSED = "The server asks for an API key, and this one is missing or wrong.";
const WORDS_OF_STATUS = {
  401: KEY_REFUSED,
  404: "The server has no such route.",
  429: "The server is full. Try again in a moment.",
  503: "The server cannot answer now.",
};

/** A request that failed: the reason in words, the status if there was one, and whether the server is to be reached. */
export class RequestError extends Error {
  constructor(words, { status = null, isGone = false } = {}) {
    super(words);
    this.status = status;
    this.isGone = isGone;
  }
}

/** The whole address of a route; "." is that of the server. */
export function addressOf(path) {
  return new URL(path, document.baseURI).href;
}

/** The answer to a GET, as JSON. Raises RequestError. */
export async function getJson(path) {
  return (await ask(path, {})).json();
}

/** Null if the server can answer, else the reason in words: it says one itself while it starts. */
export async function reasonToWait() {
  try {
    const response = await fetch(addressOf("readyz"), { cache: "no-store" });
    return response.ok ? null : ((await response.json()).message ?? WORDS_OF_STATUS[503]);
  } catch {
    return NO_ANSWER;
  }
}

/**
 * The answer to a streaming request: the objects of its events as they come, and the places of the request's schemas
 * that the model is not held to, or null. Raises RequestError, also from the events.
 */
export async function openStream(path, body, signal) {
  const headers = { "content-type": "application/json", ...authorization() };
  const response = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  return { objects: objectsOf(response), leftOpen: response.headers.get("x-schema-left-open") };
}

async function* objectsOf(response) {
  try {
    for await (const data of dataOf(response.body)) {
      if (data === "[DONE]") return;
      yield objectOf(data);
    }
  } catch (error) {
    throw error instanceof TypeError ? new RequestError(BROKEN_OFF, { isGone: true }) : error;
  }
  throw new RequestError(BROKEN_OFF, { isGone: true });
}

/** The object of an event. Raises RequestError for an error, and for what is none of OpenAI's events. */
function objectOf(data) {
  const object = parsed(data);
  if (object?.error) throw new RequestError(wordsOf(object));
  if (!Array.isArray(object?.choices)) throw new RequestError(STRANGE);
  return object;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(addressOf(path), options);
  } catch (error) {
    throw error instanceof TypeError ? new RequestError(NO_ANSWER, { isGone: true }) : error;
  }
  if (!response.ok) throw new RequestError(await refusalOf(response), { status: response.status });
  return response;
}

async function refusalOf(response) {
  const text = await response.text().catch(() => ""); // it may have broken off
  const words = WORDS_OF_STATUS[response.status];
  if (words !== undefined && response.status !== 404) return words;
  const object = parsed(text);
  return object?.error ? wordsOf(object) : text || words || `The server answered ${response.status}.`;
}

/** The message of an error object, in OpenAI's shape or TGI's. */
function wordsOf({ error }) {
  return (typeof error === "string" ? error : error.message) || NO_REASON;
}
