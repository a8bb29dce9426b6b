// Server-sent events from a fetch: EventSource can send neither a body nor a key.

/** Text in pieces of any size -> the data of each complete event. */
export class EventParser {
  #text = "";
  #data = [];

  /** The data of the events that end in this piece. */
  push(piece) {
    this.#text += piece;
    const events = [];
    // A line ends with \n, \r\n or \r; after a \r at the very end, a \n may still come.
    for (let end; (end = this.#text.search(/\n|\r(?!$)/)) >= 0; ) {
      const line = this.#text.slice(0, end);
      this.#text = this.#text.slice(end + (this.#text.startsWith("\r\n", end) ? 2 : 1));
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // comments and other fields say nothing here
    }
    return events;
  }
}

/** The data of each event of a response. */
export async function* eventsOf(response) {
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {}); // so that the server stops too
  }
}
