"""What LLaMA-Factory and Axolotl describe, read as it is; and what they say that we cannot do, refused by name."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftlm.data.sources import llama_factory
from graftlm.data.sources.axolotl import is_axolotl
from graftlm.data.sources.axolotl import parts as axolotl_parts
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.records import Problem
from graftlm.data.sources.source import Row
from tests.data.sources.test_damage import changed
from tests.errors import raises

ASKED = [Message("user", "q"), Message("assistant", "a")]
SYSTEM = Message("system", "s")


def factory(folder: Path, entry: dict[str, Any], *rows: dict[str, Any], name: str = "rows.json") -> list[Row]:
    (folder / name).write_text(json.dumps(list(rows)))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": name, **entry}, "other": {}}))
    return load_rows(f"{folder}/dataset_info.json:mine")[0]


def axolotl(folder: Path, entry: dict[str, Any], *rows: dict[str, Any], **top: Any) -> list[Row]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"base_model": "x", **top, "datasets": [{"path": "rows.jsonl", "type": "chat_template", **entry}]}
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(config))
    return load_rows(f"{folder}/axolotl.yaml")[0]


# LLaMA-Factory -------------------------------------------------------------------------------------------------------


def test_an_entry_without_columns_is_alpaca_with_input_on_the_next_line(tmp_path: Path) -> None:
    (row,) = factory(tmp_path, {}, {"instruction": "q", "input": "i", "output": "a", "system": "not named, not read"})
    assert row.messages == [Message("user", "q\ni"), Message("assistant", "a")]
    assert row.where.startswith(str(tmp_path / "rows.json"))


def test_the_columns_of_alpaca_are_named(tmp_path: Path) -> None:
    columns = {"prompt": "ask", "query": "more", "response": "say", "system": "sys", "history": "past", "tools": "t"}
    record = {"ask": "q", "more": None, "say": "a", "sys": "s", "past": [["b", "c"]], "t": '[{"name": "f"}]'}
    (row,) = factory(tmp_path, {"columns": columns}, record)
    assert row.messages == [SYSTEM, Message("user", "b"), Message("assistant", "c"), *ASKED]
    assert row.tools == ({"type": "function", "function": {"name": "f"}},)


def test_only_a_prompt_is_raw_text(tmp_path: Path) -> None:
    (row,) = factory(tmp_path, {"columns": {"prompt": "text"}}, {"text": "raw"})
    assert row.messages == [Message(TEXT, "raw")]


def test_rankings_and_feedback_keep_what_was_liked_less(tmp_path: Path) -> None:
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (row,) = factory(tmp_path, {"ranking": True, "columns": columns}, {"q": "q", "good": "a", "bad": "b"})
    assert (row.messages, row.rejected) == (ASKED, ([ASKED[0], Message("assistant", "b")],))
    columns = {"prompt": "q", "response": "r", "kto_tag": "tag"}
    (row,) = factory(tmp_path, {"columns": columns}, {"q": "q", "r": "a", "tag": False})
    assert (row.messages, row.desirable) == (ASKED, False)


def test_sharegpt_with_tags_of_its_own(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A", "function_tag": "F"}
    turns = [
        {"who": "U", "says": "q"},
        {"who": "F", "says": '{"name": "f", "arguments": {"x": 1}}'},
        {"who": "observation", "says": "1"},
        {"who": "A", "says": "a"},
    ]
    entry = {"formatting": "sharegpt", "columns": {"messages": "talk", "system": "sys"}, "tags": tags}
    (row,) = factory(tmp_path, entry, {"talk": turns, "sys": "s"})
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    wanted = [SYSTEM, ASKED[0], Message("assistant", "", (call,)), Message("tool", "1"), ASKED[1]]
    assert row.messages == wanted
    turns[0]["who"] = "gpt"
    with raises("data/unusable-rows", match=r"talk\[0\]: who is 'gpt', which is none of the tags"):
        factory(tmp_path, entry, {"talk": turns, "sys": "s"})


def test_a_system_message_in_the_list_goes_before_the_column(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "sys"}}
    assert factory(tmp_path, entry, {"conversations": turns, "sys": "other"})[0].messages == [SYSTEM, *ASKED]


def test_a_ranking_of_sharegpt_has_single_messages(tmp_path: Path) -> None:
    entry = {
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    }
    question = [{"from": "human", "value": "q"}]
    record = {
        "conversations": question,
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    (row,) = factory(tmp_path, entry, record)
    assert (row.messages, row.rejected) == (ASKED, ([ASKED[0], Message("assistant", "b")],))


def test_openai_has_openai_s_tags(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert factory(tmp_path, {"formatting": "openai"}, {"messages": turns})[0].messages == ASKED


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        ({"colums": {}}, "data/unknown-key", "mine: colums: unknown key. Did you mean 'columns'"),
        ({"num_samples": 5}, "data/unsupported-setting", "mine: num_samples: 5"),
        ({"columns": {"prompt": "q", "images": "i"}}, "data/unsupported-setting", "columns: images: 'i'"),
        ({"formatting": "sharegt"}, "data/unknown-format", "'sharegt' is not known. Did you mean 'sharegpt'"),
        ({"script_url": "x"}, "data/unsupported-setting", "script_url: 'x'"),
        ({"ranking": True, "columns": {"prompt": "q", "chosen": "c"}}, "data/missing-key", "'rejected'"),
        ({"split": "test"}, "data/unsupported-setting", "split"),
        ({"subset": "en"}, "data/unsupported-setting", "subset"),
    ],
)
def test_what_an_entry_says_and_we_cannot_do_is_named(
    entry: dict[str, Any], code: str, message: str, tmp_path: Path
) -> None:
    with raises(code) as caught:
        factory(tmp_path, entry, {"q": "q", "c": "a"})
    assert message in str(caught.value)


def test_a_data_set_of_the_hub_goes_before_other_places_and_keeps_its_subset(tmp_path: Path) -> None:
    entry = {"hf_hub_url": "org/name", "ms_hub_url": "other/name", "subset": "en", "split": "train[:5]"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert llama_factory.part(tmp_path / "dataset_info.json", "mine").path == "hub:org/name@en:train[:5]"
    (tmp_path / "axolotl.yaml").write_text("datasets: [{path: org/name, name: en, type: 'alpaca:chat'}]")
    (part,) = axolotl_parts(tmp_path / "axolotl.yaml")
    assert (part.path, part.format) == ("hub:org/name@en:train", "alpaca")


def test_a_name_that_is_not_described_is_refused_with_those_that_are(tmp_path: Path) -> None:
    factory(tmp_path, {}, {"instruction": "q", "output": "a"})
    with raises("data/no-such-data-set", match="'mne'. Did you mean 'mine'"):
        load_rows(f"{tmp_path}/dataset_info.json:mne")
    with raises("data/not-a-list", match="dataset_info.json:NAME. There is: mine, other"):
        load_rows(f"{tmp_path}/dataset_info.json")


@pytest.mark.parametrize("kind", ["alpaca", "sharegpt", "openai", "axolotl"])
def test_no_row_however_odd_is_more_than_a_row_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    chance = random.Random(kind)
    record: dict[str, Any] = {"instruction": "q", "input": "i", "output": "a", "history": [["b", "c"]], "s": "s"}
    columns = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "s"}
    if kind != "alpaca":
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]
        turns[1] |= {"detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}  # type: ignore[dict-item]
        record = {"messages": turns, "system": "s", "tools": [{"name": "f"}]}
        columns = {"messages": "messages", "system": "system", "tools": "tools"}
    rows = [record, *(changed(record, chance) for _ in range(2000))]
    lines = "".join(json.dumps(row).replace("Infinity", "null") + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags = {"tags": openai} if kind == "sharegpt" else {}
    described: dict[str, Any] = {"mine": {"file_name": "rows.jsonl", "formatting": kind, "columns": columns} | tags}
    name = "dataset_info.json:mine"
    if kind == "axolotl":
        detail = {"message_field_training": "train", "message_field_training_detail": "detail"}
        described = {"datasets": [{"path": "rows.jsonl", "type": "chat_template", **detail}]}
        name = "axolotl.yaml"
    (tmp_path / name.removesuffix(":mine")).write_text(json.dumps(described))
    problems: list[Problem] = []
    usable, _ = load_rows(f"{tmp_path}/{name}", problems=problems)
    assert len(usable) + sum(p.left_out for p in problems) == len(rows)
    assert usable[0].messages[-1].content in ("a", "abc")


# Axolotl -------------------------------------------------------------------------------------------------------------

TURNS = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_a_chat_template_entry_is_messages(tmp_path: Path) -> None:
    assert axolotl(tmp_path, {}, TURNS)[0].messages == ASKED
    assert is_axolotl(tmp_path / "axolotl.yaml")
    (tmp_path / "recipe.yaml").write_text("data: {train: rows.jsonl}\n")
    assert not is_axolotl(tmp_path / "recipe.yaml")


def test_properties_and_roles_are_mapped(tmp_path: Path) -> None:
    entry = {
        "field_messages": "talk",
        "field_system": "sys",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["me"], "assistant": ["it"]},
    }
    record = {"talk": [{"from": "me", "value": "q"}, {"from": "it", "value": "a"}], "sys": "s"}
    assert axolotl(tmp_path, entry, record)[0].messages == [SYSTEM, *ASKED]
    assert axolotl(tmp_path, entry | {"drop_system_message": True}, record)[0].messages == ASKED
    with raises("data/unusable-rows", match=r"talk\[0\]: from is 'gpt', which is no role"):
        axolotl(tmp_path, entry, {"talk": [{"from": "gpt", "value": "q"}]})


def test_roles_to_train_are_weights(tmp_path: Path) -> None:
    (row,) = axolotl(tmp_path, {"roles_to_train": ["human"]}, TURNS)
    assert [m.weight for m in row.messages] == [1.0, 0.0]
    (row,) = axolotl(tmp_path, {}, TURNS)
    assert [m.weight for m in row.messages] == [None, None], "without it the mask decides"


def test_turns_and_characters_have_weights_of_their_own(tmp_path: Path) -> None:
    """The ranges of Axolotl's documentation: both ends are included, and what is in no range is not trained."""
    detail = [
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 9, "end_offset": 18, "train": True},
        {"begin_offset": 20, "end_offset": 29, "train": True},
    ]
    answer = "I'm doing very well, thank you!"
    talk = [
        {"from": "human", "value": "q", "train": True},
        {"from": "assistant", "value": "a", "train": False},
        {"from": "human", "value": "r"},
        {"from": "assistant", "value": answer, "train_detail": detail},
    ]
    entry = {
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles_to_train": [],
        "train_on_eos": "turn",
        "message_field_training": "train",
        "message_field_training_detail": "train_detail",
    }
    (row,) = axolotl(tmp_path, entry, {"conversations": talk})
    assert [m.weight for m in row.messages] == [1.0, 0.0, 0.0, 1.0]
    spans = row.messages[-1].spans
    assert [(answer[start:end], weight) for start, end, weight in spans] == [
        ("I'm doing", 0.0),
        (" very well", 1.0),
        (",", 0.0),
        (" thank you", 1.0),
        ("!", 0.0),
    ]
    detail[0]["end_offset"] = 9
    with raises("data/unusable-rows", match=r"conversations\[3\]: train_detail: 9 to 18 is out of range or twice"):
        axolotl(tmp_path, entry, {"conversations": talk})


def test_completion_and_alpaca_and_files_beside_the_description(tmp_path: Path) -> None:
    assert axolotl(tmp_path, {"type": "completion", "field": "doc"}, {"doc": "raw"})[0].messages == [
        Message(TEXT, "raw")
    ]
    assert axolotl(tmp_path, {"type": "alpaca"}, {"instruction": "q", "output": "a"})[0].messages == ASKED
    entry = {"path": "json", "data_files": ["rows.jsonl"], "ds_type": "json"}
    assert axolotl(tmp_path, entry, TURNS)[0].messages == ASKED


def test_several_entries_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(TURNS))
    (tmp_path / "b.jsonl").write_text('{"text": "raw"}')
    entries = [{"path": "a.jsonl", "type": "chat_template"}, {"path": "b.jsonl", "type": "completion"}]
    (tmp_path / "axolotl.yml").write_text(yaml.safe_dump({"datasets": entries}))
    rows, name = load_rows(str(tmp_path / "axolotl.yml"))
    assert [row.messages[0].role for row in rows] == ["user", TEXT]
    assert name == "messages, text"


def test_a_template_of_the_whole_file_is_told_and_not_used(tmp_path: Path) -> None:
    problems: list[Problem] = []
    axolotl(tmp_path, {}, TURNS, chat_template="chatml")
    load_rows(f"{tmp_path}/axolotl.yaml", problems=problems)
    assert [p.left_out for p in problems] == [False]
    assert "chat_template: 'chatml' is not used" in str(problems[0])


@pytest.mark.parametrize(
    ("entry", "top", "code", "message"),
    [
        ({"field_mesages": "x"}, {}, "data/unknown-key", "field_mesages: unknown key. Did you mean 'field_messages'"),
        ({"type": "input_output"}, {}, "data/unknown-format", "'input_output' is not read. Known: chat_template"),
        ({"type": None, "typ": "alpaca"}, {}, "data/unknown-key", "typ: unknown key. Did you mean 'type'"),
        ({"train_on_eos": "last"}, {}, "data/unsupported-setting", "train_on_eos: 'last'"),
        ({"chat_template": "chatml"}, {}, "data/unsupported-setting", "chat_template: 'chatml'"),
        ({"shards": 4}, {}, "data/unsupported-setting", "shards: 4"),
        ({"roles_to_train": []}, {}, "data/no-trained-roles", "roles_to_train"),
        ({"roles": {"wizard": ["w"]}}, {}, "data/unknown-role", "roles: wizard"),
        ({"message_property_mappings": {"age": "x"}}, {}, "data/unknown-message-property", "age"),
        ({}, {"train_on_inputs": True}, "data/unsupported-setting", "train_on_inputs: true"),
    ],
)
def test_what_axolotl_says_and_we_cannot_do_is_named(
    entry: dict[str, Any], top: dict[str, Any], code: str, message: str, tmp_path: Path
) -> None:
    with raises(code) as caught:
        axolotl(tmp_path, entry, TURNS, **top)
    assert message in str(caught.value)
