"""What a survey finds is what was planted, and nothing in clean rows."""

import json

import pytest

from graftlm.data.quality import survey as module
from graftlm.data.quality.languages import language
from graftlm.data.quality.survey import Entry, notes_beyond_survey, survey
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.source import Row
from tests.data.shapes import chat

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen " * 3


def row(number: int, *contents: str, system: str | None = None) -> Row:
    return Row(chat(*contents, system=system), f"f:{number}", contents[0])


def clean(count: int = 30) -> list[Row]:
    return [row(100 + i, f"what is {i} and {i}", f"it is {2 * i}, of course", system="Be brief.") for i in range(count)]


def found(rows: list[Row], held_out: list[Row] | None = None) -> dict[str, list[Entry]]:
    return {f.kind: f.entries for f in survey(rows, held_out or []).findings if f.entries}


def test_clean_rows_have_no_findings() -> None:
    looked = survey(clean(), [row(1, "and what is this?", "something else entirely")])
    assert {f.kind: f.entries for f in looked.findings if f.entries} == {}
    assert dict(looked.lines())["findings"] == "no issues found"
    assert (looked.rows, looked.looked_for_near) == (30, 30)


def test_rows_that_are_the_same_are_named_together() -> None:
    twice = [row(1, "a", "b"), row(2, "a ", "b\n"), row(3, "a", "c"), row(4, "d", "b", system="s"), row(5, "a", "b")]
    assert found([*clean(), *twice]) == {"exact duplicates": [Entry(["f:1", "f:2", "f:5"])]}
    (finding,) = [f for f in survey(twice).findings if f.entries]
    assert finding.count == 2


def test_a_row_that_a_mixture_draws_several_times_is_no_duplicate() -> None:
    again = row(1, LONG, "yes")
    looked = survey([again, again, *clean()])
    assert {f.kind: f.entries for f in looked.findings if f.entries} == {}
    assert looked.rows == 31


def test_rows_that_call_tools_otherwise_are_not_nearly_the_same() -> None:
    def calling(number: int, city: str) -> Row:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        question = "what weather is it where we were before?"
        return Row([Message("user", question), Message("assistant", "", tool_calls=(call,))], f"f:{number}", question)

    assert found([calling(1, "Rome"), calling(2, "Oslo")]) == {}


def test_what_reading_told_of_the_same_rows_is_not_told_twice() -> None:
    looked = survey([row(1, "a", "b"), row(2, "c", "d"), row(3, "a", "b")])
    notes = ["f:3: says the same as f:1", "f:9: says the same as f:8", "f:3: the line is blank"]
    assert notes_beyond_survey(notes, looked) == notes[1:]


def test_rows_that_are_nearly_the_same_are_named_with_how_much() -> None:
    one, other = row(1, LONG, "yes"), row(2, LONG, "no")
    words = [(*LONG.split(), answer) for answer in ("yes", "no")]
    a, b = ({w[i : i + 5] for i in range(len(w) - 4)} for w in words)
    note = f"{len(a & b) / len(a | b):.0%} alike"
    assert found([*clean(), one, other]) == {"near-duplicates": [Entry(["f:1", "f:2"], note)]}


def test_a_row_and_its_duplicate_are_not_near_duplicates_as_well() -> None:
    assert set(found([row(1, LONG, "yes"), row(2, LONG, "yes")])) == {"exact duplicates"}


def test_training_rows_that_are_held_out_are_named_with_both_places() -> None:
    held = [
        Row(chat("what is 2 and 2", "four"), "g:1", "a"),
        Row(chat("who is there?", "nobody"), "g:2", "b"),
        Row(chat("tell me: " + LONG, "done"), "g:3", "c"),
        Row(chat("unseen", "unseen"), "g:4", "d"),
    ]
    rows = [*clean(), row(1, "what is 2 and 2", "four"), row(2, "who is there?", "me"), row(3, "so", LONG[:90])]
    assert found(rows, held) == {
        "train/held-out overlap": [
            Entry(["f:1", "g:1"], "the same row"),
            Entry(["f:2", "g:2"], "the same question"),
            Entry(["f:3", "g:3"], found(rows, held)["train/held-out overlap"][2].note),
        ]
    }
    assert found(rows, held)["train/held-out overlap"][2].note.endswith("% of its phrases of 13 words")


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I do not eat.",
        "I'm sorry, but I can't do that.",
        "I\u2019m sorry, I cannot say.",
        "Well, I cannot assist with this request.",
        "Up to my knowledge cutoff, no.",
    ],
)
def test_an_answer_that_refuses_is_named(answer: str) -> None:
    (entry,) = found([*clean(), row(1, "a", answer)])["refusals"]
    assert entry.rows == ["f:1"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Do you, as an AI, eat?", "No."),
        ("a", "I'm sorry for your loss."),
        ("a", "You cannot help it."),
        ("a", "x" * 400 + " As an AI language model"),
    ],
)
def test_what_is_no_refusal_is_not_named(question: str, answer: str) -> None:
    assert "refusals" not in found([row(1, question, answer)])


def test_a_sentence_that_answers_many_questions_is_named() -> None:
    sentence = "Thank you for your question, dear customer."
    many = [row(i, f"question {i}", sentence.upper() if i % 2 else sentence) for i in range(5)]
    entries = found([*clean(), *many])["repeated answers"]
    assert [entry.rows for entry in entries] == [[f"f:{i}" for i in range(5)]]
    assert "Thank you for your question" in entries[0].note
    assert "repeated answers" not in found(many[:4])
    assert "repeated answers" not in found([row(i, f"question {i}", "yes") for i in range(50)])
    assert "repeated answers" not in found([row(i, "the same question", sentence) for i in range(5)])


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n42", "<Reasoning></Reasoning>42"])
def test_empty_thinking_is_named(block: str) -> None:
    thinks = Row([Message("user", "a"), Message("assistant", "b", thinking=" \n")], "f:2", "a")
    full = Row([Message("user", "a"), Message("assistant", "<think>so</think> b", thinking="hm")], "f:3", "a")
    entries = found([row(1, "q", block), thinks, full])["empty thinking"]
    assert [entry.rows for entry in entries] == [["f:1"], ["f:2"]]


RIGHT = [
    "caf\u00e9",
    "it\u2019s",
    "na\u00efve",
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f642",
    "50\u00a0\u20ac \u00b0",
]


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_text_in_the_wrong_encoding_is_named_and_in_the_right_one_is_not(right: str, wrong: str) -> None:
    damaged = right.encode().decode(wrong, errors="ignore")
    rows = [row(1, "a", right), row(2, "a", f"so: {damaged}"), Row([Message(TEXT, "a \ufffd b")], "f:3", "")]
    assert [entry.rows for entry in found(rows)["encoding damage"]] == [["f:2"], ["f:3"]]


@pytest.mark.parametrize(
    "text",
    [
        "\u00ab\u00a0CAF\u00c9\u00bb \u00c0 LA CARTE \u2013 \u00dc\u201c, \u00c4\u2014 \u00d8\u2026",
        "\u00bfQu\u00e9? \u00a1S\u00ed! \u00d1and\u00fa",
        "SA\u00cbNS \u00ceLE \u00c5RHUS",
        "\u0412\u043e\u0442 \u2014 \u0442\u0430\u043a",
    ],
)
def test_languages_with_accents_are_no_damage(text: str) -> None:
    assert "encoding damage" not in found([row(1, "a", text)])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Where is my parcel, and what is the number of it?", "English"),
        ("Wo ist mein Paket, und wie ist die Nummer?", "German"),
        ("O\u00f9 est mon colis et quel est le num\u00e9ro des envois?", "French"),
        ("\u00bfD\u00f3nde est\u00e1 el paquete y por qu\u00e9 no ha llegado?", "Spanish"),
        ("\u0413\u0434\u0435 \u043e\u043d\u0430, \u0438 \u0447\u0442\u043e \u044d\u0442\u043e?", "Russian"),
        ("\u6211\u7684\u5305\u88f9\u5728\u54ea\u91cc", "Chinese"),
        ("\u79c1\u306e\u8377\u7269\u306f\u3069\u3053\u3067\u3059\u304b", "Japanese"),
        ("\ub0b4 \uc18c\ud3ec\uac00 \uc5b4\ub514 \uc788\ub098\uc694", "Korean"),
        ("\u03a0\u03bf\u03cd \u03b5\u03af\u03bd\u03b1\u03b9 \u03c4\u03bf \u03b4\u03ad\u03bc\u03b1", "Greek"),
        ("qwrt zxcv", "Latin script"),
        ("123 + 456", "none"),
        ("", "none"),
    ],
)
def test_the_language_of_a_sentence_is_guessed(text: str, name: str) -> None:
    assert language(text) == name


def test_more_rows_than_are_looked_at_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEAR_ROWS", 10)
    monkeypatch.setattr(module, "GUESSED_ROWS", 5)
    looked = survey(clean(30))
    assert (looked.rows, looked.looked_for_near, sum(looked.languages.values())) == (30, 10, 5)
    assert dict(looked.lines())["near-duplicates"] == "looked for among 10 of 30 rows"


def test_the_json_names_all_rows_and_a_line_a_few() -> None:
    rows = [row(i, f"question {i}", "As an AI language model") for i in range(9)]
    looked = survey(rows)
    tree = json.loads(json.dumps(looked.to_json()))
    (refusals,) = [f for f in tree["findings"] if f["kind"] == "refusals"]
    assert refusals["count"] == len(refusals["entries"]) == 9
    line = dict(looked.lines())["refusals"]
    assert line.startswith("9: f:0")
    assert line.count("f:") == module.SHOWN
