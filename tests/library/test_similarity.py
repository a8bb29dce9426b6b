"""Similarities are those of the whole matrices, and do not depend on how an adapter is written."""

import numpy as np
import pytest
import torch

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.save import adapter_of
from graftlm.deltas.lora import LoraConfig
from graftlm.library import similarity
from graftlm.library.entry import Entry, Score
from graftlm.library.similarity import Pair, near_duplicates, prune, score_named, similarities
from graftlm.model.attach import attach, detach
from graftlm.testing import tiny_model
from graftlm.testing.deltas import move, perturbed
from tests.errors import raises
from tests.library.adapters import PREFIX, SITES, adapter, dense, factors, in_other_factors


def mixed() -> dict[str, Adapter]:
    """Different ranks, scales and sites."""
    first, *_ = SITES
    uneven = factors(3, 2) | {first: factors(4, 5)[first]}
    return {
        "plain": adapter(factors(0)),
        "rslora": adapter(factors(1, 3), alpha=5.0, use_rslora=True),
        "pattern": adapter(factors(2), alpha_pattern={"q_proj": 40.0}),
        "uneven": adapter(uneven),
        "one-site": adapter({first: factors(5)[first]}),
        "sum": adapter({site: (torch.cat([a, b]), torch.cat([c, d], 1)) for site, ((a, c), (b, d)) in both().items()}),
    }


def both() -> dict:
    one, other = factors(0), factors(1, 3)
    return {site: (one[site], other[site]) for site in SITES}


def by_whole_matrices(adapters: dict[str, Adapter]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosine, left and right overlap from D [d_out, d_in] and its SVD: the definition."""
    D = [dense(one) for one in adapters.values()]
    norms = [sum(float(m.square().sum()) for m in each.values()) ** 0.5 for each in D]
    n = len(D)
    found = np.zeros((3, n, n))
    for i in range(n):
        for j in range(n):
            sites = D[i].keys() | D[j].keys()
            for site in D[i].keys() & D[j].keys():
                found[0, i, j] += float((D[i][site] * D[j][site]).sum()) / norms[i] / norms[j]
                (U, S, Vh), (P, T, Qh) = (torch.linalg.svd(each[site]) for each in (D[i], D[j]))
                r, k = int((1e-6 * S[0] < S).sum()), int((1e-6 * T[0] < T).sum())
                left = (U[:, :r].T @ P[:, :k]).square().sum() / min(r, k)
                right = (Vh[:r] @ Qh[:k].T).square().sum() / min(r, k)
                found[1, i, j] += float(left) / len(sites)
                found[2, i, j] += float(right) / len(sites)
    return found[0], found[1], found[2]


@pytest.mark.parametrize("chunk", [2**26, 200])
def test_similarities_are_those_of_the_whole_matrices(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "CHUNK_BYTES", chunk)  # 200: a chunk for each adapter
    adapters = mixed()
    found = similarities(adapters)
    assert list(found.names) == list(adapters)
    for ours, wanted in zip((found.cosine, found.left, found.right), by_whole_matrices(adapters), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-10)
    norms = [sum(float(m.square().sum()) for m in dense(one).values()) ** 0.5 for one in adapters.values()]
    np.testing.assert_allclose(found.norms, norms, rtol=1e-10)


def test_other_factors_and_another_scale_are_the_same_adapter() -> None:
    here = factors(0)
    found = similarities(
        {
            "a": adapter(here),
            "gauge": adapter(in_other_factors(here, 7)),
            "scaled": adapter(here, alpha=24.0),
            "rslora": adapter(here, alpha=4.0, use_rslora=True),  # 4 / sqrt(4) = 8 / 4
            "opposite": adapter({site: (A, -B) for site, (A, B) in here.items()}),
            "other": adapter(factors(1)),
        }
    )
    np.testing.assert_allclose(found.cosine[0], [1, 1, 1, 1, -1, found.cosine[0, 5]], atol=1e-5)
    np.testing.assert_allclose(found.left[0, :5], 1, atol=1e-5)
    np.testing.assert_allclose(found.right[0, :5], 1, atol=1e-5)
    np.testing.assert_allclose(found.norms[2] / found.norms[0], 3, rtol=1e-6)
    np.testing.assert_allclose(found.norms[3], found.norms[0], rtol=1e-6)
    assert abs(found.cosine[0, 5]) < 0.1
    pairs = {(pair.one, pair.other) for pair in near_duplicates(found, 0.999)}
    same = ["a", "gauge", "scaled", "rslora"]
    assert pairs == {(one, other) for i, one in enumerate(same) for other in same[i + 1 :]}
    scaled = next(p for p in near_duplicates(found, 0.999) if (p.one, p.other) == ("a", "scaled"))
    assert scaled.norm_ratio == pytest.approx(1 / 3)


def test_random_adapters_have_almost_nothing_in_common() -> None:
    found = similarities({str(seed): adapter(factors(seed)) for seed in range(12)})
    apart = found.cosine[~np.eye(12, dtype=bool)]
    assert abs(apart).max() < 0.15
    assert abs(apart.mean()) < 0.02
    chance = np.mean([4 / d_out for d_out, _ in SITES.values()])
    assert found.left[~np.eye(12, dtype=bool)].mean() == pytest.approx(chance, rel=0.1)


def test_the_order_of_the_adapters_permutes_the_result() -> None:
    adapters = mixed()
    one, back = similarities(adapters), similarities(dict(reversed(adapters.items())))
    np.testing.assert_allclose(one.cosine, back.cosine[::-1, ::-1], atol=1e-12)
    np.testing.assert_allclose(one.left, back.left[::-1, ::-1], atol=1e-12)


def test_adapters_of_other_bases_are_no_pair() -> None:
    found = similarities({"a": adapter(factors(0)), "b": adapter(factors(0)), "c": adapter(factors(0))})
    pairs = near_duplicates(found, 0.9, {"a": "sha256:1", "b": "sha256:2", "c": None})
    assert [(pair.one, pair.other) for pair in pairs] == [("a", "c"), ("b", "c")]


def test_what_is_no_plain_lora_is_left_out_without_its_base_and_compared_on_it() -> None:
    model = tiny_model()
    adapters = {}
    for name in ("ia3", "lora", "dora"):
        perturbed(name, model)
        adapters[name] = adapter_of(model)
        detach(model)
    changes_nothing = {site: (A, 0 * B) for site, (A, B) in factors(0).items()}
    adapters["nothing"] = adapter(changes_nothing)
    bare = similarities(adapters)
    assert list(bare.names) == ["lora"]
    assert set(bare.left_out) == {"ia3", "dora", "nothing"}
    assert "changes nothing" in bare.left_out["nothing"]
    based = similarities(adapters, model)
    assert list(based.names) == ["ia3", "lora", "dora"]
    assert set(based.left_out) == {"nothing"}
    np.testing.assert_allclose(np.diag(based.cosine), 1, atol=1e-6)
    assert not any("graft-library" in name for name, _ in model.named_modules())


def test_our_own_lora_has_the_norm_of_its_change_of_the_weights() -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4, alpha=12, rslora=True, targets=("q_proj", "embed_tokens")), seed=1)
    move(model)
    found = similarities({"a": adapter_of(model)})
    total = 0.0
    for _, host in model.named_modules():
        if hasattr(host, "deltas") and hasattr(host, "effective"):
            W, _ = host.effective(names=["default"])
            total += float((W.detach() - host.view.weight).double().square().sum())
    assert found.norms[0] == pytest.approx(total**0.5, rel=1e-5)


def pair(one: str, other: str) -> Pair:
    return Pair(one, other, 1.0, 1.0, 1.0, 1.0)


def test_pruning_keeps_the_best_of_near_duplicates() -> None:
    pairs = [pair("a", "b"), pair("b", "c"), pair("d", "e"), pair("f", "g")]
    scores = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.5, "e": 0.5, "f": 1.0}
    made = prune(pairs, scores)
    # c is near b alone, and b is gone: c stays, since nothing that stays is near it.
    assert made.out == {"b": "a", "e": "d"}
    assert made.undecided == [pair("f", "g")]
    lowest = prune(pairs, scores, lowest_is_best=True)
    assert lowest.out == {"b": "c", "e": "d"}


def test_what_goes_has_a_near_duplicate_that_stays_and_is_as_good() -> None:
    random = np.random.default_rng(0)
    names = [str(n) for n in range(12)]
    for _ in range(50):
        pairs = [pair(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if random.random() < 0.2]
        scores = {name: float(random.integers(0, 4)) for name in names}
        made = prune(pairs, scores)
        near = {frozenset((p.one, p.other)) for p in pairs}
        for out, stays in made.out.items():
            assert frozenset((out, stays)) in near
            assert stays not in made.out
            assert scores[stays] >= scores[out]
        left = [name for name in names if name not in made.out]
        assert not any(frozenset((a, b)) in near for i, a in enumerate(left) for b in left[i + 1 :])


def entry(**scores: float) -> Entry:
    return Entry(
        base=None, base_fingerprint=None, method="lora", targets=(), sites=1, ranks=(1,), bytes=1, examples=0, files={},
        scores={name: Score(value=value) for name, value in scores.items()},
    )  # fmt: skip


def test_the_only_score_decides_and_of_several_one_is_named() -> None:
    assert score_named({"a": entry(exact=1.0), "b": entry()}, None) == ("exact", {"a": 1.0})
    assert score_named({"a": entry(x=1.0, y=2.0)}, "y") == ("y", {"a": 2.0})
    with raises("adapter/no-such-score", match="x, y"):
        score_named({"a": entry(x=1.0, y=2.0)}, None)
    with raises("adapter/no-such-score"):
        score_named({"a": entry()}, None)
    with raises("adapter/no-such-score", match="z"):
        score_named({"a": entry(x=1.0)}, "z")


def test_a_site_of_one_name_and_two_sizes_has_nothing_in_common() -> None:
    site, *_ = SITES
    small = adapter({site: (torch.randn(2, 16), torch.randn(16, 2))})
    found = similarities({"a": adapter({site: factors(0)[site]}), "b": small})
    assert found.cosine[0, 1] == found.left[0, 1] == 0
    assert f"{PREFIX}{site}.lora_A.weight" in small.tensors
