// The functions of the page that need no browser. Run by test_scripts.py with node's own test runner.

import assert from "node:assert/strict";
import { test } from "node:test";

const page = new URL("../../../graftlm/serve/page/", import.meta.url);
const { parse, inline, safe } = await import(new URL("markdown.js", page));
const { EventParser } = await import(new URL("sse.js", page));
const { Conversation, newAnswer, take } = await import(new URL("conversation.js", page));
const { toCurl, toMarkdown, toPython } = await import(new URL("export.js", page));
const { shade, total } = await import(new URL("compare.js", page));
const { runsOf } = await import(new URL("data.js", page));
const { differences, heldOut, ticks } = await import(new URL("runs.js", page));

/** A tree as HTML would write it, for short comparisons. */
const html = (tree) =>
  Array.isArray(tree) ? tree.map(html).join("")
  : typeof tree === "string" ? tree.replaceAll("&", "&amp;").replaceAll("<", "&lt;")
  : `<${tree.tag}${tree.href ? ` href=${tree.href}` : ""}${tree.start ? ` start=${tree.start}` : ""}>${html(tree.children)}</${tree.tag}>`;

test("markdown: blocks", () => {
  const cases = {
    "# A *b*": "<h1>A <em>b</em></h1>",
    "a\nb\n\nc": "<p>a<br></br>b</p><p>c</p>",
    "- a\n  - b\n- c": "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ul>",
    "1. a\n\n   b\n2. c": "<ol><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>",
    "3) a": "<ol start=3><li><p>a</p></li></ol>",
    "- a\n1. b": "<ul><li><p>a</p></li></ul><ol><li><p>b</p></li></ol>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "```py\n<b>*x*\n```\nz": "<pre>&lt;b>*x*</pre><p>z</p>",
    "````\n```\n````": "<pre>```</pre>",
    "```\nnot complete": "<pre>not complete</pre>",
    "a\n\n---\n\nb": "<p>a</p><hr></hr><p>b</p>",
    "|a|b|\n|-|-:|\n|1|2 \\| 3|": "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2 | 3</td></tr></tbody></table>",
    "a | b\nc": "<p>a | b<br></br>c</p>",
  };
  for (const [text, expected] of Object.entries(cases)) assert.equal(html(parse(text)), expected, text);
});

test("markdown: within a line", () => {
  const cases = {
    "**a *b* c**": "<strong>a <em>b</em> c</strong>",
    "***a***": "<strong><em>a</em></strong>",
    "snake_case_name, 2 * 3 * 4": "snake_case_name, 2 * 3 * 4",
    "`a*b*` ``c`d``": "<code>a*b*</code> <code>c`d</code>",
    "\\*a\\*": "*a*",
    "**open": "**open",
    "~~a~~": "<del>a</del>",
    "[t](https://e.org/a_(b))": "<a href=https://e.org/a_(b)>t</a>",
    "see https://e.org/a, or": "see <a href=https://e.org/a>https://e.org/a</a>, or",
    "![p](https://e.org/p.png)": "<a href=https://e.org/p.png>p</a>",
  };
  for (const [text, expected] of Object.entries(cases)) assert.equal(html(inline(text)), expected, text);
});

test("markdown: HTML and addresses that a browser would run are text", () => {
  for (const text of ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))"])
    assert.equal(html(parse(text)).replaceAll("&lt;", "<"), `<p>${text}</p>`);
  for (const address of ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\nscript:alert(1)", "data:text/html,x", "vbscript:x", "file:///etc/passwd", "/v1/models", "blob:x"])
    assert.equal(safe(address), null, address);
});

test("markdown: every text is parsed, deep and long ones too, and none of it is lost", () => {
  const letters = (tree) => (typeof tree === "string" ? tree : tree.children.map(letters).join("")).replace(/[^x]/g, "");
  for (const piece of ["*x", "**x ", "_x", "`x``", "[x](", "> ", "- x\n", "  - x\n", "|x", "#", "***x", "x|\n|-", "![x", "<hx"]) {
    const text = piece.repeat(3000) + "x";
    const found = letters({ children: parse(text) });
    assert.equal(found.length, text.split("x").length - 1, piece);
  }
});

test("events: in pieces of any size", () => {
  const stream = ': ping\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\nid: 7\n\ndata: é\r\rdata: never ended\n';
  const expected = ['{"a": 1}', "two\nlines", "é"];
  for (let size = 1; size <= stream.length; size++) {
    const parser = new EventParser();
    const found = [];
    for (let at = 0; at < stream.length; at += size) found.push(...parser.push(stream.slice(at, at + size)));
    assert.deepEqual(found, expected, `pieces of ${size}`);
  }
});

test("chunks: text, thoughts, calls of tools and usage add up", () => {
  const answer = newAnswer("m");
  const call = (index, part) => ({ choices: [{ delta: { tool_calls: [{ index, function: part }] } }] });
  for (const chunk of [
    { choices: [{ delta: { role: "assistant", content: "" } }] },
    { choices: [{ delta: { reasoning_content: "hm" } }] },
    { choices: [{ delta: { content: "a" } }] },
    { choices: [{ delta: { content: "b" }, finish_reason: null }] },
    call(0, { name: "f", arguments: '{"x"' }),
    call(0, { arguments: ": 1}" }),
    { choices: [{ delta: {}, finish_reason: "length" }] },
    { choices: [], usage: { completion_tokens: 5 } },
  ]) take(answer, chunk);
  assert.deepEqual(
    [answer.text, answer.thought, answer.calls, answer.finish, answer.tokens],
    ["ab", "hm", [{ name: "f", arguments: '{"x": 1}' }], "length", 5],
  );
});

test("conversation: a branch leaves what it branched from", () => {
  const talk = new Conversation();
  const first = talk.add("one");
  first.answers = [{ text: "A1" }, { text: "B1" }];
  const second = talk.add("two");
  second.answers = [{ text: "A2" }, { text: "B2" }];
  const other = talk.branch(first, { user: "uno", answers: [{ text: "A3" }] });
  const texts = (turn, column, system) => talk.messages(turn, column, system).map((message) => message.content);
  assert.deepEqual(talk.path(), [other]);
  assert.deepEqual(talk.siblings(first), [first, other]);
  const third = talk.add("tres");
  assert.deepEqual(texts(third, 0, "be brief"), ["be brief", "uno", "A3", "tres"]);
  assert.deepEqual(texts(third, 1), ["uno", "A3", "tres"], "a column that was not asked goes on from the first");
  talk.show(first);
  assert.deepEqual(talk.path(), [first, second]);
  assert.deepEqual(texts(second, 1), ["one", "B1", "two"]);
});

test("exports hold quotes, line ends and what is no argument of the client", () => {
  const body = { model: "m", messages: [{ role: "user", content: "it's \"so\"\n\\" }], temperature: 0, min_p: 0.1, seed: null };
  const python = toPython("http://h", [body]);
  assert.ok(python.includes('"content": "it\'s \\"so\\"\\n\\\\"'));
  assert.ok(python.includes('extra_body={"min_p": 0.1}') && python.includes("seed=None"));
  const quoted = /-d '([\s\S]*)'\n$/.exec(toCurl("http://h", [body]))[1];
  assert.ok(!quoted.replaceAll("'\\''", "").includes("'"));
  assert.deepEqual(JSON.parse(quoted.replaceAll("'\\''", "'")), body);
  const talk = new Conversation();
  talk.add("q").answers = [{ model: "m", text: "a" }, undefined, { model: "n", text: "b" }];
  assert.equal(toMarkdown(talk, { system: "s" }), "## System\n\ns\n\n## User\n\nq\n\n## m\n\na\n\n## n\n\nb\n");
});

test("tokens: side, strength and sums", () => {
  assert.deepEqual(shade(-1, -1), { side: "more", strength: 0 });
  assert.deepEqual(shade(-4, -1), { side: "less", strength: 1 });
  assert.deepEqual(shade(-1, -2.5), { side: "more", strength: 0.5 });
  assert.deepEqual(shade(-100, 0), { side: "less", strength: 1 });
  assert.deepEqual(total({ own: [-1, -2], other: [-2, -4] }), { sum: 3, mean: 1.5 });
  assert.deepEqual(total({ own: [], other: [] }), { sum: 0, mean: 0 });
});

test("data: tokens that the loss treats alike stand together, and no text is lost", () => {
  const tokens = [["a", 0], [" b", 0], ["c", 1], ["d", 0.5], ["", 0]].map(([text, weight]) => ({ text, weight }));
  assert.deepEqual(runsOf(tokens), [{ text: "a b", supervised: false }, { text: "cd", supervised: true }, { text: "", supervised: false }]);
  assert.deepEqual(runsOf([]), []);
});

test("runs: what differs, what was measured, and round values on an axis", () => {
  assert.deepEqual(differences({ a: 1, b: [1] }, { a: 2, b: [1], c: null }), [["a", 1, 2], ["c", undefined, null]]);
  const tree = { loss_nats: { base: 3, tuned: 2 }, rouge_l: { base: null, tuned: null }, objective: { base: { loss: 1, why: "x" }, tuned: { loss: 0.5 } }, rows: 4 };
  assert.deepEqual(heldOut(tree), [["loss, nats a token", 3, 2], ["objective loss", 1, 0.5]]);
  assert.deepEqual(heldOut(null), []);
  assert.deepEqual(ticks(0, 4), [0, 1, 2, 3, 4]);
  assert.deepEqual(ticks(0.1, 0.34), [0.1, 0.15, 0.2, 0.25, 0.3]);
  assert.ok(ticks(5, 5).length <= 1);
});
