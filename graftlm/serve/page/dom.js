// Elements, made and never parsed: every string becomes a text node or an attribute.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Properties: `on` {event: handler}, `data` {name: value}, `class`; `true` is a bare attribute. */
export function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same of an SVG element. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, { on = {}, data = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  for (const [name, value] of Object.entries(data)) element.dataset[name] = value;
  for (const [name, handler] of Object.entries(on)) element.addEventListener(name, handler);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button with a text; `properties.key` names it, so that the focus finds it again after the page is drawn anew. */
export function button(text, click, { key, ...properties } = {}) {
  return el("button", { type: "button", data: key ? { key } : {}, on: { click }, ...properties }, text);
}

export const byId = (id) => document.getElementById(id);

/** Replace what is in an element. The focus goes back to the control with the same key, to one beside it where that
 *  is disabled now, or else to the field for messages: it is never lost. */
export function redraw(element, children) {
  const had = element.contains(document.activeElement) ? document.activeElement : null;
  element.replaceChildren(...children);
  if (!had || element.contains(document.activeElement)) return;
  const same = [...element.querySelectorAll("[data-key]")].find((each) => each.dataset.key === had.dataset.key);
  const next = same?.disabled ? same.parentElement.querySelector("button:not(:disabled)") : same;
  (next ?? byId("say")).focus({ preventScroll: true });
}

/** Tell a screen reader, politely: one message at a time, and never a token at a time. */
export function announce(text) {
  byId("status").textContent = text;
}

/** Give the browser a file to save. */
export function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
