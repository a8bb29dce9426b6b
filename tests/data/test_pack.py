"""Examples -> packs: nothing is lost, nothing is predicted across a boundary."""

import random

import numpy as np
import pytest
import torch

from graftlm.data.pack import Example, Pack, batches, collate, pack


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
    part = collate([example([5, 6, 7], [0, 0, 1], "f:1"), example([8, 9], [0, 0.5], "f:2")])
    assert part.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert part.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert part.lengths == [3, 2]
    assert part.hidden_rows.tolist() == [1, 3]
    assert part.targets.tolist() == [7, 9]
    assert part.weights.tolist() == [1, 0.5]
    assert part.where == ["f:1", "f:2"]
    assert part.ids.dtype == part.positions.dtype == part.targets.dtype == torch.int64


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
    assert sorted(w for p in parts for w in p.where) == sorted(e.where for e in examples)
    assert max(p.lengths[0] for p in parts) == parts[0].lengths[0] == max(map(len, examples)), "the longest first"


def test_rows_that_fit_together_share_a_pack() -> None:
    parts = pack([example([1] * n, [0.0] * n, str(n)) for n in (2, 6, 4, 3)], 8)
    assert [p.lengths for p in parts] == [[6, 2], [4, 3]]


def test_a_batch_without_supervised_tokens_has_no_triples() -> None:
    part = collate([example([5, 6], [0, 0])])
    assert part.hidden_rows.tolist() == part.targets.tolist() == part.weights.tolist() == []


def test_a_pack_moves_with_all_its_tensors() -> None:
    part = collate([example([5, 6], [0, 1])]).to(torch.device("meta"))
    tensors = (part.ids, part.positions, part.hidden_rows, part.targets, part.weights)
    assert {t.device.type for t in tensors} == {"meta"}
    assert (part.lengths, part.where) == ([2], ["f:1"])


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
