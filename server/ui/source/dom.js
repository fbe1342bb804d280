// Elements out of names, attributes and children. A text stays a text: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `on` maps events to listeners; an attribute that is true has no value, one that is false or null is none.
 * Children are elements, texts, null, or lists of them.
 */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An element of a drawing, made as others are. */
export function svgElement(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, { on = {}, ...attributes }, children) {
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  for (const [key, value] of Object.entries(attributes)) setAttribute(node, key, value);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set an attribute, or take it away if the value is false or null. */
export function setAttribute(target, key, value) {
  if (value === false || value === null || value === undefined) target.removeAttribute(key);
  else target.setAttribute(key, value === true ? "" : String(value));
}

/** A button that is no form's. */
export function button(label, act, attributes = {}) {
  return element("button", { type: "button", on: { click: act }, ...attributes }, label);
}

export function byId(id) {
  return document.getElementById(id);
}
