"""Row -> conversation, for every format; what is wrong with a row is said with what was found."""

import json
from typing import Any

import pytest

from graftlm.data.sources.formats import FORMATS, TEXT, Message, RowError, check, detect

ASKED = [Message("user", "q"), Message("assistant", "a")]
SYSTEM = Message("system", "s")
ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
JSON_CALL = {"name": "f", "arguments": '{"x": 1}'}
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def answer(**more: Any) -> Message:
    return Message("assistant", "a", **more)


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
    "messages with a developer": (
        "messages",
        {"messages": [{"role": "developer", "content": "s"}, *turns("q", "a")]},
        [SYSTEM, *ASKED],
    ),
    "messages with a system field": ("messages", {"system": "s", "messages": turns("q", "a")}, [SYSTEM, *ASKED]),
    "messages in parts, with a name": (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "name": "ann",
                    "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}],
                },
                {"role": "assistant", "content": "a"},
            ]
        },
        [Message("user", "qr"), ASKED[1]],
    ),
    "messages with thoughts": (
        "messages",
        {"messages": [ASK, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
        [ASKED[0], Message("assistant", "a", thinking="hm")],
    ),
    "messages with weights": (
        "messages",
        {
            "messages": [
                *turns("q", "a"),
                {"role": "user", "content": "r", "weight": 0.5},
                {**SAY, "weight": 0},
                *turns("q", "a"),
            ]
        },
        [*ASKED, Message("user", "r", weight=0.5), Message("assistant", "a", weight=0), *ASKED],
    ),
    "messages with ms-swift's losses": (
        "messages",
        {
            "messages": [
                {**ASK, "loss": True},
                {**SAY, "loss": False},
                ASK,
                {**SAY, "loss": True},
                ASK,
                {**SAY, "loss_scale": 2.5},
            ]
        },
        [ASKED[0], answer(weight=0.0), ASKED[0], answer(weight=1.0), ASKED[0], answer(weight=2.5)],
    ),
    "messages with weights of characters": (
        "messages",
        {"messages": [ASK, {"role": "assistant", "content": "abc", "spans": [[0, 1, 0], [2, 3, 0.5]]}]},
        [ASKED[0], Message("assistant", "abc", spans=((0, 1, 0.0), (2, 3, 0.5)))],
    ),
    "messages with parts that are trained or not": (
        "messages",
        {"messages": [ASK, {"role": "assistant", "content": [{"text": "ab", "train": False}, {"text": "c"}]}]},
        [ASKED[0], Message("assistant", "abc", spans=((0, 2, 0.0),))],
    ),
    "messages with tool calls": (
        "messages",
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": JSON_CALL}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "t"},
                SAY,
            ]
        },
        [ASKED[0], Message("assistant", "", ({"id": "1", **CALLED},)), Message("tool", "t", call_id="1"), ASKED[1]],
    ),
    "messages with OpenAI's older calls": (
        "messages",
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "function_call": JSON_CALL},
                {"role": "function", "name": "f", "content": "t"},
                SAY,
            ]
        },
        [ASKED[0], Message("assistant", "", (CALLED,)), Message("tool", "t", name="f"), ASKED[1]],
    ),
    "sharegpt with a function call": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": 1}})},
                {"from": "observation", "value": "t"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [ASKED[0], Message("assistant", "", (CALLED,)), Message("tool", "t"), ASKED[1]],
    ),
    "sharegpt with roles and contents": ("sharegpt", {"conversations": turns("q", "a")}, ASKED),
    "sharegpt with roles and values": (
        "sharegpt",
        {"conversation": [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}]},
        ASKED,
    ),
    "sharegpt in pairs": (
        "sharegpt",
        {"system": "s", "conversation": [{"human": "q", "assistant": "a"}] * 2},
        [SYSTEM, *ASKED, *ASKED],
    ),
    "alpaca with a system and a history": (
        "alpaca",
        {"system": "s", "instruction": "q", "output": "a", "history": [["q", "a"], ["q", "a"]]},
        [SYSTEM, *ASKED, *ASKED, *ASKED],
    ),
    "query and response with a history": (
        "prompt-completion",
        {"query": "q", "response": "a", "history": [["q", "a"]]},
        [*ASKED, *ASKED],
    ),
    "flan": ("inputs-targets", {"inputs": "q", "targets": "a", "task": "x"}, ASKED),
    "p3": (
        "inputs-targets",
        {"inputs": [1], "inputs_pretokenized": "q", "targets_pretokenized": "a", "targets": [2]},
        ASKED,
    ),
    "an instance of natural instructions": (
        "natural-instructions",
        {"Definition": ["Do it."], "input": "q", "output": ["a", "b"], "id": "x"},
        [Message("user", "Do it.\n\nq"), ASKED[1]],
    ),
    "natural instructions in one row": (
        "natural-instructions",
        {"definition": "Do it.", "inputs": "", "targets": "a"},
        [Message("user", "Do it."), ASKED[1]],
    ),
    "a pair": ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, ASKED),
    "feedback": ("feedback", {"prompt": "q", "completion": "a", "label": True}, ASKED),
    "a ranked list": ("ranked", {"prompt": "q", "responses": ["b", "a"], "scores": [1, 2]}, ASKED),
    "a question alone": ("prompt", {"prompt": "q"}, ASKED[:1]),
    "a question after a system and a history": (
        "prompt",
        {"query": "q", "system": "s", "history": [["q", "a"]]},
        [SYSTEM, *ASKED, ASKED[0]],
    ),
    "text": ("text", {"text": " raw \n", "meta": 1}, [Message(TEXT, " raw \n")]),
}

OTHER = [ASKED[0], Message("assistant", "b")]
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "alpaca's question": {"instruction": "q", "chosen": "a", "rejected": "b"},
    "a prompt of messages": {"prompt": turns("q"), "chosen": [SAY], "rejected": turns("q", "b")[1:]},
    "whole conversations": {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
    "whole conversations and their prompt": {"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
    "HH-RLHF's texts": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b\n"},
    "conversations and single messages": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "ms-swift's rejected response": {"messages": turns("q", "a"), "rejected_response": "b"},
    "ms-swift's query": {"query": "q", "response": "a", "rejected_response": "b"},
    "ms-swift's rejected messages": {"messages": turns("q", "a"), "rejected_messages": turns("q", "b")},
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_keeps_what_was_rejected_as_a_whole_conversation(case: str) -> None:
    assert detect(PAIRS[case]) == "preference"
    found = FORMATS["preference"](PAIRS[case])
    assert (found.messages, found.rejected) == (ASKED, (OTHER,))


def test_conversations_that_part_early_are_kept_whole() -> None:
    chosen, rejected = turns("q", "a", "r", "c"), turns("q", "b", "s", "d")
    found = FORMATS["preference"]({"chosen": chosen, "rejected": rejected})
    assert [m.content for m in found.messages] == ["q", "a", "r", "c"]
    assert [m.content for m in found.rejected[0]] == ["q", "b", "s", "d"]


@pytest.mark.parametrize("key", ["label", "desirable", "kto_tag"])
@pytest.mark.parametrize("liked", [True, False])
def test_feedback_is_kept_beside_any_conversation(key: str, liked: bool) -> None:
    for row in ({"prompt": "q", "completion": "a"}, {"messages": turns("q", "a")}, {"instruction": "q", "output": "a"}):
        name = detect({**row, key: liked})
        found = FORMATS[name]({**row, key: liked})
        assert (found.messages, found.desirable) == (ASKED, liked)
    assert FORMATS["feedback"]({"prompt": "q", "completion": "a", "label": "false"}).desirable is False, (
        "csv has only text"
    )


@pytest.mark.parametrize("label", ["True", "false", "TRUE"])
def test_feedback_in_a_csv_file_is_text(label: str) -> None:
    row = {"prompt": "q", "completion": "a", "label": label}
    assert detect(row) == "feedback"
    assert FORMATS["feedback"](row).desirable is (label.lower() == "true")


@pytest.mark.parametrize("key", ["desirable", "kto_tag"])
def test_feedback_that_is_neither_true_nor_false_is_refused_and_not_passed_over(key: str) -> None:
    row = {"instruction": "q", "output": "a", key: 0}
    assert detect(row) == "feedback"
    with pytest.raises(RowError, match=f"field '{key}' must be true or false, this is 0"):
        FORMATS["feedback"](row)


def test_a_label_that_is_a_class_is_no_feedback() -> None:
    assert detect({"prompt": "q", "completion": "a", "label": 1}) == "prompt-completion"
    assert FORMATS["prompt-completion"]({"prompt": "q", "completion": "a", "label": 1}).desirable is None


@pytest.mark.parametrize("order", [{"scores": [0.5, 3, 1]}, {"ranks": [3, 1, 2]}])
def test_the_best_of_a_ranked_list_is_the_answer_and_the_others_follow_in_order(order: dict[str, Any]) -> None:
    found = FORMATS["ranked"]({"prompt": "q", "responses": ["c", "a", "b"], **order})
    assert found.messages == ASKED
    assert [other[-1].content for other in found.rejected] == ["b", "c"]


def test_what_is_as_good_as_the_best_is_not_rejected() -> None:
    found = FORMATS["ranked"]({"prompt": "q", "completions": ["a", "b", "c"], "scores": [2, 2, 1]})
    assert (found.messages, [other[-1].content for other in found.rejected]) == (ASKED, ["c"])


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]', {"type": "function", "function": {"name": "f"}}])
def test_tools_are_functions_as_openai_has_them(tools: Any) -> None:
    for row in ({"messages": turns("q", "a")}, {"conversations": turns("q", "a")}, {"prompt": "q", "completion": "a"}):
        assert FORMATS[detect(row)]({**row, "tools": tools}).tools == ({"type": "function", "function": {"name": "f"}},)
        for nothing in (None, "", []):
            assert FORMATS[detect(row)]({**row, "tools": nothing}).tools == ()


def test_a_part_that_is_converted_keeps_what_it_had() -> None:
    row = {"messages": turns("q", "a"), "rejected": [turns("q", "b"), turns("q", "c")], "desirable": True}
    found = FORMATS[detect(row)](row)
    assert (detect(row), found.messages, found.desirable) == ("messages", ASKED, True)
    assert [other[-1].content for other in found.rejected] == ["b", "c"]


def test_every_format_has_a_row_here() -> None:
    assert {name for name, _, _ in ROWS.values()} == set(FORMATS)


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_detected_and_becomes_messages(case: str) -> None:
    name, row, wanted = ROWS[case]
    assert detect(row) == name
    found = FORMATS[name](row)
    assert found.messages == wanted
    assert found.asks == (name == "prompt")
    assert check(wanted, asks=found.asks) == []


@pytest.mark.parametrize("role", ["human", "user"])
def test_the_roles_of_sharegpt_have_their_usual_names(role: str) -> None:
    turns = [{"from": role, "value": "q"}, {"from": "assistant", "value": "a"}]
    assert FORMATS["sharegpt"]({"conversations": turns}).messages == ASKED


def test_fields_of_no_format_are_listed_beside_the_formats_that_there_are() -> None:
    with pytest.raises(RowError) as caught:
        detect({"title": "q", "reply": "a"})
    message = str(caught.value)
    assert "['reply', 'title']" in message
    assert all(name in message for name in FORMATS)


def asks(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}]
    }


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a missing field": ("prompt-completion", {"prompt": "q", "compl": "a"}, r"'completion' is needed, found \['compl'"),
    "a misspelt field": ("alpaca", {"instruction": "q", "outptu": "a"}, "'output' is needed.*Did you mean 'outptu'"),
    "a null field": ("alpaca", {"instruction": None, "output": "a"}, "'instruction' is needed, it is null"),
    "a number for text": ("text", {"text": 12.5}, "'text' must be text, this is a float: 12.5"),
    "a mapping for text": ("prompt-completion", {"prompt": {"a": 1}, "completion": "a"}, "this is a dict"),
    "a system that is no text": ("alpaca", {"system": 5, "instruction": "q", "output": "a"}, "'system' must be text"),
    "messages of another format": ("messages", {"prompt": "q"}, r"'messages' is needed, found \['prompt'\]"),
    "messages that are null": ("messages", {"messages": None}, "'messages' is needed, it is null"),
    "messages as text": ("messages", {"messages": "hello"}, "must be a list of at least one message.*'hello'"),
    "no messages": ("messages", {"messages": []}, r"must be a list of at least one message, this is \[\]"),
    "a message as text": (
        "messages",
        {"messages": ["hello"]},
        r"messages\[0\]: a message must be a mapping.*'role'.*'hello'",
    ),
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
    "a turn of no dialect": (
        "sharegpt",
        {"conversations": [{"speaker": "user", "content": "q"}]},
        r"conversations\[0\]: field 'from' is needed, found \['content', 'speaker'\]",
    ),
    "a picture": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        r"messages\[0\]: content holds a part of the type 'image_url': only text",
    ),
    "two system messages": (
        "messages",
        {"system": "t", "messages": [{"role": "system", "content": "s"}, ASK, SAY]},
        "two different system messages",
    ),
    "a role in capitals": (
        "messages",
        {"messages": [{"role": "ASSISTANT", "content": "q"}]},
        r"messages\[0\]: role is 'ASSISTANT', which is no role. Did you mean 'assistant'\?",
    ),
    "a history that is no list of pairs": (
        "alpaca",
        {"instruction": "q", "output": "a", "history": [["q"]]},
        r"field 'history' must be a list of \[question, answer\]",
    ),
    "no content": ("messages", {"messages": [{"role": "user"}]}, r"messages\[0\]: field 'content' is needed, found"),
    "a call without a name": (
        "messages",
        asks({"arguments": "{}"}),
        r"messages\[1\]: tool_calls\[0\] names no function",
    ),
    "a call that is no mapping": ("messages", {"messages": [{**SAY, "tool_calls": ["f"]}]}, "must be a mapping.*'f'"),
    "calls that are no list": ("messages", {"messages": [{**SAY, "tool_calls": 7}]}, "tool_calls must be a list"),
    "arguments that are no JSON": (
        "messages",
        asks({"name": "f", "arguments": "{x"}),
        r"tool_calls\[0\]: arguments is not valid JSON",
    ),
    "arguments that are a list": ("messages", asks({"name": "f", "arguments": "[1]"}), "must be a mapping or its JSON"),
    "a question that calls": ("messages", {"messages": [{**ASK, "tool_calls": [CALLED]}]}, "only an assistant calls"),
    "a function call that is no JSON": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "find it"}]},
        r"conversations\[0\]: value is not valid JSON",
    ),
    "tools that are no JSON": ("messages", {"messages": [ASK, SAY], "tools": "f"}, "tools is not valid JSON"),
    "a tool without a name": (
        "messages",
        {"messages": [ASK, SAY], "tools": [{"x": 1}]},
        r"tools\[0\] names no function",
    ),
    "a weight above 1": ("messages", {"messages": [ASK, {**SAY, "weight": 2}]}, "weight is 2, out of range"),
    "a weight that is no number": ("messages", {"messages": [ASK, {**SAY, "weight": True}]}, "weight must be a number"),
    "a negative scale": ("messages", {"messages": [ASK, {**SAY, "loss_scale": -1}]}, "loss_scale is -1, out of range"),
    "a loss that is a number": ("messages", {"messages": [ASK, {**SAY, "loss": 1}]}, "loss must be true or false"),
    "spans out of order": (
        "messages",
        {"messages": [ASK, {**SAY, "content": "abc", "spans": [[1, 2, 0], [0, 1, 0]]}]},
        r"span \[0, 1, 0\] is out of order",
    ),
    "a span outside the text": (
        "messages",
        {"messages": [ASK, {**SAY, "spans": [[0, 2, 0]]}]},
        "outside the text, which has 1 characters",
    ),
    "a span of two numbers": ("messages", {"messages": [ASK, {**SAY, "spans": [[0, 1]]}]}, "a span must be"),
    "rejected that is one conversation": (
        "messages",
        {"messages": turns("q", "a"), "rejected": turns("q")},
        "a list of conv",
    ),
    "nothing in common": (
        "preference",
        {"chosen": turns("q", "a"), "rejected": turns("r", "b")},
        "no beginning in common",
    ),
    "a pair of the same": ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
    "a pair without a question": ("preference", {"chosen": "a", "rejected": "b"}, "'prompt' is needed"),
    "feedback that is no flag": (
        "feedback",
        {"prompt": "q", "completion": "a", "label": 3},
        "'label' must be true or false",
    ),
    "feedback on nothing": ("feedback", {"label": True, "x": 1}, "hold no conversation"),
    "scores of others": ("ranked", {"prompt": "q", "responses": ["a"], "scores": [1, 2]}, "1 responses and 2 scores"),
    "scores that are text": ("ranked", {"prompt": "q", "responses": ["a"], "scores": ["1"]}, "scores must be numbers"),
    "scores that are all the same": (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]},
        "all scores",
    ),
    "no outputs": ("natural-instructions", {"Definition": "d", "input": "i", "output": []}, "'output' must be text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_refused_with_what_was_found(case: str) -> None:
    name, row, message = WRONG[case]
    with pytest.raises(RowError, match=message):
        FORMATS[name](row)


@pytest.mark.parametrize("empty", ["", " ", "\n\t ", "\u200b", "\ufeff \u2060"])
def test_an_empty_answer_is_refused_and_its_place_is_said(empty: str) -> None:
    with pytest.raises(RowError, match=r"message 2 \(assistant\) is (empty|blank)"):
        check([Message("user", "q"), Message("assistant", empty)])
    with pytest.raises(RowError, match=r"message 1 \(text\) is (empty|blank)"):
        check([Message(TEXT, empty)])


def test_an_empty_question_or_system_is_allowed() -> None:
    conversation = [Message("system", ""), Message("user", ""), Message("assistant", "a")]
    check(conversation)
    assert [m.content for m in conversation] == ["", "", "a"]


def test_a_conversation_without_an_answer_is_refused_with_its_roles() -> None:
    with pytest.raises(RowError, match=r"no assistant message among \['system', 'user'\]"):
        check([SYSTEM, Message("user", "q")])


def test_a_question_needs_no_answer_where_the_model_gives_it() -> None:
    for row in ({"messages": turns("q")}, {"instruction": "q", "group": 3}, {"prompt": turns("q")}):
        found = FORMATS["prompt"](row)
        assert (found.messages, found.asks) == (ASKED[:1], True)
    for row in ({"messages": turns("q", "a")}, {"prompt": "q", "completion": "a"}):
        assert FORMATS["prompt"](row).messages == ASKED, "an answer that is there is kept, to compare with"
    with pytest.raises(RowError, match="a system message and no question"):
        check([SYSTEM], asks=True)
    with pytest.raises(RowError, match="fit no known format"):
        detect({"prompt": "q", "awnser": "a"})


def test_characters_that_are_no_text_are_refused_with_their_place() -> None:
    with pytest.raises(RowError, match=r"message 1 \(user\) contains a NUL"):
        check([Message("user", "a\0b"), Message("assistant", "a")])
    with pytest.raises(RowError, match=r"message 2 \(assistant\) contains a lone surrogate \('\\ud800' at character 1"):
        check([Message("user", "q"), Message("assistant", "a\ud800")])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("user user assistant", r"message 2 \(user\): two questions follow each other"),
        ("user assistant assistant", r"message 3 \(assistant\): two answers follow each other"),
        ("assistant", r"message 1 \(assistant\): the conversation begins with an answer"),
        ("user system assistant", r"message 2 \(system\) comes late"),
        ("user tool assistant", r"message 2 \(tool\) is the result of a tool that no assistant has called"),
    ],
)
def test_turns_in_an_order_that_means_nothing_are_refused(roles: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        check([Message(role, "x") for role in roles.split()])


def test_a_question_at_the_end_is_told_and_allowed() -> None:
    assert check([*ASKED, ASKED[0]]) == ["ends with a user message, which trains nothing"]
    assert check([*ASKED, Message("tool", "t")]) == ["ends with a tool message, which trains nothing"]
    assert check([SYSTEM, *ASKED, Message("tool", "t"), Message("tool", "u"), ASKED[1]]) == []


def test_a_row_whose_answers_have_no_weight_is_refused() -> None:
    with pytest.raises(RowError, match="every answer has the weight 0"):
        check([ASKED[0], answer(weight=0.0)])
    check([ASKED[0], answer(weight=0.0), *ASKED])
    check([Message("user", "q", weight=0.5), answer(weight=0.0)])
    check([ASKED[0], answer(weight=0.0, spans=((0, 1, 1.0),))])


def test_thoughts_are_looked_at_too_and_a_single_lost_character_is_allowed() -> None:
    with pytest.raises(RowError, match="NUL"):
        check([ASKED[0], answer(thinking="\0")])
    with pytest.raises(RowError, match=r"has lost characters: U\+FFFD several times from character 1 on"):
        check([Message("user", "a\ufffd\ufffd"), ASKED[1]])
    check([Message("user", "a\ufffd, b\ufffd"), ASKED[1]])
