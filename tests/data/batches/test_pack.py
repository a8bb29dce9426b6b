"""Examples -> packs: nothing is lost, nothing is predicted across a boundary."""

import random

import numpy as np
import pytest
import torch

from graftlm.data.batches.pack import Example, Pack, batches, collate, fill, pack


def example(ids: list[int], weights: list[float], where: str = "f:1") -> Example:
    return Example(np.array(ids, np.int32), np.array(weights, np.float32), where)


def random_examples(seed: int, count: int = 12) -> list[Example]:
    """Every id is unique over all examples, so that a triple says which token of which row it is."""
    draw = random.Random(seed)
    found, next_id = [], 100
    for number in range(count):
        length = draw.randint(1, 30)
        weights = [0.0] + [float(draw.random() < 0.4) for _ in range(length - 1)]
        found.append(example(list(range(next_id, next_id + length)), weights, f"f:{number}"))
        next_id += length
    return found


def triples(part: Pack) -> list[tuple[int, int, float]]:
    """(id at the hidden row, target, weight)."""
    before = part.ids[0, part.hidden_rows].tolist()
    return list(zip(before, part.targets.tolist(), part.weights.tolist(), strict=True))


def test_two_rows_lie_end_to_end_as_one_would_write_them_down() -> None:
    part = collate([example([5, 6, 7, 4], [0, 0, 1, 1], "f:1"), example([8, 9], [0, 0.5], "f:2")])
    assert part.ids.tolist() == [[5, 6, 7, 8]]
    assert part.positions.tolist() == [[0, 1, 2, 0]]
    assert (part.lengths, part.parents) == ([3, 1], [-1, -1])
    assert part.hidden_rows.tolist() == [1, 2, 3]
    assert part.targets.tolist() == [7, 4, 9]
    assert part.weights.tolist() == [1, 1, 0.5]
    assert part.where == [("f:1",), ("f:2",)]
    assert part.row_tokens == 6
    assert part.ids.dtype == part.positions.dtype == part.targets.dtype == torch.int64


def test_what_stands_after_the_last_target_is_not_computed() -> None:
    part = collate([example([5, 6, 7, 8, 9], [0, 0, 1, 0, 0])])
    assert (part.ids.tolist(), part.targets.tolist(), part.row_tokens) == ([[5, 6]], [7], 5)


@pytest.mark.parametrize("tokens", [1, 7, 30, 31, 64, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_every_supervised_token_is_predicted_once_from_the_token_before_it_in_its_row(tokens: int, seed: int) -> None:
    examples = random_examples(seed)
    wanted = [
        (int(e.ids[i - 1]), int(e.ids[i]), float(e.weights[i]))
        for e in examples
        for i in range(1, len(e))
        if e.weights[i]
    ]
    parts = pack(examples, tokens)
    assert sorted(t for part in parts for t in triples(part)) == sorted(wanted)
    for part in parts:
        assert part.positions[0].tolist() == [i for n in part.lengths for i in range(n)]
        assert sum(part.lengths) == part.ids.shape[1] == part.positions.shape[1]


@pytest.mark.parametrize("tokens", [1, 7, 30, 64, 10_000])
def test_packs_hold_at_most_their_tokens_unless_one_row_is_longer(tokens: int) -> None:
    examples = random_examples(3)
    parts = pack(examples, tokens)
    assert all(sum(p.lengths) <= tokens or len(p.lengths) == 1 for p in parts)
    assert sorted(w for p in parts for (w,) in p.where) == sorted(e.where for e in examples)
    assert [sum(p.lengths) for p in parts] == sorted((sum(p.lengths) for p in parts), reverse=True)


def test_rows_that_fit_together_share_a_pack() -> None:
    parts = pack([example([1] * n, [0.0] * (n - 1) + [1.0], str(n)) for n in (3, 7, 5, 4)], 8)
    assert [p.lengths for p in parts] == [[6, 2], [4, 3]]


def test_packs_are_as_full_as_their_tokens() -> None:
    steps = [[example([1] * 5, [0, 0, 0, 0, 1]), example([2] * 4, [0, 0, 0, 1])], [example([3] * 3, [0, 0, 1])]]
    assert fill(steps, 10, share=False) == pytest.approx((4 + 3 + 2) / 20)
    assert fill(steps, 4, share=False) == pytest.approx((4 + 3 + 2) / 12)


def test_a_batch_without_supervised_tokens_has_no_triples() -> None:
    part = collate([example([5, 6], [0, 0])])
    assert part.hidden_rows.tolist() == part.targets.tolist() == part.weights.tolist() == []


def test_a_pack_moves_with_all_its_tensors() -> None:
    part = collate([example([5, 6], [0, 1])]).to(torch.device("meta"))
    tensors = (part.ids, part.positions, part.hidden_rows, part.targets, part.weights)
    assert {t.device.type for t in tensors} == {"meta"}
    assert (part.lengths, part.parents, part.where) == ([1], [-1], [("f:1",)])


# Shared beginnings -----------------------------------------------------------------------------------------------


def alike(seed: int, count: int = 14) -> list[Example]:
    """Rows that begin alike in all sorts of ways: not at all, a little, wholly; some are the same row twice."""
    draw = random.Random(seed)
    beginnings = [[draw.randint(1, 3) for _ in range(draw.randint(1, 40))] for _ in range(3)]
    beginnings.append(beginnings[0] + [draw.randint(1, 3) for _ in range(20)])
    found: list[Example] = []
    for number in range(count):
        if found and draw.random() < 0.15:
            ids = found[-1].ids.tolist()
        else:
            start = draw.choice(beginnings)
            ids = start[: draw.randint(1, len(start))] + [draw.randint(1, 3) for _ in range(draw.randint(0, 12))]
        weights = [0.0] + [draw.choice([0.0, 0.25, 1.0]) for _ in ids[1:]]
        found.append(example(ids, weights, f"f:{number}"))
    return found


Predictions = dict[tuple[tuple[int, ...], int], float]


def predictions_of_rows(examples: list[Example]) -> Predictions:
    """{(all tokens before, target): weight}: what a causal model is asked, whatever the rows are laid out like."""
    found: Predictions = {}
    for e in examples:
        for i in range(1, len(e)):
            if e.weights[i]:
                key = tuple(e.ids[:i].tolist()), int(e.ids[i])
                found[key] = found.get(key, 0.0) + float(e.weights[i])
    return found


def predictions_of_pack(part: Pack) -> Predictions:
    """The same, read off the segments of a pack."""
    segments = part.ids[0].split(part.lengths)
    before: list[list[int]] = []
    rows: list[tuple[int, ...]] = []
    for ids, positions, parent in zip(segments, part.positions[0].split(part.lengths), part.parents, strict=True):
        path = before[parent] if parent >= 0 else []
        assert positions.tolist() == list(range(len(path), len(path) + len(ids)))
        before.append(path + ids.tolist())
        rows += [tuple(before[-1][: len(path) + i + 1]) for i in range(len(ids))]
    triples = zip(part.hidden_rows.tolist(), part.targets.tolist(), part.weights.tolist(), strict=True)
    found: Predictions = {}
    for hidden, target, weight in triples:
        found[rows[hidden], target] = found.get((rows[hidden], target), 0.0) + weight
    return found


@pytest.mark.parametrize("tokens", [1, 16, 50, 10_000])
@pytest.mark.parametrize("seed", range(8))
def test_shared_beginnings_ask_for_the_very_same_predictions(tokens: int, seed: int) -> None:
    examples = alike(seed)
    parts = pack(examples, tokens, share=True)
    found: Predictions = {}
    for part in parts:
        for key, weight in predictions_of_pack(part).items():
            found[key] = found.get(key, 0.0) + weight
    wanted = predictions_of_rows(examples)
    assert found.keys() == wanted.keys()
    assert all(abs(found[key] - wanted[key]) < 1e-5 for key in wanted)
    assert sum(part.row_tokens for part in parts) == sum(map(len, examples))
    assert sum(part.ids.numel() for part in parts) <= sum(part.ids.numel() for part in pack(examples, tokens))
    for part in parts:
        ends = {row for names in part.where for row in names}
        assert ends <= {e.where for e in examples}


def test_a_segment_names_all_rows_that_it_is_a_part_of() -> None:
    start = list(range(1, 11))
    part = collate(
        [example([*start, 20, 21], [0.0] * 11 + [1], "f:1"), example([*start, 30, 31], [0.0] * 11 + [1], "f:2")],
        share=True,
    )
    assert (part.lengths, part.parents) == ([10, 1, 1], [-1, 0, 0])
    assert part.where == [("f:1", "f:2"), ("f:1",), ("f:2",)]


def test_a_hidden_state_after_which_rows_part_predicts_a_target_for_each() -> None:
    start = list(range(1, 11))
    rows = [example([*start, t], [0.0] * 10 + [w]) for t, w in ((50, 1.0), (60, 0.5), (50, 0.25))]
    part = collate(rows, share=True)
    assert part.ids.tolist() == [start]
    assert triples(part) == [(10, 50, 1.25), (10, 60, 0.5)]


def questions(count: int, document: int, each: int) -> list[Example]:
    draw = random.Random(0)
    text = [draw.randint(1, 99) for _ in range(document)]
    rows = []
    for number in range(count):
        question = [draw.randint(1, 99) for _ in range(each)]
        rows.append(
            example(text + question, [0.0] * (document + each // 2) + [1.0] * (each - each // 2), f"f:{number}")
        )
    return rows


def test_a_document_is_computed_once_for_all_its_questions_even_if_it_alone_is_more_than_a_pack() -> None:
    rows = questions(64, document=1500, each=40)
    parts = pack(rows, 1024, share=True)
    assert sum(p.ids.numel() for p in parts) * 8 <= sum(map(len, rows))
    assert max(p.ids.numel() for p in parts) <= 1540 + 1024


def test_the_two_answers_of_a_pair_meet_in_one_pack() -> None:
    rows = [row for seed in range(6) for row in questions(2, document=100 + seed, each=50)]
    assert len({tuple(row.ids[:20].tolist()) for row in rows}) == 1, "all begin alike, pairs go on alike"
    for number, row in enumerate(rows):
        row.ids[20 : 100 + number // 2] = number // 2 + 200
    parts = pack(rows, 500, share=True)
    assert sum(p.ids.numel() for p in parts) < 6 * (105 + 100) + 20 * len(parts)


def test_rows_that_agree_in_a_few_tokens_are_not_cut() -> None:
    rows = [example([1, 2, 3, *range(n, n + 9)], [0.0] * 11 + [1]) for n in (20, 40)]
    assert collate(rows, share=True).lengths == [11, 11]


# Batches ---------------------------------------------------------------------------------------------------------


def test_each_epoch_is_a_permutation_of_the_rows_and_no_two_are_alike() -> None:
    found = batches(count=10, size=4, steps=10, seed=0)
    assert [len(b) for b in found] == [4] * 10
    flat = [i for b in found for i in b]
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_the_order_follows_from_the_seed_and_more_steps_only_add_to_it() -> None:
    assert batches(7, 3, 5, seed=1) == batches(7, 3, 5, seed=1) == batches(7, 3, 9, seed=1)[:5]
    assert batches(7, 3, 5, seed=1) != batches(7, 3, 5, seed=2)


def test_a_batch_may_be_larger_than_the_rows_there_are() -> None:
    (batch,) = batches(count=2, size=6, steps=1, seed=0)
    assert sorted(batch) == [0, 0, 0, 1, 1, 1]
