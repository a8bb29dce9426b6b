// Which models answer, and how tokens are chosen. Kept on this machine (localStorage), without conversations.

import { byId, el } from "./dom.js";

const KEPT = "graft-settings";
export const COLUMNS = 3;

const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 100, step: "any", placeholder: "1" }],
  ["top_p", "Top-p", { min: 0, max: 1, step: "any", placeholder: "1" }],
  ["top_k", "Top-k", { min: 0, step: 1, placeholder: "off" }],
  ["min_p", "Min-p", { min: 0, max: 1, step: "any", placeholder: "0" }],
  ["max_tokens", "Max tokens", { min: 1, step: 1, placeholder: "auto" }],
  ["seed", "Seed", { step: 1, placeholder: "random" }],
];

export class Settings {
  /** `available`: entries of /v1/models, the base first. `changed` is called when the models change. */
  constructor(available, changed) {
    this.available = available.map((model) => model.id);
    this.changed = changed;
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    this.system = kept.system ?? "";
    this.sampling = kept.sampling ?? {};
    const models = (kept.models ?? []).filter((model) => this.available.includes(model));
    this.models = models.length ? models : this.available.slice(0, 2);
  }

  #keep() {
    const { models, system, sampling } = this;
    localStorage.setItem(KEPT, JSON.stringify({ models, system, sampling }));
  }

  /** The choice of a model for each column. */
  columns() {
    const choice = (i) => {
      const none = i > 0 && el("option", { value: "" }, "none");
      const options = this.available.map((id) => el("option", { value: id, selected: this.models[i] === id }, id));
      const name = i === 0 ? "Model" : `Compared with`;
      const change = (event) => this.#choose(i, event.target.value);
      return el("label", {}, name, el("select", { data: { key: `model-${i}` }, on: { change } }, none, options));
    };
    // One choice more than there are columns, where there may be another.
    const shown = Math.min(COLUMNS, this.models.length + 1);
    return Array.from({ length: this.available.length > 1 ? shown : 1 }, (_, i) => choice(i));
  }

  #choose(column, model) {
    if (model) this.models[column] = model;
    else this.models.splice(column, 1);
    this.#keep();
    this.changed();
  }

  /** The panel of the sampling settings, followed by what else belongs there. */
  draw(...more) {
    const input = (event) => {
      this.system = event.target.value;
      this.#keep();
    };
    const system = el("textarea", { id: "system", rows: 4, on: { input } });
    system.value = this.system;
    byId("settings-body").replaceChildren(
      el("label", { for: "system" }, "System prompt"),
      system,
      el("div", { class: "fields" }, ...FIELDS.map((field) => this.#field(...field))),
      el("p", { class: "hint" }, "An empty field is left to the server. With a seed, all columns draw alike."),
      ...more,
    );
  }

  #field(name, label, properties) {
    const input = (event) => {
      const { value, validity, valueAsNumber } = event.target;
      if (value !== "" && validity.valid) this.sampling[name] = valueAsNumber;
      else delete this.sampling[name];
      event.target.toggleAttribute("aria-invalid", !validity.valid);
      this.#keep();
    };
    const value = this.sampling[name];
    return el("label", {}, label, el("input", { type: "number", name, value, on: { input }, ...properties }));
  }
}
