"""Answers that are compared and have several turns, on chat templates that rewrite earlier turns: calls of tools, what
follows their results, and thoughts."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graftlm
from graftlm.config.schema import build
from graftlm.data.batches.groups import mismatched_groups, prepare_groups
from graftlm.data.batches.pack import Group, collate
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig, Row
from graftlm.losses.base import lengths, per_answer
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.recipe import Recipe
from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer
from graftlm.training.objective import batch_of
from tests.cases.test_masks_and_templates import assistant, call, shipped, tool, user

END = "<|im_end|>"
RESULT = {"role": "tool", "content": "9 degrees", "name": "get_weather"}
LOOKS = assistant(None, tool_calls=[call("get_weather", city="Rome")])
SAYS = assistant("Cold.", reasoning_content="9 is cold.")
GUESSES = assistant("Warm.", reasoning_content="Rome is warm.")
PAIR = {"prompt": [user("Weather?")], "chosen": [LOOKS, RESULT, SAYS], "rejected": [GUESSES]}
REWRITES = {"qwen3": True, "nemotron_3_nano": True, "glm4moe": False, "qwen2_5": False}
"""Whether the template writes the first call otherwise once its result follows."""


def rows_of(folder: Path, *rows: dict[str, Any]) -> list[Row]:
    file = folder / "rows.jsonl"
    tools = {"tools": [tool("get_weather")]}
    file.write_text("".join(json.dumps(row | tools) + "\n" for row in rows))
    return load_rows(str(file))[0]


def grouped(renderer: Renderer, rows: list[Row], needs: str = "pairs", **data: Any) -> tuple[list[Group], Any]:
    found, _, report = prepare_groups(rows, renderer, DataConfig(train="x", max_tokens=2048, **data), needs)
    return found, report


def turns_of(renderer: Renderer, row: Row, messages: list[Message], first: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, what is to be generated) of each answer from message `asked` on, without the code that makes groups: the
    prompt as generation has it, and what stands behind it in the conversation that ends with this answer."""
    found = []
    for index in range(first, len(messages)):
        if messages[index].role == "assistant":
            prompt = renderer.prompt(messages[:index], row.tools).tolist()
            whole = renderer.rows(messages[: index + 1], row.tools)[-1].ids.tolist()
            assert whole[: len(prompt)] == prompt
            found.append((prompt, whole[len(prompt) :]))
    return found


@pytest.mark.parametrize("name", REWRITES)
def test_an_answer_with_calls_is_compared_turn_by_turn_as_generation_has_it(name: str, tmp_path: Path) -> None:
    renderer = Renderer(tiny_tokenizer(shipped(name)))
    (row,) = rows_of(tmp_path, PAIR)
    (group,), report = grouped(renderer, [row])
    assert report.problems == []
    assert (group.pairs, group.scores) == (((0, 1),), (1.0, 0.0))
    for rows, messages in zip(group.parts(), (row.messages, *row.rejected), strict=True):
        wanted = turns_of(renderer, row, messages, first=1)
        assert len(wanted) == (2 if messages is row.messages else 1)
        trained = [(example.ids[example.weights > 0].tolist(), example) for example in rows]
        text = "".join(renderer.tokenizer.decode(ids) for ids, _ in trained)
        assert ("get_weather" in text, "Cold." in text) == (messages is row.messages, messages is row.messages)
        if REWRITES[name]:
            for (ids, example), (prompt, answer) in zip(trained, wanted, strict=True):
                assert example.ids[: len(prompt)].tolist() == prompt
                assert answer[: len(ids)] == ids
    assert group.numbers == ((0, 0, 1) if REWRITES[name] else ())


@pytest.mark.parametrize("share", [False, True])
def test_the_log_probability_of_an_answer_is_the_sum_over_its_turns(share: bool, tmp_path: Path) -> None:
    """Against plain logits, one turn after the other."""
    renderer = Renderer(tiny_tokenizer(shipped("qwen3")))
    model: Any = tiny_model("llama", vocab_size=len(renderer.tokenizer), max_position_embeddings=4096).eval()
    rows = rows_of(
        tmp_path, PAIR, PAIR | {"prompt": [user("And in Rome?")], "rejected": [GUESSES | {"content": "Hot"}]}
    )
    found, _ = grouped(renderer, rows)
    pack = collate(found, share=share)
    with torch.no_grad(), packed_attention(model):
        batch = batch_of(pack)
        values = log_probs(model, pack)
        ours, tokens = per_answer(values.double(), batch), lengths(batch, values)
    plain, counts, ends = [], [], []
    for row in rows:
        for messages in (row.messages, *row.rejected):
            total, count = 0.0, 0
            turns = turns_of(renderer, row, messages, first=1)
            for prompt, answer in turns:
                own = answer[: answer.index(renderer.tokenizer.convert_tokens_to_ids(END)) + 1]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + own])).logits[0].double().log_softmax(-1)
                places = range(len(prompt), len(prompt) + len(own))
                total += sum(float(logits[at - 1, (prompt + own)[at]]) for at in places)
                count += len(own)
            plain.append(total)
            counts.append(count)
            ends.append((len(turns[0][0]) - 1, turns[0][0][-1]))
    assert tokens.tolist() == counts
    assert ours.tolist() == pytest.approx(plain, abs=1e-3)
    for place, (position, token) in zip(pack.prompt_ends.tolist(), ends, strict=True):
        assert (int(pack.positions[0, place]), int(pack.ids[0, place])) == (position, token)


def test_a_pair_of_which_one_turn_is_too_long_is_left_out_whole(tmp_path: Path) -> None:
    renderer = Renderer(tiny_tokenizer(shipped("qwen3")))
    long = PAIR | {"chosen": [LOOKS, RESULT | {"content": "9 degrees " * 400}, SAYS]}
    found, report = grouped(renderer, rows_of(tmp_path, long, PAIR))
    assert [group.where for group in found] == [f"{tmp_path}/rows.jsonl:2"]
    assert report.dropped_over_length == report.rows_in_part == [f"{tmp_path}/rows.jsonl:1"]


def test_answers_with_the_same_first_turn_are_told_apart_and_equal_ones_named(tmp_path: Path) -> None:
    renderer = Renderer(tiny_tokenizer(shipped("qwen3")))
    other = assistant(None, tool_calls=[call("get_weather", city="Oslo")])
    asks_twice = PAIR | {"rejected": [other, RESULT, GUESSES]}
    (group,), _ = grouped(renderer, rows_of(tmp_path, asks_twice))
    assert group.numbers == (0, 0, 1, 1)
    texts = ["".join(renderer.tokenizer.decode(e.ids[e.weights > 0]) for e in rows) for rows in group.parts()]
    assert ["Rome" in texts[0], "Cold." in texts[0], "Oslo" in texts[1], "Warm." in texts[1]] == [True] * 4
    assert group.liked == list(group.answers[:2])


def test_feedback_on_an_answer_with_calls_and_its_mismatched_probes(tmp_path: Path) -> None:
    renderer = Renderer(tiny_tokenizer(shipped("qwen3")))
    judged = rows_of(
        tmp_path,
        {"messages": [user("Weather in Rome?"), LOOKS, RESULT, SAYS], "label": True},
        {"messages": [user("Hello?"), assistant("Hi.")], "label": False},
    )
    (tmp_path / "pairs").mkdir()
    pairs = rows_of(tmp_path / "pairs", PAIR)
    found, _ = grouped(renderer, [*judged, *pairs], needs="feedback")
    assert [group.scores for group in found] == [(1.0,), (0.0,), (1.0, 0.0)]
    assert [len(group.answers) for group in found] == [1, 1, 3], "of a row with a label the last answer is judged"
    probes = mismatched_groups(found)
    assert [len(mismatched.scores) for mismatched in probes] == [1, 1, 2]
    text = [[renderer.tokenizer.decode(example.ids) for example in mismatched.answers] for mismatched in probes]
    assert len(text[1]) == 2, "the answer to Hello? is that of the pair, in its two turns"
    assert all("Hello?" in each and "Weather?" not in each for each in text[1])
    assert "Cold." in text[1][1]
    for mismatched, (own_group, next_group) in zip(probes, pairwise([*found, found[0]]), strict=True):
        for example in mismatched.answers:
            begins = int(np.flatnonzero(example.weights)[0])
            prompt = own_group.answers[0].ids[: int(np.flatnonzero(own_group.answers[0].weights)[0])]
            assert begins >= len(prompt)
            assert example.ids[: len(prompt)].tolist() == prompt.tolist()
        wanted = [e.ids[e.weights > 0].tolist() for e in next_group.parts()[0]]
        assert [e.ids[e.weights > 0].tolist() for e in mismatched.parts()[0]] == wanted


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_pairs_with_calls_are_trained_on_a_template_that_rewrites(loss: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", template=shipped("qwen3"), max_position_embeddings=4096)
    rows_of(tmp_path, *(PAIR | {"prompt": [user(f"Weather {n}?")]} for n in range(6)))
    tree = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 2048},
        "loss": loss,
        "train": {"steps": 2, "batch_rows": 3, "pack_tokens": 4096},
    }
    graftlm.train(build(Recipe, tree, source="test"), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    assert all(math.isfinite(step["loss"]) for step in steps)
    if loss == "dpo":
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "a delta of zero is the reference"
