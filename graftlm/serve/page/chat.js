// The chat: one message to each column, answers side by side.

import { call, chat } from "./api.js";
import { compare } from "./compare.js";
import { answerIn, Conversation, newAnswer, take } from "./conversation.js";
import { announce, button, byId, el, redraw, save } from "./dom.js";
import { bodyOf, toCurl, toJson, toMarkdown, toPython } from "./export.js";
import { AnswerView, userMessage } from "./message.js";
import { Settings } from "./settings.js";

const DRAWN_EACH = 80; // milliseconds: a token at a time would be drawn more often than it is seen
const SPOKEN = 400; // characters of an answer that a screen reader is told by itself

export class Chat {
  #conversation = new Conversation();
  #running = new Map(); // answer -> its AbortController
  #views = new Map(); // turn and column -> what is drawn of the answer

  constructor(available) {
    this.settings = new Settings(available, () => this.draw());
    this.columns = el("fieldset", { class: "columns" });
    byId("turns").before(this.columns);
    byId("settings").open = matchMedia("(min-width: 64rem)").matches;
    this.settings.draw(...this.#exports());
    this.#listen();
    this.draw();
  }

  #listen() {
    const say = byId("say");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(say.value);
    });
    say.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send(say.value);
    });
    byId("stop").addEventListener("click", () => this.#stop());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.#running.size && this.#stop());
  }

  // What the user does ------------------------------------------------------------------------------------------------

  #send(text) {
    if (!text.trim() || this.#running.size) return;
    byId("say").value = "";
    this.#ask(this.#conversation.add(text), this.#every());
  }

  #every = () => [...this.settings.models.keys()];

  /** Let the models of these columns answer a turn. */
  #ask(turn, columns) {
    const answers = columns.map((column) => {
      const answer = newAnswer(this.settings.models[column] ?? turn.answers[column].model);
      turn.answers[column] = answer;
      this.#running.set(answer, new AbortController());
      return [answer, column];
    });
    this.draw();
    byId("turns").lastElementChild.scrollIntoView({ block: "start" });
    announce(`${columns.length === 1 ? "An answer is" : `${columns.length} answers are`} on the way`);
    for (const [answer, column] of answers) this.#stream(turn, answer, column);
  }

  async #stream(turn, answer, column) {
    const { system, sampling } = this.settings;
    const draw = () => this.#views.get(viewKey(turn, column))?.update();
    const began = performance.now();
    let drawn = 0;
    try {
      const messages = this.#conversation.messages(turn, column, system);
      const stream = await chat(bodyOf(answer.model, messages, sampling), this.#running.get(answer).signal);
      answer.adapter = stream.adapter;
      for await (const chunk of stream.chunks) {
        take(answer, chunk);
        if (performance.now() - drawn < DRAWN_EACH) continue;
        drawn = performance.now();
        draw();
      }
    } catch (error) {
      if (error.name === "AbortError") answer.finish = "stopped";
      else answer.error = error.message;
    }
    answer.seconds = (performance.now() - began) / 1000;
    this.#running.delete(answer);
    draw();
    this.#controls();
    announce(`${answer.model}: ${answer.error ?? answer.text.slice(0, SPOKEN)}`);
  }

  #stop() {
    for (const controller of this.#running.values()) controller.abort();
    byId("say").focus();
  }

  #edit(turn, user) {
    if (!user.trim() || this.#running.size) return;
    this.#ask(this.#conversation.branch(turn, { user, answers: [] }), this.#every());
    byId("say").focus();
  }

  #editAnswer(turn, column, text) {
    if (this.#running.size) return;
    const answers = [...turn.answers];
    answers[column] = { ...newAnswer(turn.answers[column].model), text, edited: true };
    this.#conversation.branch(turn, { answers });
    this.draw();
    byId("say").focus();
  }

  #again(turn, column) {
    if (this.#running.size) return;
    this.#ask(this.#conversation.branch(turn, {}), [column]);
  }

  #clear() {
    this.#stop();
    this.#conversation = new Conversation();
    this.#views.clear();
    this.draw();
    byId("say").focus();
  }

  // What is drawn -----------------------------------------------------------------------------------------------------

  /** Draw all turns of the path. What streams and what was compared keeps its view. */
  draw() {
    redraw(this.columns, [el("legend", { class: "hidden" }, "Models"), ...this.settings.columns()]);
    const turns = this.#conversation.path().map((turn) => this.#turn(turn));
    redraw(byId("turns"), turns.length ? turns : [this.#welcome()]);
    this.#controls();
  }

  #turn(turn) {
    const count = Math.max(this.settings.models.length, turn.answers.length);
    const answers = Array.from({ length: count }, (_, column) => this.#answer(turn, column));
    const show = (other) => {
      if (this.#running.size) return;
      this.#conversation.show(other);
      this.draw();
    };
    const actions = { show, edit: (text) => this.#edit(turn, text) };
    return el("div", { class: "turn" }, userMessage(turn, this.#conversation.siblings(turn), actions),
      el("div", { class: `answers of-${count}` }, ...answers));
  }

  #answer(turn, column) {
    const answer = turn.answers[column];
    if (!answer) return this.#notAsked(turn, column);
    const key = viewKey(turn, column);
    if (!this.#views.has(key)) {
      this.#views.set(key, new AnswerView(answer, {
        key,
        others: () => [...new Set(this.settings.models)].filter((model) => model !== answer.model),
        running: () => this.#running.has(answer),
        actions: this.#answerActions(turn, column, answer),
      }));
    } else this.#views.get(key).update();
    return this.#views.get(key).element;
  }

  /** A column that was not there when the turn was answered. */
  #notAsked(turn, column) {
    const model = this.settings.models[column];
    const from = answerIn(turn, column)?.model;
    const hint = from ? `Not asked here: this column goes on from the answer of ${from}.` : "Not asked here.";
    const ask = model && button("Ask", () => this.#again(turn, column), { key: `ask-${turn.id}-${column}` });
    return el("article", { class: "answer", "aria-label": `${model ?? "No model"}, not asked` },
      el("h2", { class: "model" }, model ?? "\u2013"), el("p", { class: "hint" }, hint), el("div", { class: "actions" }, ask));
  }

  #answerActions(turn, column, answer) {
    const messages = () => this.#conversation.messages(turn, column, this.settings.system);
    return {
      again: () => this.#again(turn, column),
      edit: (text) => this.#editAnswer(turn, column, text),
      compare: (model) => compare(answer, [answer.model, model], messages()),
    };
  }

  #welcome() {
    const { models } = this.settings;
    const more = this.settings.available.length > 1 ? " Choose up to three models above: each of them answers, side by side." : "";
    return el("div", { class: "welcome" }, el("h2", {}, `Ask ${models.join(" and ")}`),
      el("p", {}, `Write a message below.${more} Nothing leaves this server.`));
  }

  #controls() {
    byId("stop").hidden = this.#running.size === 0;
    byId("send").disabled = this.#running.size > 0;
  }

  #exports() {
    const whole = (make) => make(this.#conversation, this.settings);
    const code = (title, make) => button(title, () => this.#code(title, make));
    return [
      el("h2", {}, "Conversation"),
      el("div", { class: "grid-2" },
        button("New", () => this.#clear()),
        button("Save JSON", () => save("conversation.json", "application/json", whole(toJson))),
        button("Save Markdown", () => save("conversation.md", "text/markdown", whole(toMarkdown))),
        code("As Python", toPython), code("As curl", toCurl)),
    ];
  }

  #code(title, make) {
    const turn = this.#conversation.last;
    const { system, sampling, models } = this.settings;
    const asked = (column) => (turn ? this.#conversation.messages(turn, column, system) : [{ role: "user", content: "Hello" }]);
    byId("code-title").textContent = title;
    byId("code").value = make(location.origin, models.map((model, i) => bodyOf(model, asked(i), sampling)));
    byId("code-dialog").showModal();
  }
}

const viewKey = (turn, column) => `answer-${turn.id}-${column}`;

/** The models that can be asked, the base first. */
export const availableModels = async () => (await call("/v1/models")).data;
