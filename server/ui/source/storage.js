// What a browser keeps for this origin. A browser that keeps nothing is as good, until the page is left.

import { parsed } from "./json.js";

const PREFIX = "pytgi/";

/** The value under a name, or null. */
export function load(name) {
  try {
    return parsed(localStorage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

/** Keep a value; null is forgotten. Returns whether the browser took it. */
export function save(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Call `act(name, value)` when another tab keeps a value whose name begins with `start`, or forgets it: null. */
export function watchOtherTabs(start, act) {
  addEventListener("storage", ({ key, newValue }) => {
    if (key?.startsWith(PREFIX + start)) act(key.slice(PREFIX.length), parsed(newValue));
  });
}

/** The names that begin with `start`. */
export function names(start) {
  try {
    const all = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX + start));
    return all.map((name) => name.slice(PREFIX.length));
  } catch {
    return [];
  }
}
