// What is drawn of a turn: the message of the user, and an answer that may still be coming.

import { describe, FULL, percent, shade, signed, total, visible } from "./compare.js";
import { announce, button, el, redraw } from "./dom.js";
import { draw } from "./markdown.js";

const COMPOSER = 120; // pixels at the foot of the window that the field for messages covers

/** The message of the user. `actions`: edit(text), show(turn). */
export function userMessage(turn, siblings, actions) {
  const place = siblings.indexOf(turn);
  const key = (name) => `turn-${turn.parent}-${name}`;
  const go = (step, name, label) =>
    button(label, () => actions.show(siblings[place + step]), {
      key: key(name), "aria-label": `${name} version`, disabled: !siblings[place + step],
    });
  const versions = siblings.length > 1 && [
    go(-1, "previous", "\u2039"),
    el("span", {}, `${place + 1} of ${siblings.length}`),
    go(1, "next", "\u203a"),
  ];
  const body = el("div", { class: "said" }, turn.user);
  const article = el("article", { class: "user", "aria-label": "You" }, body);
  const edit = button("Edit", () => editor(article, turn.user, "Send", actions.edit), { key: key("edit") });
  article.append(el("div", { class: "actions" }, versions, edit));
  return article;
}

/** Put a field in the place of a message, until it is saved or Esc is pressed. */
function editor(article, text, verb, done) {
  const before = [...article.childNodes];
  const field = el("textarea", { rows: Math.min(12, text.split("\n").length + 1), "aria-label": "Edit the message" });
  field.value = text;
  const close = () => article.replaceChildren(...before);
  const save = () => {
    close();
    done(field.value);
  };
  const cancel = () => {
    close();
    article.querySelector("[data-key$=edit]").focus();
  };
  field.addEventListener("keydown", (event) => {
    event.stopPropagation(); // Esc would stop answers too
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
  });
  const buttons = [button(verb, save, { class: "main" }), button("Cancel", cancel)];
  article.replaceChildren(field, el("div", { class: "actions" }, buttons));
  field.focus();
}

/** An answer. `others()`: models to compare its tokens with; `actions`: again(), edit(text), compare(model). */
export class AnswerView {
  #compared = null; // {texts, own, other, names}
  #note = "";
  #text = el("div");
  #more = el("div");
  #foot = el("div", { class: "actions" });
  #thought = el("details", { class: "thought", hidden: true }, el("summary"), el("div"));

  constructor(answer, { key, others, running, actions }) {
    Object.assign(this, { answer, key, others, running, actions });
    const label = `Answer of ${answer.model}`;
    this.element = el("article", { class: "answer", "aria-label": label },
      el("h2", { class: "model" }, answer.model),
      el("div", { class: "said" }, this.#thought, this.#text, this.#more),
      this.#foot);
    this.update();
  }

  /** Draw what has come so far. */
  update() {
    const { answer } = this;
    const running = this.running();
    this.element.setAttribute("aria-busy", running);
    this.element.querySelector(".model").title = answer.adapter ?? "";
    this.#drawThought();
    if (this.#compared) this.#text.replaceChildren(...tokensOf(this.#compared));
    else draw(this.#text, answer.text);
    const calls = answer.calls.map((call) =>
      el("pre", { tabindex: 0, role: "group", "aria-label": "call of a tool" }, `${call.name}(${call.arguments})`));
    const waiting = running && !answer.text && el("span", { class: "waiting" }, "\u2026");
    const error = answer.error && el("p", { class: "error" }, answer.error);
    this.#more.replaceChildren(...[...calls, waiting, error].filter(Boolean));
    redraw(this.#foot, running ? [] : this.#actions());
  }

  #drawThought() {
    const { thought } = this.answer;
    const [summary, text] = this.#thought.children;
    this.#thought.hidden = !thought;
    summary.textContent = `Thoughts (${thought.trim().split(/\s+/).length} words)`;
    text.textContent = thought;
  }

  #actions() {
    const { answer } = this;
    const control = (name, label, click) =>
      button(label, click, { key: `${this.key}-${name}`, "aria-description": `answer of ${answer.model}` });
    const found = [
      control("copy", "Copy", () => this.#copy()),
      control("edit", "Edit", () => editor(this.element, answer.text, "Save", this.actions.edit)),
      control("again", "Again", this.actions.again),
    ];
    if (this.#compared) found.push(control("compare", "Show text", () => this.#show(null)));
    else if (answer.text) {
      for (const model of this.others())
        found.push(control(`compare-${model}`, `Tokens vs ${model}`, () => this.#compare(model)));
    }
    found.push(el("span", { class: "facts" }, facts(answer)));
    if (this.#note) found.push(el("p", { class: "hint" }, this.#note));
    return found;
  }

  #show(compared, note = "") {
    if (Boolean(compared) !== Boolean(this.#compared)) this.#text = fresh(this.#text);
    this.#compared = compared;
    this.#note = note;
    if (note) announce(note);
    this.update();
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.answer.text);
      this.#show(this.#compared, "Copied.");
    } catch {
      this.#show(this.#compared, "The browser gives no access to the clipboard here.");
    }
  }

  async #compare(model) {
    const { answer } = this;
    if (answer.thought || answer.calls.length) {
      this.#show(null, "Only an answer without thoughts and calls can be scored: the tokens of those are not known here.");
      return;
    }
    this.#show(null, "Scoring \u2026");
    try {
      this.#show({ names: [answer.model, model], ...(await this.actions.compare(model)) });
      this.element.querySelector("[role=option]")?.focus();
    } catch (error) {
      this.#show(null, error.message);
    }
  }
}

/** An empty element in the place of this one. */
function fresh(element) {
  const made = el("div");
  element.replaceWith(made);
  return made;
}

function facts({ finish, tokens, seconds, edited }) {
  const reason = { length: "cut at the limit of tokens", stopped: "stopped", tool_calls: "calls a tool" }[finish];
  const speed = tokens && seconds && `${tokens} tokens, ${(tokens / seconds).toFixed(1)}/s`;
  return [edited && "edited", speed, reason].filter(Boolean).join(" \u00b7 ");
}

/** The tokens of an answer, colored, with a legend. One of them is in the order of Tab; arrows lead to the others. */
function tokensOf({ texts, own, other, names }) {
  const label = `Tokens of ${names[0]} compared with ${names[1]}`;
  const list = el("div", { class: "tokens", role: "listbox", "aria-label": label });
  const tip = el("div", { class: "tip", role: "tooltip", hidden: true });
  const box = el("div", { class: "scored", on: { mouseleave: () => (tip.hidden = true) } }, list, tip);
  const point = (token, i) => {
    tip.replaceChildren(...tipOf(texts[i], own[i], other[i], names));
    tip.hidden = false;
    const below = token.getBoundingClientRect().bottom + tip.offsetHeight < innerHeight - COMPOSER;
    tip.style.top = `${below ? token.offsetTop + token.offsetHeight + 4 : token.offsetTop - tip.offsetHeight - 4}px`;
    tip.style.left = `${Math.max(0, Math.min(token.offsetLeft, box.clientWidth - tip.offsetWidth))}px`;
  };
  const tokens = texts.map((text, i) => {
    const { side, strength } = shade(own[i], other[i]);
    const token = el("span", {
      role: "option", class: side, tabindex: i === 0 ? 0 : -1, "aria-label": describe(text, own[i], other[i], names),
      on: { mouseenter: () => point(token, i), focus: () => point(token, i), blur: () => (tip.hidden = true) },
    }, text.replaceAll("\n", "\u23ce\n"));
    token.style.setProperty("--strength", strength.toFixed(3));
    return token;
  });
  list.append(...tokens);
  list.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tip.hidden = true;
    const at = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (!tokens[to]) return;
    event.preventDefault();
    tokens[at].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  });
  return [box, legend({ texts, own, other, names })];
}

function tipOf(text, own, other, names) {
  const row = (name, value) => [el("dt", {}, name), el("dd", {}, percent(value)), el("dd", {}, value.toFixed(2))];
  return [el("b", {}, visible(text)), ` ${signed(own - other)} nats`, el("dl", {}, row(names[0], own), row(names[1], other))];
}

function legend({ texts, own, other, names }) {
  const { sum, mean } = total({ own, other });
  const means = `${signed(mean)} nats a token, ${signed(sum)} over the ${texts.length} tokens of this text`;
  return el("p", { class: "legend" },
    el("span", { class: "less" }, `likelier to ${names[1]}`), el("span", { class: "more" }, `likelier to ${names[0]}`),
    `${means}. Full color: ${FULL} nats, ${Math.round(Math.exp(FULL))} times as likely. Log-probabilities of the models, before temperature and top-p.`);
}
