"""Adapters in, one adapter out: for every method, exact where there are factors, with a stated error elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from graftlm.adapters.adapter import Adapter, ChatRecord
from graftlm.adapters.load import attach_adapter
from graftlm.adapters.save import adapter_of
from graftlm.combine.changes import changes_of
from graftlm.combine.compose import Composition, compose
from graftlm.combine.merge import merge
from graftlm.combine.rules import COMPOSERS
from graftlm.combine.rules.base import MomentRule
from graftlm.combine.rules.ties import TiesConfig
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.quantize_base import quantize
from graftlm.model.registry import attachment, hosts
from graftlm.model.state_dict import merged_state
from graftlm.passes.statistics import collect
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move, perturbed, plain_with
from graftlm.testing.tiny import tiny_gpt2
from tests.combine.sites import composed as composed_site
from tests.combine.sites import rule_of
from tests.combine.test_rules import NOT_ITSELF, RULES, WHOLE
from tests.errors import raises
from tests.golden.make_peft import CASES as GOLDEN_CASES
from tests.golden.make_peft import IDS
from tests.golden.make_peft import base as golden_base

WITH_FACTORS = [name for name, method in METHODS.items() if method.has_factors]
LORAS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "patterns": {"patterns": {"q_proj": {"r": 2, "alpha": 10.0}, "down_proj": {"alpha": 1.0}}},
    "patterns of rslora": {"rslora": True, "patterns": {"layers.1.*": {"r": 1}}},
    "pissa": {"init": "pissa"},
    "embeddings": {"targets": ("embed_tokens", "v_proj")},
}
CASES = [(name, {}) for name in WITH_FACTORS] + [("lora", changes) for changes in LORAS.values()]
NAMES = [*WITH_FACTORS, *LORAS]


def trained(method: str, *, seed: int = 1, base: Any = None, **changes: Any) -> Adapter:
    """An adapter of the tiny model, away from its start; its tensors are its own."""
    model = perturbed(method, tiny_model() if base is None else base, seed=seed, **changes)
    adapter = adapter_of(model)
    return replace(adapter, tensors={key: t.detach().clone() for key, t in adapter.tensors.items()})


def answers(adapter: Adapter, base: Any = None) -> Tensor:
    model = tiny_model() if base is None else base
    attach_adapter(model, adapter)
    return logits(model)


def matrices(made: Composition) -> dict[str, Tensor]:
    """Site -> D."""
    with changes_of(tiny_model(), made.adapter, "unused", needs_rank=True) as changes:
        return {site: change().matrix() for site, change in changes.items()}


@pytest.mark.parametrize(("method", "changes"), CASES, ids=NAMES)
def test_one_adapter_with_weight_1_is_itself_for_every_method_and_rule(method: str, changes: dict[str, Any]) -> None:
    adapter = trained(method, **changes)
    made = compose(tiny_model(), [adapter])
    assert made.adapter.config.method == "lora"
    assert all(report.error == 0 for report in made.sites.values())
    close(answers(made.adapter), answers(adapter), f"{method}, linear")
    with changes_of(tiny_model(), adapter, "unused", needs_rank=True) as given:
        one = next(iter(given.values()))()
    for name in RULES:
        if name not in NOT_ITSELF:
            found = composed_site([one], [1.0], rule_of(name, **WHOLE.get(name, {})))
            close(found, one.matrix(), f"{method}, {name}")


def moments_of(seed: int) -> dict[str, Tensor]:
    """Site -> second moment, as graftlm gathers it, from other tokens for each seed."""
    model = tiny_model()
    batch = ids(seed=seed, rows=4, length=16)
    gathered = collect(model, LoraConfig(), ("second_moment",), [lambda: model(input_ids=batch, labels=batch).loss])
    return {site: found["second_moment"] for site, found in gathered.items()}


def several() -> list[Adapter]:
    """Different methods, ranks and sites."""
    return [
        trained("lora", seed=1),
        trained("lora", seed=2, r=2, rslora=True, targets=("q_proj", "down_proj")),
        trained("vera", seed=3),
    ]


def test_linear_is_the_weighted_merge_of_weights() -> None:
    adapters, weights = several(), [1.0, 0.5, -0.7]
    model = tiny_model()
    for number, adapter in enumerate(adapters):
        attach_adapter(model, adapter, name=str(number))
    wanted = dict(merge(model, {str(number): weight for number, weight in enumerate(weights)}))
    made = compose(tiny_model(), adapters, weights=weights)
    attach_adapter(alone := tiny_model(), made.adapter)
    for key, tensor in merged_state(alone).items():
        close(tensor, wanted[key], key, 1e-6)
    assert made.sites["model.layers.0.self_attn.q_proj"].rank == 4 + 2 + 4


def test_sites_that_one_adapter_alone_has_take_its_share() -> None:
    both = compose(tiny_model(), several()[:2], by="karcher", weights=[3.0, 1.0])
    alone = matrices(compose(tiny_model(), several()[:1]))
    found, site = matrices(both), "model.layers.0.mlp.up_proj"
    close(found[site], 0.75 * alone[site], "as if the other adapter changed nothing there")


@pytest.mark.parametrize("name", [name for name in RULES if COMPOSERS[name].rule.most is None])
def test_adapters_of_weight_0_change_nothing(name: str) -> None:
    adapters = several()
    by = COMPOSERS[name].config(name=name)
    takes_moments = issubclass(COMPOSERS[name].rule, MomentRule)
    first, second = (
        matrices(
            compose(
                tiny_model(),
                some,
                by=by,
                weights=weights,
                rank=3,
                moments=[moments_of(seed) for seed in range(len(some))] if takes_moments else None,
            )
        )
        for some, weights in ((adapters[:2], [1.0, 0.5]), ([*adapters[:2], adapters[2]], [1.0, 0.5, 0.0]))
    )
    assert first.keys() == second.keys()
    for site, D in first.items():
        close(second[site], D, f"{name}: {site}")


@pytest.mark.parametrize("space", ["core", "knots", "ctm", "product"])
def test_the_order_of_adapters_does_not_matter(space: Any) -> None:
    adapters, weights = several(), [1.0, 0.5, -0.7]
    by = TiesConfig(density=0.5)
    first = matrices(compose(tiny_model(), adapters, by=by, weights=weights, space=space, rank=4))
    second = matrices(compose(tiny_model(), adapters[::-1], by=by, weights=weights[::-1], space=space, rank=4))
    for site, D in first.items():
        close(second[site], D, site)


def test_regmean_takes_the_moments_that_graftlm_gathers() -> None:
    """Whole adapters, of which one lacks sites and one has weight 0, against the equation."""
    adapters, weights, moments = several(), [1.0, -0.5, 0.0], [moments_of(seed) for seed in (1, 2, 3)]
    made = compose(tiny_model(), adapters, by="regmean", weights=weights, moments=moments)
    alone = [matrices(compose(tiny_model(), [each])) for each in adapters[:2]]
    assert all(report.error == 0 for report in made.sites.values())
    assert alone[0].keys() - alone[1].keys(), "one lacks sites"
    for site, D in matrices(made).items():
        here = [i for i in (0, 1) if site in alone[i]]
        Gs = {i: moments[i][site].double() * (0.9 + 0.1 * torch.eye(len(moments[i][site]))) for i in here}
        total = torch.stack([weights[i] * alone[i][site] @ Gs[i] for i in here]).sum(0)
        close(D, torch.linalg.solve(torch.stack(list(Gs.values())).sum(0), total.T).T, site)
    as_functions = [one.__getitem__ for one in moments]
    again = compose(tiny_model(), adapters, by="regmean", weights=weights, moments=as_functions)
    assert all(torch.equal(again.adapter.tensors[key], t) for key, t in made.adapter.tensors.items())


def test_moments_that_do_not_fit_are_refused() -> None:
    adapters = [trained("lora", targets=("q_proj",)), trained("lora", targets=("q_proj",), seed=2)]
    site, good = "model.layers.1.self_attn.q_proj", moments_of(1)
    lacking = {name: G for name, G in good.items() if name != site}
    wrong = good | {site: torch.eye(3)}
    for bad, code, match in (
        (None, "recipe/missing-moments", r"moments=\[...\].*wudi"),
        ([good], "recipe/missing-moments", "1 moments for 2 adapters"),
        ([good, lacking], "recipe/missing-moments", f"{site} has no .*model.layers.1.self_attn.v_proj"),
        ([good, wrong], "recipe/unusable-moments", rf"{site}: .*\[3, 3\].*\[32, 32\]"),
    ):
        with raises(code, match=match):
            compose(tiny_model(), adapters, by="regmean", moments=bad)
    with raises("recipe/conflicting-settings", match="ties takes no moments"):
        compose(tiny_model(), adapters, by="ties", moments=[good, good])


# What is written --------------------------------------------------------------------------------------------------


def test_the_result_is_a_lora_of_peft_with_scale_1_and_reads_as_it_was_written(tmp_path: Path) -> None:
    made = compose(tiny_model(), several(), by=TiesConfig(density=0.5), rank=5)
    made.adapter.write(tmp_path / "out")
    again = Adapter.read(tmp_path / "out")
    assert again == replace(made.adapter, tensors=again.tensors)
    assert all(torch.equal(again.tensors[key], t) for key, t in made.adapter.tensors.items())
    stored = made.adapter.peft_config
    assert stored["peft_type"] == "LORA"
    assert stored["lora_alpha"] == stored["r"]
    assert not stored["use_rslora"]
    assert stored["rank_pattern"].keys() == stored["alpha_pattern"].keys()
    assert made.adapter.base["digest"] == several()[0].base["digest"]
    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path / "out").eval()
    close(logits(theirs), answers(again), "in PEFT")


def test_ranks_that_differ_by_site_are_patterns(tmp_path: Path) -> None:
    made = compose(tiny_model(), several()[:2])
    ranks = {report.rank for report in made.sites.values()}
    assert ranks == {4, 6}
    stored = made.adapter.peft_config
    assert set(stored["rank_pattern"].values()) == ranks - {stored["r"]}
    theirs = PeftModel.from_pretrained(tiny_model(), made.adapter.write(tmp_path / "out")).eval()
    close(logits(theirs), answers(made.adapter), "in PEFT")


def test_adapters_of_peft_compose_too(tmp_path: Path) -> None:
    adapter = trained("lora", rslora=True)
    foreign = replace(adapter, config=None, base=None)
    close(answers(compose(tiny_model(), [foreign]).adapter), answers(adapter), "without our record")


def test_layers_that_are_kept_transposed_and_their_parts(tmp_path: Path) -> None:
    adapters = [trained("lora", base=tiny_gpt2(), targets=targets) for targets in (("c_attn.q", "c_fc"), ("c_attn",))]
    made = compose(tiny_gpt2(), adapters, weights=[0.5, 2.0])
    model = tiny_gpt2()
    for number, adapter in enumerate(adapters):
        attach_adapter(model, adapter, name=str(number))
    wanted = dict(merge(model, {"0": 0.5, "1": 2.0}))
    attach_adapter(alone := tiny_gpt2(), made.adapter)
    for key, tensor in merged_state(alone).items():
        close(tensor, wanted[key], key, 1e-6)
    theirs = PeftModel.from_pretrained(tiny_gpt2(), made.adapter.write(tmp_path / "out")).eval()
    close(logits(theirs), logits(alone), "in PEFT")


def test_what_the_adapters_ask_with_is_kept_where_it_is_the_same() -> None:
    chat = ChatRecord("{{ messages }}", "digest")
    one, other = (
        replace(trained("lora", seed=s), chat=chat, tokenizer_files={"tokenizer.json": b"{}"}) for s in (1, 2)
    )
    made = compose(tiny_model(), [one, other])
    assert made.adapter.chat == chat
    assert made.adapter.tokenizer_files == {"tokenizer.json": b"{}"}
    assert made.notes == []
    made = compose(tiny_model(), [one, replace(other, chat=ChatRecord(), tokenizer_files={})])
    assert made.adapter.chat == ChatRecord()
    assert made.adapter.tokenizer_files == {}
    assert ["tokenizer" in note or "template" in note for note in made.notes] == [True, True]
    headed = replace(one, heads={"value.weight": torch.ones(1)})
    assert "heads" in compose(tiny_model(), [headed, other]).notes[0]


def test_the_model_is_left_as_it_was() -> None:
    model = attach_tiny("lora", tiny_model(), targets=("q_proj",))
    move(model)
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    compose(model, [trained("lora"), trained("dora", targets=("q_proj", "up_proj"))], rank=4)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert {name for host in hosts(model).values() for name in host.active} == {"default"}


# Methods without factors ------------------------------------------------------------------------------------------

WITHOUT = ("oft", "dora", "ia3", "loha", "full", "shira")


@pytest.mark.parametrize("method", WITHOUT)
def test_a_method_without_factors_composes_through_its_change_of_weights(method: str) -> None:
    adapter = trained(method, targets=("q_proj", "down_proj"))
    attach_adapter(changed := tiny_model(), adapter)
    wanted, base = merged_state(changed), tiny_model().state_dict()
    whole = compose(tiny_model(), [adapter], rank=48)
    close(answers(whole.adapter), logits(plain_with(wanted)), f"{method} of full rank")
    cut = compose(tiny_model(), [adapter], rank=3)
    for site, D in matrices(cut).items():
        change = (wanted[f"{site}.weight"] - base[f"{site}.weight"]).double()
        error = float((change - D).norm() / change.norm())
        assert cut.sites[site].error == pytest.approx(error, rel=1e-2, abs=1e-5)
    assert cut.sites.keys() == {site for site in hosts(changed) if hosts(changed)[site].active}


def test_a_method_without_factors_composes_with_one_that_has_them() -> None:
    oft, lora = trained("oft", targets=("q_proj",)), trained("lora", targets=("q_proj",))
    made = matrices(compose(tiny_model(), [oft, lora], weights=[1.0, -2.0], rank=32))
    ones = [matrices(compose(tiny_model(), [each], rank=32)) for each in (oft, lora)]
    for site, D in made.items():
        close(D, ones[0][site] - 2 * ones[1][site], site)


def test_a_method_without_factors_needs_a_rank_or_an_energy() -> None:
    adapter = trained("oft")
    with raises("target/missing-rank", match="oft"):
        compose(tiny_model(), [adapter])
    made = compose(tiny_model(), [adapter], by=COMPOSERS["svd"].config(name="svd", energy=0.9))  # type: ignore[call-arg]
    assert all(report.error <= 0.1**0.5 for report in made.sites.values())


@pytest.mark.parametrize(
    ("method", "targets", "match"),
    [("bitfit", ("q_proj",), "bias"), ("norm-tuning", "all-norms", "norm"), ("full", ("q_proj",), "bias")],
)
def test_what_a_lora_cannot_hold_is_refused(method: str, targets: Any, match: str) -> None:
    base = lambda: tiny_model(attention_bias=True)  # noqa: E731
    adapter = trained(method, base=base(), targets=targets)
    model = base()
    with raises("target/not-plain-lora", match=match):
        compose(model, [adapter], rank=4)
    assert not hosts(model), "the model is as it was"


@pytest.mark.parametrize("method", ["houlsby", "prompt"])
def test_what_is_no_change_of_weights_is_refused(method: str) -> None:
    with raises("target/not-mergeable"):
        compose(model := tiny_model(), [trained(method)], rank=4)
    assert not hosts(model)


def test_a_quantized_base_is_its_own() -> None:
    base = lambda: quantize(tiny_model(), "int8")  # noqa: E731
    adapter = trained("lora", base=base())
    close(answers(compose(base(), [adapter]).adapter, base()), answers(adapter, base()), "int8")


# What is asked for ------------------------------------------------------------------------------------------------


def test_adapters_of_different_bases_are_refused_with_both_names() -> None:
    one = trained("lora")
    other = trained("lora", base=tiny_model(seed=5))
    named = replace(other, base=dict(other.base) | {"name": "elsewhere"})
    with raises("base/other-base", match="elsewhere") as caught:
        compose(tiny_model(), [one, named])
    assert repr(one.base["name"]) in str(caught.value)
    with raises("base/other-base", match="elsewhere"):
        compose(tiny_model(), [named])


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        ({"by": "teis"}, "recipe/unknown-composer", "'ties'"),
        ({"by": "knots"}, "recipe/unknown-composer", "is a space"),
        ({"by": "linear", "space": "factors"}, "recipe/conflicting-settings", "core, knots, ctm, product"),
        ({"by": "linear", "convention": "peft"}, "recipe/conflicting-settings", "only paper"),
        ({"weights": [1.0]}, "recipe/unusable-weights", "1 weights for 2 adapters"),
        ({"weights": [0.0, 0.0]}, "recipe/unusable-weights", "not all 0"),
        ({"weights": [1.0, float("nan")]}, "recipe/unusable-weights", "finite"),
        ({"by": "karcher", "weights": [1.0, -1.0]}, "recipe/unusable-weights", "below 0"),
        ({"by": "svd"}, "recipe/missing-option", "rank"),
        ({"space": "product"}, "recipe/missing-option", "full rank"),
        ({"space": "ctm"}, "recipe/missing-option", "subspace"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], code: str, match: str) -> None:
    adapters = [trained("lora", targets=("q_proj",)), trained("lora", targets=("q_proj",), seed=2)]
    with raises(code, match=match):
        compose(tiny_model(), adapters, **options)


def test_slerp_takes_two_and_nothing_takes_none() -> None:
    with raises("recipe/too-many-adapters", match="karcher"):
        compose(tiny_model(), [trained("lora", targets=("q_proj",))] * 3, by="slerp")
    with raises("recipe/missing-option", match="no adapter"):
        compose(tiny_model(), [])


GOLDEN = Path(__file__).parent.parent / "golden" / "peft-0.13"


@pytest.mark.parametrize("case", ["head", "both-ends", "embeddings", "tied-head", "patterns", "dora"])
def test_adapters_of_older_pefts_compose_with_all_that_they_change(case: str) -> None:
    """Some are several deltas here, such as factors and a replaced output head."""
    base = lambda: golden_base(**GOLDEN_CASES[case][1]).requires_grad_(False)  # noqa: E731
    adapter = Adapter.read(GOLDEN / case)
    attach_adapter(wanted := base(), adapter)
    made = compose(composing := base(), [adapter], rank=48)
    assert not hosts(composing)
    assert not attachment(composing).members
    attach_adapter(found := base(), made.adapter)
    with torch.no_grad():
        close(found(input_ids=IDS).logits, wanted(input_ids=IDS).logits, case)
