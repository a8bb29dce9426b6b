// A conversation: a tree of turns. A turn is what the user said and the answers of the columns to it.
//
// A turn is never changed once it is answered. To edit a message or to ask again makes another turn beside it, with
// whatever stays the same, and what came after the first one stays below it. So every path is a talk that took place.

export class Conversation {
  constructor() {
    this.turns = [];
    this.last = null; // the turn that is shown last
  }

  /** A turn after the one shown last, which is shown then. */
  add(user) {
    return this.#put({ parent: this.last?.id ?? null, user, answers: [] });
  }

  /** A turn beside this one, with these changes; it is shown, and nothing after it. */
  branch(turn, changes) {
    return this.#put({ parent: turn.parent, user: turn.user, answers: [...turn.answers], ...changes });
  }

  #put(turn) {
    this.turns.push({ id: this.turns.length, ...turn });
    this.last = this.turns.at(-1);
    return this.last;
  }

  /** The turns that are shown, in order. */
  path() {
    const found = [];
    for (let turn = this.last; turn; turn = this.turns[turn.parent]) found.unshift(turn);
    return found;
  }

  /** The turns with the same past as this one, itself included. */
  siblings(turn) {
    return this.turns.filter((each) => each.parent === turn.parent);
  }

  /** Show the path through this turn, down to the newest turn after it. */
  show(turn) {
    this.last = turn;
    for (let next = turn; next; next = this.turns.findLast((each) => each.parent === next.id)) this.last = next;
  }

  /** What a model is asked in a column, from the beginning to the question of this turn. */
  messages(turn, column, system = "") {
    const asked = system ? [{ role: "system", content: system }] : [];
    for (let at = turn, first = true; at; at = this.turns[at.parent], first = false) {
      const answer = first ? null : answerIn(at, column);
      asked.splice(system ? 1 : 0, 0, { role: "user", content: at.user }, ...(answer ? [said(answer)] : []));
    }
    return asked;
  }
}

const said = (answer) => ({ role: "assistant", content: answer.text });

/** The answer of a column; where there was no such column yet, that of the first, which it goes on from. */
export function answerIn(turn, column) {
  return turn.answers[column] ?? turn.answers[0];
}

/** An answer that nothing is known of yet. */
export function newAnswer(model) {
  return { model, text: "", thought: "", calls: [], finish: null, error: null, tokens: null, seconds: null, adapter: null };
}

/** Take in a chunk of a stream. */
export function take(answer, chunk) {
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
  for (const { delta, finish_reason } of chunk.choices ?? []) {
    answer.text += delta?.content ?? "";
    answer.thought += delta?.reasoning_content ?? "";
    for (const call of delta?.tool_calls ?? []) {
      const known = (answer.calls[call.index] ??= { name: "", arguments: "" });
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    answer.finish = finish_reason ?? answer.finish;
  }
}
