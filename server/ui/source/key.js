// The API key: in memory, and in the browser's storage only if the person wants it there.

import { byId, element } from "./dom.js";
import { load, save } from "./storage.js";

const PLACE = "key";
let key = load(PLACE) ?? "";

/** The headers that show the key, if there is one. */
export function authorization() {
  return key === "" ? {} : { authorization: `Bearer ${key}` };
}

export function hasKey() {
  return key !== "";
}

/** The field for the key, and the box that says whether to remember it. `onChange` is called when the key changes. */
export function keyFields(onChange) {
  // Not a password field, whose content browsers offer to keep; the style hides it.
  const field = element("input", {
    id: "api-key",
    type: "text",
    class: "secret",
    autocomplete: "off",
    spellcheck: "false",
  });
  const box = element("input", { id: "remember-key", type: "checkbox", checked: hasKey() });
  field.value = key;
  const keep = () => {
    key = field.value.trim();
    save(PLACE, box.checked && key !== "" ? key : null);
    // No header can carry anything else.
    field.setCustomValidity(/[^\x21-\x7e]/.test(key) ? "A key has no spaces and only ASCII characters." : "");
    if (!field.reportValidity()) key = "";
    onChange();
  };
  field.addEventListener("change", keep);
  box.addEventListener("change", keep);
  return element(
    "div",
    { class: "field" },
    element("label", { for: "api-key" }, "API key"),
    field,
    element("label", { class: "check" }, box, "Remember it in this browser"),
  );
}

/** Bring the person to the field. */
export function askForKey() {
  byId("api-key").focus();
}
