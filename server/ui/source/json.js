// JSON of which nobody knows whether it is any.

/** What a text says, or null if it is no JSON. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
