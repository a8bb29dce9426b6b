// A conversation as a file, and a request as a program.

/** The body of a chat request: what is not set is left to the server. */
export function bodyOf(model, messages, sampling) {
  return { model, messages, ...sampling };
}

/** The path that is shown, with every setting; the other branches too. */
export function toJson(conversation, settings) {
  const { system, sampling, models } = settings;
  const shown = conversation.path().map((turn) => turn.id);
  return `${JSON.stringify({ format: "graft-conversation-1", models, system, sampling, shown, turns: conversation.turns }, null, 1)}\n`;
}

/** The path that is shown, as a document. */
export function toMarkdown(conversation, { system }) {
  const parts = system ? [`## System\n\n${system}`] : [];
  for (const turn of conversation.path()) {
    parts.push(`## User\n\n${turn.user}`);
    for (const answer of turn.answers.filter(Boolean)) parts.push(`## ${answer.model}\n\n${answer.text}`);
  }
  return `${parts.join("\n\n")}\n`;
}

const OPENAI = new Set(["model", "messages", "temperature", "top_p", "max_tokens", "seed"]); // the client's own arguments

/** A program for the client of OpenAI. */
export function toPython(origin, bodies) {
  const calls = bodies.map((body) => {
    const own = Object.entries(body).filter(([name]) => OPENAI.has(name));
    const others = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.has(name)));
    const given = own.map(([name, value]) => `    ${name}=${python(value, 1)},\n`).join("");
    const extra = Object.keys(others).length ? `    extra_body=${python(others, 1)},\n` : "";
    return `answer = client.chat.completions.create(\n${given}${extra})\nprint(answer.choices[0].message.content)\n`;
  });
  const client = `client = OpenAI(base_url=${python(`${origin}/v1`)}, api_key=os.environ.get("GRAFT_API_KEY", "none"))`;
  return `import os\n\nfrom openai import OpenAI\n\n${client}\n\n${calls.join("\n")}`;
}

/** Commands for a shell. */
export function toCurl(origin, bodies) {
  return bodies
    .map((body) => {
      const text = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
      const header = "-H 'Content-Type: application/json'";
      return `curl ${origin}/v1/chat/completions ${header} \\\n  -H "Authorization: Bearer $GRAFT_API_KEY" \\\n  -d '${text}'\n`;
    })
    .join("\n");
}

/** A value as Python writes it. JSON text is a Python literal but for its three words. */
function python(value, depth = 0) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = "    ".repeat(depth + 1);
  const items = Array.isArray(value)
    ? value.map((each) => python(each, depth + 1))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const line = `${open}${items.join(", ")}${close}`;
  if (line.length < 90 && !line.includes("\n")) return line;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${"    ".repeat(depth)}${close}`;
}
