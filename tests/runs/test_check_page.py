"""The page of the pre-flight report: whole, whatever the rows hold, and with nothing in it that the rows wrote."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import graftlm
from graftlm.data.chat.render import Renderer
from graftlm.prepare import Prepared, prepare_data
from graftlm.recipe import Recipe
from graftlm.runs import check_page
from tests.errors import raises

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b onclick='alert(1)'>",
    "{{ 7 * 7 }} {% raw %}",
    "\x1b[31m \u2028 \u202e \x07 &lt;b&gt; &amp;",
    "As an AI language model </td></table><iframe src='//x.y'>",
]


class Page(HTMLParser):
    """Elements with their attributes, and the text of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def loaded(base_folder: Path) -> Any:
    return graftlm.load_base(str(base_folder))


def prepared(tmp_path: Path, base_folder: Path, loaded: Any, rows: list[tuple[str, str]], **data: Any) -> Prepared:
    file = tmp_path / "rows<b>.jsonl"
    file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows), encoding="utf-8")
    config = graftlm.DataConfig(train=str(file), **data)
    return prepare_data(Recipe(base=str(base_folder), data=config), loaded.tokenizer, look=True)


def html(data: Prepared) -> str:
    return check_page.html(data, graftlm.DataConfig(train="rows"), title="rows </title><script>alert(2)</script>")


def test_hostile_rows_are_text_and_nothing_else(tmp_path: Path, base_folder: Path, loaded: Any) -> None:
    rows = [(text, answer) for text in HOSTILE for answer in HOSTILE]
    data = prepared(tmp_path, base_folder, loaded, rows)
    page = Page(html(data))
    calm = Page(html(prepared(tmp_path, base_folder, loaded, [("a", "b")] * len(rows))))
    assert {name for name, _ in page.elements} == {name for name, _ in calm.elements}
    assert [a.get("type") for a in page.of("script")] == ["application/json", None]
    assert not [a for _, a in page.elements for key in a if key.startswith("on") or key in ("href", "src")]
    assert page.scripts[1] == calm.scripts[1], "the program of the page is the same for all rows"
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    shown = json.loads(page.scripts[0])
    assert len(shown) == len(rows)
    for row, (question, answer) in zip(shown, rows, strict=True):
        text = "".join(token[0] for token in row["tokens"])
        parted = "\ufffd" in text  # a token that is a part of a character reads so
        assert parted or (question in text and answer in text)


def test_rows_come_with_roles_weights_and_what_was_found(tmp_path: Path, base_folder: Path, loaded: Any) -> None:
    rows = [("a question", "an answer"), ("another", "As an AI language model"), ("a question", "an answer")]
    data = prepared(tmp_path, base_folder, loaded, rows)
    shown = json.loads(Page(html(data)).scripts[0])
    assert [row["where"].rpartition(":")[2] for row in shown] == ["1", "2", "3"]
    assert [[kind for kind, _ in row["found"]] for row in shown] == [
        ["exact duplicates"],
        ["refusals"],
        ["exact duplicates"],
    ]
    assert shown[0]["found"][0][1].endswith(":3")
    (wanted,) = check_page.shown_rows(data.rows[:1], Renderer(loaded.tokenizer), graftlm.DataConfig(train="rows"), 1)
    assert shown[0]["tokens"] == [[t["text"], t["role"], t["weight"], t["id"]] for t in wanted["tokens"]]


def test_of_many_rows_some_are_shown_and_all_that_are_worth_a_look(
    tmp_path: Path, base_folder: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_page, "SAMPLED", 5)
    rows = [(f"question {i}", "As an AI, no" if i in (13, 31) else f"answer {i}") for i in range(50)]
    data = prepared(tmp_path, base_folder, loaded, rows)
    numbers = [int(row["where"].rpartition(":")[2]) - 1 for row in json.loads(Page(html(data)).scripts[0])]
    assert numbers == [0, 10, 13, 20, 30, 31, 40]
    monkeypatch.setattr(check_page, "MAX_ROWS", 6)
    text = html(data)
    assert len(json.loads(Page(text).scripts[0])) == 6
    assert "1 more of these are left out" in text


def test_held_out_rows_that_were_trained_on_are_on_the_page(tmp_path: Path, base_folder: Path, loaded: Any) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "a question", "completion": "an answer"}) + "\n")
    data = prepared(tmp_path, base_folder, loaded, [("a question", "an answer"), ("b", "c")], held_out=str(held))
    shown = json.loads(Page(html(data)).scripts[0])
    assert shown[0]["found"] == [["train/held-out overlap", f"the same row ({held}:1)"]]
    assert shown[-1]["where"] == f"{held}:1"
    assert shown[-1]["found"][0][0] == "train/held-out overlap"


def test_histograms_show_every_row_once(tmp_path: Path, base_folder: Path, loaded: Any) -> None:
    data = prepared(tmp_path, base_folder, loaded, [("a" * n, "b" * (2 * n)) for n in range(1, 40)])
    for lengths in (data.report.prompt_tokens, data.report.answer_tokens):
        bars = check_page._bars(lengths)
        assert sum(int(bar["title"].split(": ")[1].split()[0]) for bar in bars) == 39
        assert all(0 <= bar["y"] <= check_page.HEIGHT for bar in bars)
        assert bars[-1]["x"] + bars[-1]["width"] <= check_page.WIDTH


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, base_folder: Path, loaded: Any) -> None:
    data, config = prepared(tmp_path, base_folder, loaded, [("a", "b")]), graftlm.DataConfig(train="rows")
    check_page.write(tmp_path / "page.html", data, config, title="t")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    with raises("output/not-writable"):
        check_page.write(tmp_path / "page.html" / "no", data, config, title="t")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_program_of_the_page_leafs_through_the_rows(tmp_path: Path, base_folder: Path, loaded: Any) -> None:
    """In a document that is just big enough for it."""
    rows = [("a\x07", "b"), ("c", "As an AI language model"), ("e", "f")]
    text = html(prepared(tmp_path, base_folder, loaded, rows))
    page = Page(text)
    ids = re.findall(r'id="([a-z]+)"', text)
    script = tmp_path / "page.js"
    script.write_text(
        """
const made = (name) => ({ name, children: [], dataset: {}, style: {}, textContent: "",
  append(...all) { this.children.push(...all); }, replaceChildren() { this.children = []; }, scrollIntoView() {} });
const parts = Object.fromEntries(IDS.map((id) => [id, made(id)]));
parts.rows.textContent = ROWS;
const buttons = PLACES.map((place) => Object.assign(made("button"), { dataset: { place } }));
let key;
globalThis.document = { getElementById: (id) => parts[id], createElement: made, querySelectorAll: () => buttons,
  addEventListener: (_, act) => { key = (name) => act({ key: name, target: { matches: () => false } }); } };
eval(PROGRAM);
const seen = [];
const shown = () => parts.tokens.children.map((c) => c.textContent).join("");
const look = () => seen.push([parts.where.textContent, parts.place.value, shown()]);
look(); parts.next.onclick(); look(); key("ArrowRight"); look(); key("ArrowRight"); look(); key("ArrowLeft"); look();
parts.previous.onclick(); look();
parts.place.onchange({ target: { valueAsNumber: 3 } }); look();
parts.kind.onchange({ target: { value: "refusals" } }); look();
buttons[0].onclick(); look();
console.log(JSON.stringify(seen));
""".replace("IDS", json.dumps(ids))
        .replace("ROWS", json.dumps(page.scripts[0]))
        .replace("PLACES", json.dumps([a["data-place"] for a in page.of("button") if a.get("class") == "row"]))
        .replace("PROGRAM", json.dumps(page.scripts[1].replace('"use strict";', "")))
    )
    done = subprocess.run(["node", str(script)], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert [where.rpartition(":")[2] for where, *_ in seen] == ["1", "2", "3", "3", "2", "1", "3", "2", "2"]
    assert [place for _, place, _ in seen] == [1, 2, 3, 3, 2, 1, 3, 1, 2]
    assert "\u2407" in seen[0][2]
