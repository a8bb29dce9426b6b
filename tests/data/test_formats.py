"""Row -> messages, for every format; what is wrong with a row is said with what was found."""

from typing import Any

import pytest

from graftlm.data.formats import FORMATS, TEXT, Message, RowError, check, detect

ASKED = [Message("user", "q"), Message("assistant", "a")]
SYSTEM = Message("system", "s")
ROWS: dict[str, tuple[str, dict[str, Any], list[Message]]] = {
    "prompt and completion": ("prompt-completion", {"prompt": "q", "completion": "a"}, ASKED),
    "prompt and response": ("prompt-completion", {"prompt": "q", "response": "a"}, ASKED),
    "with a system": ("prompt-completion", {"system": "s", "prompt": "q", "completion": "a"}, [SYSTEM, *ASKED]),
    "lists of messages": (
        "prompt-completion",
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        [SYSTEM, *ASKED],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "q", "input": "i", "output": "a"},
        [Message("user", "q\n\ni"), Message("assistant", "a")],
    ),
    "alpaca with an empty input": ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ASKED),
    "alpaca with a null input": ("alpaca", {"instruction": "q", "input": None, "output": "a"}, ASKED),
    "alpaca without input": ("alpaca", {"instruction": "q", "output": "a", "text": "all of it"}, ASKED),
    "sharegpt": (
        "sharegpt",
        {
            "id": 7,
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "observation", "value": "t"},
                {"from": "chatgpt", "value": "b"},
            ],
        },
        [SYSTEM, *ASKED, Message("tool", "t"), Message("assistant", "b")],
    ),
    "sharegpt with a system field": (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [SYSTEM, *ASKED],
    ),
    "messages": (
        "messages",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}]},
        ASKED,
    ),
    "text": ("text", {"text": " raw \n", "meta": 1}, [Message(TEXT, " raw \n")]),
}


def test_every_format_has_a_row_here() -> None:
    assert {name for name, _, _ in ROWS.values()} == set(FORMATS)


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_detected_and_becomes_messages(case: str) -> None:
    name, row, wanted = ROWS[case]
    assert detect(row) == name
    assert FORMATS[name](row) == wanted
    check(wanted)


@pytest.mark.parametrize("role", ["human", "user"])
def test_the_roles_of_sharegpt_have_their_usual_names(role: str) -> None:
    turns = [{"from": role, "value": "q"}, {"from": "assistant", "value": "a"}]
    assert FORMATS["sharegpt"]({"conversations": turns}) == ASKED


def test_fields_of_no_format_are_listed_beside_the_formats_that_there_are() -> None:
    with pytest.raises(RowError) as caught:
        detect({"question": "q", "answer": "a"})
    said = str(caught.value)
    assert "['answer', 'question']" in said
    assert all(name in said for name in FORMATS)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a missing field": ("prompt-completion", {"prompt": "q", "compl": "a"}, r"'response' is needed, found \['compl'"),
    "a misspelt field": ("alpaca", {"instruction": "q", "outptu": "a"}, "'output' is needed.*Did you mean 'outptu'"),
    "a null field": ("alpaca", {"instruction": None, "output": "a"}, "'instruction' is needed, it is null"),
    "a number for text": ("text", {"text": 12.5}, "'text' must be text, this is a float: 12.5"),
    "a mapping for text": ("prompt-completion", {"prompt": {"a": 1}, "completion": "a"}, "this is a dict"),
    "a system that is no text": ("alpaca", {"system": 5, "instruction": "q", "output": "a"}, "'system' must be text"),
    "messages of another format": ("messages", {"prompt": "q"}, r"'messages' is needed, found \['prompt'\]"),
    "messages that are null": ("messages", {"messages": None}, "'messages' is needed, it is null"),
    "messages as text": ("messages", {"messages": "hello"}, "must be a list of at least one message.*'hello'"),
    "no messages": ("messages", {"messages": []}, r"must be a list of at least one message, this is \[\]"),
    "a message as text": ("messages", {"messages": ["hello"]}, r"messages\[0\] must be a mapping.*'role'.*'hello'"),
    "a misspelt role": (
        "messages",
        {"messages": [{"role": "user", "content": "q"}, {"role": "asistant", "content": "a"}]},
        r"messages\[1\]: role is 'asistant', which is no role. Did you mean 'assistant'\?",
    ),
    "an unknown role": (
        "sharegpt",
        {"conversations": [{"from": "xyz", "value": "q"}]},
        r"conversations\[0\]: from is 'xyz', which is no role. There is: .*gpt, human",
    ),
    "a role that is a list": ("messages", {"messages": [{"role": ["user"], "content": "q"}]}, "'role' must be text"),
    "keys of another format": (
        "sharegpt",
        {"conversations": [{"role": "user", "content": "q"}]},
        r"conversations\[0\]: field 'from' is needed, found \['content', 'role'\]",
    ),
    "content in parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        r"messages\[0\]: field 'content' must be text, this is a list",
    ),
    "no content": ("messages", {"messages": [{"role": "user"}]}, r"messages\[0\]: field 'content' is needed, found"),
    "tool calls": (
        "messages",
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        r"messages\[0\] holds tool_calls.*leave such rows out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_refused_with_what_was_found(case: str) -> None:
    name, row, said = WRONG[case]
    with pytest.raises(RowError, match=said):
        FORMATS[name](row)


@pytest.mark.parametrize("empty", ["", " ", "\n\t "])
def test_an_empty_answer_is_refused_and_its_place_is_said(empty: str) -> None:
    with pytest.raises(RowError, match=r"message 2 \(assistant\) is empty"):
        check([Message("user", "q"), Message("assistant", empty)])
    with pytest.raises(RowError, match=r"message 1 \(text\) is empty"):
        check([Message(TEXT, empty)])


def test_an_empty_question_or_system_is_allowed() -> None:
    conversation = [Message("system", ""), Message("user", ""), Message("assistant", "a")]
    check(conversation)
    assert [m.content for m in conversation] == ["", "", "a"]


def test_a_conversation_without_an_answer_is_refused_with_its_roles() -> None:
    with pytest.raises(RowError, match=r"no assistant message among \['system', 'user'\]"):
        check([SYSTEM, Message("user", "q")])


def test_characters_that_are_no_text_are_refused_with_their_place() -> None:
    with pytest.raises(RowError, match=r"message 1 \(user\) contains a NUL"):
        check([Message("user", "a\0b"), Message("assistant", "a")])
    with pytest.raises(RowError, match=r"message 2 \(assistant\) contains a lone surrogate \('\\ud800' at character 1"):
        check([Message("user", "q"), Message("assistant", "a\ud800")])
