// Rows of training data: what was counted, what was found, and rows token by token with what the loss counts.

import { call } from "./api.js";
import { announce, button, byId, el } from "./dom.js";
import { grid } from "./runs.js";

export class Data {
  #found;

  async refresh() {
    if (this.#found) return;
    byId("data").replaceChildren(el("p", { role: "status" }, "Checking the rows ..."));
    try {
      this.#found = await call("/data/report");
      this.#draw();
    } catch (error) {
      byId("data").replaceChildren(el("p", { class: "error" }, error.message));
    }
  }

  #draw() {
    const { source, figures, findings } = this.#found;
    const kinds = findings.filter((finding) => finding.count);
    byId("data").replaceChildren(
      el("h2", {}, source),
      grid(["figure", "value"], figures),
      el("h3", {}, "Findings"),
      kinds.length
        ? grid(["found", "rows", "why it matters", "where"], kinds.map((each) => [each.kind, each.count, each.why, each.rows.join(", ")]))
        : el("p", {}, "Nothing suspicious was found."),
      el("h3", {}, "Rows, token by token"),
      el("p", { class: "legend" }, el("span", { class: "supervised" }, "underlined"), "The loss counts these tokens, and no others."),
      el("div", { id: "data-row" }),
    );
    this.#show(0);
  }

  #show(number) {
    const { rows } = this.#found;
    const row = rows[number];
    if (!row) return;
    const step = (by, text) => button(text, () => this.#show(number + by), { key: text, disabled: !(number + by in rows) });
    const had = document.activeElement?.dataset.key;
    byId("data-row").replaceChildren(
      el("div", { class: "row" }, step(-1, "Previous row"), step(1, "Next row"), el("span", {}, `${number + 1} of ${rows.length}: ${row.where}`)),
      el("p", { class: "tokens", tabindex: 0 }, ...runsOf(row.tokens).map(({ text, supervised }) =>
        supervised ? el("span", { class: "supervised" }, text) : el("span", {}, text))),
    );
    byId("data-row").querySelector(`[data-key="${had}"]:not(:disabled)`)?.focus();
    announce(`Row ${number + 1} of ${rows.length}`);
  }
}

/** Neighboring tokens that the loss treats alike, as one text: [{text, supervised}]. */
export function runsOf(tokens) {
  const found = [];
  for (const { text, weight } of tokens) {
    const supervised = weight > 0;
    if (found.at(-1)?.supervised === supervised) found.at(-1).text += text;
    else found.push({ text, supervised });
  }
  return found;
}
