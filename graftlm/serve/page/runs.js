// Runs of a folder: a table, and of one of them its curve, its held-out figures and its recipe, beside another's.

import { call } from "./api.js";
import { announce, button, byId, el, svg } from "./dom.js";

const NAMES = {
  steps: "steps", train_loss: "train loss", base_loss: "base loss", tuned_loss: "tuned loss", base_rouge_l: "base ROUGE-L",
  tuned_rouge_l: "tuned ROUGE-L", tuned_objective: "objective", tuned_accuracy: "accuracy", tuned_reward: "reward",
  tokens_per_s: "tokens/s", peak_rss_gib: "peak GiB", wall_s: "seconds", loss_nats: "loss, nats a token", rouge_l: "ROUGE-L",
};
const named = (name) => NAMES[name] ?? name;

export class Runs {
  #list;

  constructor(list) {
    this.#list = list;
  }

  async refresh() {
    this.#list = await call("/runs");
    this.#draw([]);
  }

  #draw(details) {
    const { runs, damaged } = this.#list;
    const broken = Object.entries(damaged).map(([name, why]) => el("li", {}, `${name}: ${why}`));
    byId("runs").replaceChildren(
      el("h2", {}, `${runs.length} runs`),
      runs.length ? this.#table() : el("p", {}, "A run is a folder with a metrics.jsonl; there is none here yet."),
      ...(broken.length ? [el("h3", {}, "Cannot be read"), el("ul", {}, ...broken)] : []),
      el("div", { id: "run", tabindex: -1 }, ...details),
    );
  }

  #table() {
    const { runs } = this.#list;
    // What differs, and the figures, each where some run has it.
    const columns = Object.keys(runs[0]).filter((name) => name !== "run" && runs.some((run) => run[name] !== null));
    const head = el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, named(name))));
    const rows = runs.map((run) => el("tr", {}, ...columns.map((name) =>
      name === "name" ? el("th", { scope: "row" }, button(run.name, () => this.#open([run.name]))) : el("td", {}, shownValue(run[name])))));
    return el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Runs" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  }

  async #open(names) {
    try {
      const details = await Promise.all(names.map((name) => call(`/runs/${name.split("/").map(encodeURIComponent).join("/")}`)));
      this.#draw(this.#detail(details));
      byId("run").focus();
    } catch (error) {
      announce(error.message);
      this.#draw([el("p", { class: "error" }, error.message)]);
    }
  }

  #detail([run, other]) {
    const change = (event) => this.#open([run.name, event.target.value].filter(Boolean));
    const options = this.#list.runs.filter((each) => each.name !== run.name)
      .map((each) => el("option", { value: each.name, selected: each.name === other?.name }, each.name));
    const select = el("select", { on: { change } }, el("option", { value: "" }, "none"), options);
    const pairs = heldOut(run.held_out);
    return [
      el("h2", {}, run.name),
      options.length > 0 && el("label", { class: "inline" }, "Compared with ", select),
      el("h3", {}, "Loss"),
      chart([run, other].filter(Boolean), Math.min(760, byId("run").clientWidth)),
      el("h3", {}, "Held-out rows"),
      pairs.length ? grid(["", "base", "tuned"], pairs) : el("p", {}, "Nothing was measured."),
      el("h3", {}, other ? "What differs in the recipes" : "Recipe"),
      other
        ? grid(["key", run.name, other.name], differences(run.recipe, other.recipe))
        : grid(["key", "value"], Object.entries(run.recipe)),
    ].filter(Boolean);
  }
}

export const grid = (head, rows) =>
  el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": head.filter(Boolean).join(", ") },
    el("table", {}, el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows.map(([first, ...rest]) =>
        el("tr", {}, el("th", { scope: "row" }, first), ...rest.map((value) => el("td", {}, shownValue(value))))))));

/** A value as a table shows it. */
export function shownValue(value) {
  if (value === null || value === undefined) return "\u2013";
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** The keys that two recipes do not share the value of: [key, its value, the other's]. */
export function differences(one, other) {
  const keys = [...new Set([...Object.keys(one), ...Object.keys(other)])];
  return keys.filter((key) => JSON.stringify(one[key]) !== JSON.stringify(other[key])).map((key) => [key, one[key], other[key]]);
}

/** The figures that were measured of the base and of the tuned model: [name, base, tuned]. */
export function heldOut(tree, name = "") {
  if (tree === null || typeof tree !== "object") return [];
  if ("base" in tree && "tuned" in tree) {
    const { base, tuned } = tree;
    if (base === null || typeof base !== "object") return base === null && tuned === null ? [] : [[name, base, tuned]];
    return Object.keys(base).filter((key) => typeof base[key] === "number").map((key) => [`${name} ${key}`, base[key], tuned?.[key]]);
  }
  return Object.entries(tree).flatMap(([key, value]) => heldOut(value, `${name} ${named(key)}`.trim()));
}

// The curve -----------------------------------------------------------------------------------------------------------

const HEIGHT = 260;
const EDGE = { left: 52, right: 12, top: 10, bottom: 34 };

/** Round values that span a range: about `count` of them. */
export function ticks(low, high, count = 5) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let i = first; i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** The loss of runs over their steps: each thin as it was, thick as smoothed. The second run is dashed. */
function chart(runs, width) {
  const points = runs.flatMap((run) => run.curve);
  if (!points.length) return el("p", {}, "No step yet.");
  const steps = points.map(([step]) => step);
  const losses = points.flatMap(([, loss, mean]) => [loss, mean]);
  const [left, right] = [Math.min(...steps), Math.max(...steps)];
  const [low, high] = [Math.min(0, ...losses), Math.max(...losses)];
  const x = (step) => EDGE.left + ((step - left) / (right - left || 1)) * (width - EDGE.left - EDGE.right);
  const y = (loss) => HEIGHT - EDGE.bottom - ((loss - low) / (high - low || 1)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const line = (run, place, name) => svg("polyline", { class: name, points: run.curve.map((point) => `${x(point[0]).toFixed(1)},${y(point[place]).toFixed(1)}`).join(" ") });
  const label = runs.map((run) => run.curve.length ? `${run.name}: loss ${shownValue(run.curve[0][2])} at first, ${shownValue(run.curve.at(-1)[2])} at last, over ${run.curve.at(-1)[0]} steps` : `${run.name}: no step`).join("; ");
  return el("figure", {},
    svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label },
      ...ticks(low, high).flatMap((at) => [
        svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(at), y2: y(at) }),
        svg("text", { x: EDGE.left - 8, y: y(at) + 4, "text-anchor": "end" }, shownValue(at))]),
      ...ticks(left, right, 6).map((at) => svg("text", { x: x(at), y: HEIGHT - EDGE.bottom + 20, "text-anchor": "middle" }, shownValue(at))),
      ...runs.flatMap((run, i) => [line(run, 1, `raw run-${i}`), line(run, 2, `mean run-${i}`)])),
    el("figcaption", {}, ...runs.map((run, i) => el("span", { class: `key run-${i}` }, run.name)), " loss by step, nats per supervised token; thick: the mean of a twentieth of the steps"));
}
