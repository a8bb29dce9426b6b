"""Methods that train a part of the weights, and modules beside the feed-forward block.

Against PEFT where it has them, else against equations written out entry by entry.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.config.schema import build
from graftlm.deltas.s2ft import S2ft
from graftlm.deltas.trainable_tokens import TrainableTokensConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts, penalty, trainable
from graftlm.model.state_dict import merged_state
from graftlm.passes.statistics import collect
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move, perturbed, tiny_config
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises
from tests.golden.check import against_peft, against_reference

LM = {"task_type": "CAUSAL_LM"}


def untied() -> Any:
    return tiny_model(tie_word_embeddings=False)


def with_gains() -> Any:
    """A base whose norms have gains other than 1."""
    model, generator = tiny_model(), torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) / 3)
    return model


def the_delta(model: Any, site: str) -> Any:
    (delta,) = hosts(model)[site].on()
    return delta


# PEFT has them ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_norm_tuning_against_peft(tmp_path: Path) -> None:
    against_peft("norm-tuning", peft.LNTuningConfig(**LM), tmp_path / "all", base=with_gains)
    some = peft.LNTuningConfig(target_modules=["post_attention_layernorm"], **LM)
    against_peft("norm-tuning", some, tmp_path / "some", base=with_gains)


def test_fresh_norm_tuning_holds_the_gains_and_is_the_base() -> None:
    model = with_gains()
    before = logits(model)
    attach_tiny("norm-tuning", model)
    host = hosts(model)["model.norm"]
    assert torch.equal(the_delta(model, "model.norm").g, host.view.weight)
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore")
def test_norms_with_biases_against_peft(tmp_path: Path) -> None:
    against_peft("norm-tuning", peft.LNTuningConfig(target_modules=["ln_1", "ln_f"], **LM), tmp_path, base=tiny_gpt2)


@pytest.mark.filterwarnings("ignore")
def test_tokens_of_a_tied_table_are_not_given_to_peft_which_would_move_the_head(tmp_path: Path) -> None:
    model = perturbed("trainable-tokens", tiny_model())
    save_adapter(model, tmp_path / "a")
    with pytest.raises((ValueError, KeyError)):
        peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "a")
    other = tiny_model()
    load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_trainable_tokens_against_peft(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[299, 3, 120, 55], **LM)
    ours = against_peft("trainable-tokens", config, tmp_path, base=untied)
    assert the_delta(ours, "model.embed_tokens").config.tokens == (299, 3, 120, 55)


@pytest.mark.filterwarnings("ignore")
def test_tokens_of_an_output_head_against_peft(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[299, 3, 120], target_modules=["lm_head"], **LM)
    ours = against_peft("trainable-tokens", config, tmp_path, base=untied)
    assert the_delta(ours, "lm_head").T.shape == (3, 32)


def test_trainable_tokens_change_the_rows_of_their_tokens_alone() -> None:
    model = perturbed("trainable-tokens", tiny_model(), tokens=(270, 3))
    table, state = tiny_model().model.embed_tokens.weight, merged_state(model)
    T = the_delta(model, "model.embed_tokens").T
    merged = state["model.embed_tokens.weight"]
    close(merged[[270, 3]], T, "the embeddings of the tokens")
    others = [token for token in range(300) if token not in (270, 3)]
    assert torch.equal(merged[others], table[others])
    assert torch.equal(state["lm_head.weight"], table), "a tied head stays"
    embedded = hosts(model)["model.embed_tokens"](torch.tensor([[3, 7, 270]]))[0]
    close(embedded, torch.stack([T[1], table[7], T[0]]), "what the layer returns")


def test_token_ids_are_checked() -> None:
    with raises("recipe/invalid-value", match="has an id twice"):
        build(TrainableTokensConfig, {"tokens": [3, 3]}, source="test")
    with raises("recipe/invalid-value", match="tokens"):
        build(TrainableTokensConfig, {"tokens": []}, source="test")
    with raises("target/token-out-of-range", match=r"300 .* model\.embed_tokens"):
        attach(tiny_model(), TrainableTokensConfig(tokens=(300,)))
    with raises("target/not-an-embedding", match="layers.0.self_attn.q_proj"):
        attach(tiny_model(), TrainableTokensConfig(tokens=(3,)), targets="all-linear")


# A part of the weights -------------------------------------------------------------------------------------------


def test_last_layers_is_fine_tuning_of_the_last_layers() -> None:
    """Its gradients are those of a model whose last layer is not frozen, tensor by tensor."""
    ours, plain = attach_tiny("last-layers", tiny_gpt2(), last=1), tiny_gpt2()
    plain.transformer.h[1].requires_grad_(True)
    for model in (ours, plain):
        model(ids(), labels=ids()).loss.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert len(wanted) == 12
    names = {".deltas.default.full.D": ".weight", ".deltas.default.full.d": ".bias"}
    found = {}
    for name, parameter in trainable(ours).items():
        (ending,) = (e for e in names if name.endswith(e))
        found[name.removesuffix(ending) + names[ending]] = parameter.grad
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        close(grad.T if grad.dim() == 2 else grad, wanted[name], name)  # Conv1D keeps its weight transposed


@pytest.mark.parametrize(("last", "layers"), [(1, {1}), (2, {0, 1}), (9, {0, 1})])
def test_last_layers_counts_from_the_output(last: int, layers: set[int]) -> None:
    model = attach_tiny("last-layers", tiny_model(), last=last)
    assert {host.on()[0].site.layer for host in hosts(model).values()} == layers
    assert len(hosts(model)) == 9 * len(layers), "seven linear layers and two norms of each"


def test_last_layers_is_another_weight() -> None:
    against_reference("last-layers", lambda t, W, b, x, d: x @ (W + t["full.D"]).T, targets="all-linear")


def clamp(number: float) -> float:
    return min(1.0, max(0.0, number))


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


@pytest.mark.parametrize("structured", [True, False])
def test_diff_pruning_against_the_equation_of_its_gates(structured: bool) -> None:
    def layer(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        s = 1 / (1 + torch.exp(-(0.5 + t["a"])))  # u = 1/2 has no noise in it
        z = torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * 3 - 1.5))
        if structured:
            z = z * torch.clamp(3 / (1 + torch.exp(-(0.5 + t["a_group"]))) - 1.5, 0, 1)
        return torch.einsum("oi,ni->no", W + z * t["w"], x)

    against_reference("diff-pruning", layer, structured=structured)


def test_the_penalty_is_the_expected_number_of_open_entries() -> None:
    model = perturbed("diff-pruning", tiny_model(), sparsity=0.01, targets=("q_proj",))
    wanted = 0.0
    for host in hosts(model).values():
        (delta,) = host.on()
        group, a = sigmoid(0.5 + float(delta.a_group.detach())), delta.a.detach()
        for i, j in itertools.product(range(32), range(32)):
            wanted += 0.01 * sigmoid(0.5 + float(a[i, j])) * group
    made = penalty(model)
    assert made is not None
    assert float(made.detach()) == pytest.approx(wanted, rel=1e-5)
    made.backward()
    gates = [p for name, p in trainable(model).items() if ".a" in name]
    assert all(bool(p.grad is not None and (p.grad > 0).all()) for p in gates), "less open costs less"


def test_gates_are_hard_concrete_in_training() -> None:
    """P(z = 0), P(z = 1) and the mean of z over many draws, against integrals over u on a fine grid."""
    model = attach_tiny("diff-pruning", tiny_model().train(), targets=("gate_proj",), gate=0.5, structured=False)
    delta = the_delta(model, "model.layers.0.mlp.gate_proj")
    with torch.no_grad():
        delta.w.fill_(1)
    torch.manual_seed(0)
    z = torch.stack([delta.matrix().detach() for _ in range(40)])
    grid = [
        clamp(3 * sigmoid(math.log(u / (1 - u)) + 0.5) - 1.5) for u in (torch.arange(20000) + 0.5).div(20000).tolist()
    ]
    for what, ours, theirs in (
        ("shut", (z == 0).float().mean(), sum(g == 0 for g in grid) / len(grid)),
        ("open", (z > 0).float().mean(), sigmoid(0.5)),
        ("wide open", (z == 1).float().mean(), sum(g == 1 for g in grid) / len(grid)),
        ("mean", z.mean(), sum(grid) / len(grid)),
    ):
        assert float(ours) == pytest.approx(theirs, abs=0.01), what
    torch.manual_seed(0)
    assert torch.equal(delta.matrix(), z[0]), "the noise is torch's own"
    with torch.no_grad():
        assert torch.equal(delta.matrix(), delta.matrix()), "no noise where no gradient is wanted"
    assert torch.equal(delta.eval().matrix(), delta.matrix())


def test_noise_is_the_same_when_activations_are_computed_again() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = perturbed("diff-pruning", tiny_model()).train()
        model.config.use_cache = False
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(ids()).logits.square().sum().backward()
        gradients.append([p.grad for p in trainable(model).values()])
    for ours, wanted in zip(*gradients, strict=True):
        assert ours is not None
        assert wanted is not None
        close(ours, wanted, "gradient under checkpointing")


def test_diff_pruning_starts_with_open_gates_and_no_difference() -> None:
    delta = the_delta(attach_tiny("diff-pruning", tiny_model(), gate=5.0), "model.layers.0.mlp.up_proj")
    assert bool((delta._gate(delta.a) == 1).all())
    assert not bool(delta.matrix().any())


@pytest.mark.parametrize("run", [1, 2])
def test_s2ft_changes_whole_columns(run: int) -> None:
    def layer(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        changed = W.clone()
        for number, channel in enumerate(t["channels"].tolist()):
            changed[:, channel] = W[:, channel] + t["V"][:, number]
        return x @ changed.T

    against_reference("s2ft", layer, run=run)


def test_s2ft_chooses_channels_at_random_and_heads_whole() -> None:
    model = perturbed("s2ft", tiny_model(), r=19, run=8)
    found = {host.on()[0].channels for host in hosts(model).values()}
    assert {site.rpartition(".")[2] for site in hosts(model)} == {"o_proj", "down_proj"}
    for channels in found:
        heads = channels.view(-1, 8)
        assert heads.shape[0] == 2, "as many whole heads as fit into r"
        assert bool((heads % 8 == torch.arange(8)).all())
        assert len(set((heads[:, 0] // 8).tolist())) == 2
    assert len({tuple(channels.tolist()) for channels in found}) > 1, "not the same ones in each layer"
    delta = the_delta(model, "model.layers.0.mlp.down_proj")
    assert isinstance(delta, S2ft)
    assert int(torch.linalg.matrix_rank(delta.matrix())) == 16


@pytest.mark.parametrize("block", [8, 10, 40])
def test_smt_changes_whole_blocks(block: int) -> None:
    """10 leaves rows and columns over, 40 is larger than the layers."""

    def layer(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        changed = W.clone()
        h, w = min(block, W.shape[0]), min(block, W.shape[1])
        for number, which in enumerate(t["chosen"].tolist()):
            i, j = divmod(which, W.shape[1] // w)
            changed[i * h : (i + 1) * h, j * w : (j + 1) * w] += t["V"][number]
        return x @ changed.T

    against_reference("smt", layer, block=block)


def test_smt_chooses_the_blocks_with_the_greatest_gradient() -> None:
    plain = tiny_model()
    plain.requires_grad_(True)
    plain(ids(), labels=ids()).loss.backward()
    model = attach_tiny("smt", tiny_model(), block=8, density=0.2)
    for site, host in hosts(model).items():
        G = plain.get_submodule(site).weight.grad
        scores = {}
        for i, j in itertools.product(range(G.shape[0] // 8), range(4)):
            scores[4 * i + j] = float(sum(abs(v) for v in G[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten().tolist()))
        best = sorted(sorted(scores, key=scores.__getitem__)[-host.on()[0].taken :])
        assert host.on()[0].chosen.tolist() == best, site
    assert {site.rpartition(".")[2] for site in hosts(model)} == {"q_proj", "k_proj", "v_proj"}


def test_spiel_changes_single_weights() -> None:
    def layer(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        flat = list(W.flatten().unbind())
        for index, difference in zip(t["eta"].tolist(), t["phi"], strict=True):
            flat[index] = flat[index] + difference
        return x @ torch.stack(flat).view(W.shape).T

    against_reference("spiel", layer, density=0.02)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.7])
def test_fresh_indices_of_spiel_are_different_from_each_other_and_depend_on_the_seed(density: float) -> None:
    found = []
    for seed in (0, 0, 1):
        delta = the_delta(attach_tiny("spiel", tiny_model(), density=density, seed=seed), "model.layers.0.mlp.up_proj")
        eta = delta.eta.tolist()
        assert len(set(eta)) == len(eta) == max(1, int(density * 48 * 32))
        assert min(eta) >= 0
        assert max(eta) < 48 * 32
        found.append(eta)
    assert found[0] == found[1]
    if density == 0.01:
        assert found[0] != found[2]


def test_spiel_starts_from_the_gradient_where_it_is_known() -> None:
    model = tiny_model()
    config = tiny_config("spiel", density=0.05)
    statistics = collect(model, config, ("gradient",), [lambda: model(ids(), labels=ids()).loss])
    attach(model, config, statistics=statistics)
    for site, host in hosts(model).items():
        sizes = statistics[site]["gradient"].abs().flatten()
        chosen = host.on()[0].eta
        others = [index for index in range(len(sizes)) if index not in set(chosen.tolist())]
        assert float(sizes[chosen].min()) >= float(sizes[others].max())


# Beside the feed-forward block -----------------------------------------------------------------------------------


def mlp_with(name: str, equation: Any) -> None:
    """The block's output and every gradient with the adapter on, ours against an equation of (tensors, x, y)."""
    model = move(perturbed(name, tiny_model()), seed=2)
    assert set(hosts(model)) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    delta = the_delta(model, "model.layers.0.mlp")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    y = tiny_model().model.layers[0].mlp(x)
    tensors = dict(delta.named_parameters())
    results = []
    for made in (model.model.layers[0].mlp(x), equation(tensors, x, y)):
        direction = torch.linspace(-1, 1, made.numel()).view_as(made)
        results.append((made, torch.autograd.grad((made * direction).sum(), list(tensors.values()))))
    close(results[0][0], results[1][0], f"{name}: output")
    for key, ours, wanted in zip(tensors, results[0][1], results[1][1], strict=True):
        close(ours, wanted, f"{name}: gradient of {key}")


def test_lin_adapter_norms_what_the_block_returns() -> None:
    def equation(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        mean = y.sum(-1, keepdim=True) / 32
        variance = ((y - mean) ** 2).sum(-1, keepdim=True) / 32
        normed = t["g"] * (y - mean) / (variance + 1e-5).sqrt() + t["c"]
        inner = torch.einsum("rd,btd->btr", t["D"], normed) + t["d"]
        return y + torch.einsum("dr,btr->btd", t["U"], inner * (inner > 0)) + t["u"]

    mlp_with("lin-adapter", equation)


def test_parallel_reads_what_the_block_reads() -> None:
    def equation(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        inner = torch.einsum("rd,btd->btr", t["D"], x) + t["d"]
        return y + 4 * (torch.einsum("dr,btr->btd", t["U"], inner * (inner > 0)) + t["u"])

    mlp_with("parallel", equation)
