"""Methods of 2024 and 2025: C3A, RoAd, HiRA, DeLoRA, GraLoRA, Lily, BEFT and ReFT.

Against PEFT, both ways through the disk; and against the papers' equations, written out entry by entry.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.c3a import layer as peft_c3a
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import Tensor

from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import why_not_peft
from graftlm.config.schema import build
from graftlm.deltas.gralora import GraloraConfig
from graftlm.deltas.lily import LilyConfig
from graftlm.deltas.road import RoadConfig
from graftlm.model.registry import hosts, trainable
from graftlm.model.sites import transformer_layers
from graftlm.model.state_dict import merged_state
from graftlm.testing.deltas import attach_tiny, close, logits, perturbed
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises
from tests.golden.check import LINEAR, against_peft, against_reference, pattern_comes_and_is_not_written

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ON: dict[str, Any] = {"target_modules": LINEAR, **LM}
BLOCKS = {"q_proj": 16, "down_proj": 4}
CASES: dict[str, tuple[str, Any]] = {
    "c3a": ("c3a", peft.C3AConfig(block_size=8, **ON)),
    "c3a of an odd width": ("c3a", peft.C3AConfig(block_size=1, **ON)),
    "c3a from zero": ("c3a", peft.C3AConfig(block_size=16, init_weights=True, **ON)),
    "road 1": ("road", peft.RoadConfig(group_size=8, **ON)),
    "road 2": ("road", peft.RoadConfig(variant="road_2", group_size=16, **ON)),
    "road 4": ("road", peft.RoadConfig(variant="road_4", group_size=4, **ON)),
    "road 4 of neighbors": ("road", peft.RoadConfig(variant="road_4", group_size=2, **ON)),
    "hira": ("hira", peft.HiraConfig(r=4, **ON)),
    "hira with a pattern, which PEFT does not read": ("hira", peft.HiraConfig(r=4, rank_pattern={"q_proj": 2}, **ON)),
    "delora": ("delora", peft.DeloraConfig(r=4, **ON)),
    "delora with patterns": (
        "delora",
        peft.DeloraConfig(r=4, delora_lambda=3, rank_pattern={"up_proj": 2}, lambda_pattern={"q_proj": 7}, **ON),
    ),
    "beft": ("beft", peft.BeftConfig(target_modules=["v_proj"], **LM)),
    "beft on other layers": ("beft", peft.BeftConfig(**ON)),
    "gralora": ("gralora", peft.GraloraConfig(r=4, alpha=6, **ON)),
    "gralora with four blocks": ("gralora", peft.GraloraConfig(r=8, alpha=6, gralora_k=4, **ON)),
    "gralora with a lora": ("gralora", peft.GraloraConfig(r=4, alpha=6, hybrid_r=3, **ON)),
}


def biased() -> Any:
    """A tiny model whose attention has biases, other than zero."""
    model = tiny_model(attention_bias=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(key)))
    return model


@pytest.fixture(autouse=True)
def _the_gradient_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of PEFT 0.21.2's C3A is no gradient of its forward pass; here autograd takes its place."""
    monkeypatch.setattr(peft_c3a, "BlockCircularConvolution", SimpleNamespace(apply=forward_of_peft))


def forward_of_peft(x: Tensor, w: Tensor) -> Tensor:
    context: Any = SimpleNamespace(save_for_backward=lambda *tensors: None)
    found: Tensor = BlockCircularConvolution.forward(context, x, w)
    return found


def test_the_backward_pass_of_c3a_in_peft_is_another_than_autograds() -> None:
    """If this fails, PEFT is mended: the fixture above and the sentence in c3a.py can go."""
    generator = torch.Generator().manual_seed(0)
    x, w, direction = (torch.randn(size, generator=generator) for size in ((3, 8), (3, 2, 4), (3, 12)))
    found = []
    for apply in (BlockCircularConvolution.apply, forward_of_peft):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        found.append(torch.autograd.grad((apply(*leaves) * direction).sum(), leaves))
    (their_x, their_w), (x_grad, w_grad) = found
    close(their_w, w_grad, "gradient of w")
    assert not torch.allclose(their_x, x_grad, atol=0.1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_against_peft(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    against_peft(name, config, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["c3a", "road 2", "hira", "delora", "gralora with a lora", "beft"])
def test_against_peft_with_biases(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    against_peft(name, config, tmp_path, base=biased)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config"), [("hira", peft.HiraConfig(r=4)), ("gralora", peft.GraloraConfig(r=4, alpha=6, hybrid_r=2))]
)
def test_on_gpt2_against_peft(name: str, config: Any, tmp_path: Path) -> None:
    config.target_modules, config.fan_in_fan_out = {"c_attn", "c_fc", "c_proj"}, True
    against_peft(name, config, tmp_path, base=tiny_gpt2)


@pytest.mark.filterwarnings("ignore")
def test_hira_on_embeddings_against_peft(tmp_path: Path) -> None:
    config = peft.HiraConfig(r=4, target_modules=["embed_tokens", "q_proj"], **LM)
    against_peft("hira", config, tmp_path, base=lambda: tiny_model(tie_word_embeddings=False))


# C3A -------------------------------------------------------------------------------------------------------------


def c3a(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    """Entry by entry: dW[i b + p, j b + q] = w_ij[(q - p) mod b] / d_in."""
    w = t["w"]
    width = w.shape[2]
    rows = [
        torch.stack([w[i, j, (q - p) % width] for j in range(w.shape[1]) for q in range(width)])
        for i in range(w.shape[0])
        for p in range(width)
    ]
    y = x @ (W + torch.stack(rows) / W.shape[1]).T
    return y if b is None else y + b


@pytest.mark.parametrize("block", [1, 2, 8])
def test_c3a_is_block_circulant(block: int) -> None:
    against_reference("c3a", c3a, block=block, base=biased, targets=("q_proj", "k_proj"))


def test_c3a_of_an_odd_width_by_a_sum() -> None:
    base = lambda: tiny_model(hidden_size=36, intermediate_size=45)  # noqa: E731
    against_reference("c3a", c3a, block=9, base=base, targets=("up_proj", "down_proj"))


def test_a_block_of_c3a_has_full_rank_and_a_width_that_fits() -> None:
    delta = hosts(perturbed("c3a", tiny_model(), block=16))["model.layers.0.self_attn.q_proj"].on()[0]
    assert torch.linalg.matrix_rank(delta.matrix()) == 32
    with raises("target/indivisible-layer", match="c3a: block is 5, .* 32 inputs and 32 outputs"):
        attach_tiny("c3a", tiny_model(), block=5)


@pytest.mark.filterwarnings("ignore")
def test_a_pattern_of_c3a_comes_from_peft_and_is_not_written_where_peft_would_not_find_it(tmp_path: Path) -> None:
    config = peft.C3AConfig(block_size=8, block_size_pattern=BLOCKS, **ON)
    pattern_comes_and_is_not_written(config, "block_size_pattern", tmp_path)


# RoAd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road_turns_neighbors(variant: int) -> None:
    """Equation 4 with R built block by block; 2 x 2 entries in the order 11, 22 (cosines), then 12, 21 (sines)."""

    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        rows = []
        for pair in range(len(W) // 2):
            at = {
                1: [(pair, pair), (pair, pair)],
                2: [(2 * pair, 2 * pair + 1), (2 * pair, 2 * pair + 1)],
                4: [(4 * pair, 4 * pair + 1), (4 * pair + 2, 4 * pair + 3)],
            }[variant]
            (c1, c2), (s1, s2) = at
            theta, alpha = t["theta"], t["alpha"]
            block = torch.stack(
                [
                    torch.stack([alpha[c1] * torch.cos(theta[c1]), -alpha[s1] * torch.sin(theta[s1])]),
                    torch.stack([alpha[s2] * torch.sin(theta[s2]), alpha[c2] * torch.cos(theta[c2])]),
                ]
            )
            rows.append(block)
        R = torch.block_diag(*rows)
        return (x @ W.T + (0 if b is None else b)) @ R.T

    against_reference("road", reference, base=biased, variant=variant)


def test_road_1_without_a_length_is_a_rotation() -> None:
    host = hosts(perturbed("road", tiny_model(), group_size=8))["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        host.on()[0].alpha.fill_(1)
        W, _ = host.effective()
    close(W.norm(dim=0), host.view.weight.norm(dim=0), "lengths of columns")
    assert float((W - host.view.weight).abs().max()) > 1e-3


def test_road_refuses_groups_that_do_not_fit() -> None:
    with raises("target/indivisible-layer", match="road: group_size is 12, .* 32 outputs"):
        attach_tiny("road", tiny_model(), group_size=12)
    with raises("recipe/invalid-value", match="group_size is 3"):
        build(RoadConfig, {"group_size": 3}, source="recipe.yaml")


# HiRA ------------------------------------------------------------------------------------------------------------


def test_hira_is_a_product_with_w_and_has_more_rank_than_its_factors() -> None:
    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        y = x @ W.T + (0 if b is None else b)
        for k in range(len(t["A"])):  # one rank after the other: B_k * (W (A_k * x))
            y = y + t["B"][:, k] * ((x * t["A"][k]) @ W.T)
        return y

    against_reference("hira", reference, base=biased)
    delta = hosts(perturbed("hira", tiny_model(), r=1))["model.layers.0.self_attn.q_proj"].on()[0]
    assert torch.linalg.matrix_rank(delta.matrix()) == 32


# DeLoRA ----------------------------------------------------------------------------------------------------------


def test_delora_adds_unit_directions_of_one_strength() -> None:
    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        A, B, r = t["A"], t["B"], len(t["A"])
        dW = torch.zeros_like(W)
        for i in range(r):
            dW = dW + t["strength"] / r * torch.outer(B[:, i] / B[:, i].norm(), A[i] / A[i].norm())
        y = x @ (W + dW * W.square().sum(0).sqrt()).T
        return y if b is None else y + b

    against_reference("delora", reference, base=biased)


def test_without_the_lengths_of_w_a_change_of_delora_is_no_larger_than_its_boundary() -> None:
    delta = hosts(perturbed("delora", tiny_model(), scale=3.0))["model.layers.0.mlp.up_proj"].on()[0]
    assert (delta.matrix() / delta.w).norm() <= delta.strength.abs()


# GraLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "hybrid_r"), [(1, 0), (2, 0), (4, 3)])
def test_gralora_is_a_grid_of_loras(k: int, hybrid_r: int) -> None:
    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        each, scale = 4 // k, 6 / (4 + hybrid_r)
        blocks = [
            [
                t["B"][i, j * each : (j + 1) * each].T @ t["A"][j][:, i * each : (i + 1) * each].T  # B_ij A_ij
                for j in range(k)
            ]
            for i in range(k)
        ]
        dW = torch.cat([torch.cat(row, dim=1) for row in blocks])
        if hybrid_r:
            dW = dW + t["D"] @ t["C"]
        return x @ (W + scale * dW).T + (0 if b is None else b)

    against_reference("gralora", reference, base=biased, k=k, hybrid_r=hybrid_r)


def test_gralora_with_one_block_is_lora_and_with_more_it_has_more_rank() -> None:
    for k, rank in ((1, 4), (2, 8), (4, 16)):
        model = perturbed("gralora", tiny_model(), k=k)
        delta = hosts(model)["model.layers.0.self_attn.q_proj"].on()[0]
        assert torch.linalg.matrix_rank(delta.matrix()) == rank
        assert sum(p.numel() for p in trainable(perturbed("lora", tiny_model())).values()) == sum(
            p.numel() for p in trainable(model).values()
        )


def test_gralora_refuses_blocks_that_do_not_fit() -> None:
    with raises("recipe/invalid-value", match="r is 4, which 3 blocks"):
        build(GraloraConfig, {"r": 4, "k": 3}, source="recipe.yaml")
    with raises("target/indivisible-layer", match="gralora: k is 3, .* 32 inputs and 32 outputs"):
        attach_tiny("gralora", tiny_model(), r=6, k=3)


def test_the_reference_of_c3a_is_what_the_fourier_transform_does() -> None:
    """C(w) x = FFT(FFT(w) * IFFT(x)), by sums of complex exponentials."""
    generator = torch.Generator().manual_seed(4)
    w, x = (torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(2))
    turn = torch.exp(torch.outer(torch.arange(6), torch.arange(6)) * (-2j * math.pi / 6)).to(torch.complex128)
    found = turn @ ((turn @ w.to(turn)) * (turn.conj() @ x.to(turn) / 6))
    wanted = torch.stack([torch.stack([w[(q - p) % 6] for q in range(6)]) @ x for p in range(6)])
    close(found.real, wanted, "the transform")


# Lily ------------------------------------------------------------------------------------------------------------


def lily(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    """One token after the other, as the paper has it for a batch of one token."""
    A, B = (t[f"shared.{name}"] for name in d.site.shared.of[d.site.name])
    rows = []
    for token in x:
        low = A @ token
        odds = torch.stack([torch.exp(route @ low) for route in t["R"]])
        mixed = sum(odds[e] / odds.sum() * B[:, e] for e in range(len(odds)))
        rows.append(W @ token + d.config.scaling * mixed @ low)
    y = torch.stack(rows)
    return y if b is None else y + b


@pytest.mark.parametrize("stride", [1, 4])
def test_lily_mixes_the_b_of_all_layers_for_each_token(stride: int) -> None:
    against_reference("lily", lily, base=biased, stride=stride, scaling=0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stride", [1, 2])
def test_lily_for_one_token_against_peft(stride: int) -> None:
    """PEFT takes the mean of p over the tokens: of one, it is the same."""
    config = peft.LilyConfig(r=4, stride_A=stride, num_B=3, scaling=0.5, **ON)
    theirs = peft.get_peft_model(biased(), config).eval()
    ours = perturbed("lily", biased(), stride=stride, num_B=3, scaling=0.5)
    x = {width: torch.randn(1, 1, width, generator=torch.Generator().manual_seed(width)) for width in (32, 48)}
    pairs: dict[Tensor, Tensor] = {}
    for name, host in hosts(ours).items():
        layer, delta = theirs.base_model.model.get_submodule(name), host.deltas["default"]
        A, B = (getattr(delta.site.shared, name) for name in delta.site.shared.of[name])
        their_A, their_B = (getattr(layer, f"lily_{part}").default.weight for part in "AB")
        with torch.no_grad():
            their_A.copy_(A)
            their_B.copy_(B.permute(1, 2, 0).reshape(their_B.shape))  # PEFT: num_B times r rows
            layer.lily_router.default.weight.copy_(delta.R)
        pairs |= {A: their_A, B: their_B, delta.R: layer.lily_router.default.weight}
    for name, host in hosts(ours).items():
        here = x[host.view.d_in]
        y, wanted = host(here), theirs.base_model.model.get_submodule(name)(here)
        close(y, wanted, f"lily against PEFT at {name}")
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        for each in (y, wanted):
            (each * direction).sum().backward()
    for mine, wanted in pairs.items():
        grad = wanted.grad if mine.dim() == 2 else wanted.grad.view(3, 4, -1).permute(2, 0, 1)
        close(mine.grad, grad, "gradient of lily against PEFT")
    assert len({id(wanted) for wanted in pairs.values()}) == len(pairs)  # PEFT shares where we do
    routers, layers = 14, 2
    assert len(pairs) == routers + 7 * len(range(0, layers, stride)) + 7


def test_a_token_of_lily_depends_on_no_other() -> None:
    host = hosts(perturbed("lily", tiny_model(), scale=1.0))["model.layers.0.mlp.up_proj"]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    close(host(x)[1, 3], host(x[1:, 3:4])[0, 0], "a token alone")


def test_lily_refuses_a_router_without_a_choice_and_peft_s_mean(tmp_path: Path) -> None:
    with raises("recipe/invalid-value", match="num_B is 1"):
        build(LilyConfig, {"num_B": 1}, source="recipe.yaml")
    peft.get_peft_model(tiny_model(), peft.LilyConfig(r=4, **ON)).save_pretrained(tmp_path)
    with raises("adapter/unsupported-setting", match="PEFT mixes the B of Lily by the mean over all tokens"):
        load_adapter(tiny_model(), tmp_path)


# BEFT ------------------------------------------------------------------------------------------------------------


def test_beft_changes_the_values_alone_also_in_a_fused_projection() -> None:
    assert list(hosts(attach_tiny("beft", tiny_model()))) == [f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)]
    model = perturbed("beft", tiny_gpt2())
    before, after = tiny_gpt2().state_dict(), merged_state(model)
    for key, tensor in after.items():
        changed = (tensor != before[key]).nonzero().flatten().tolist()
        assert changed == (list(range(64, 96)) if key.endswith("c_attn.bias") else []), key
    assert "part of a layer" in why_not_peft(model)


# ReFT ------------------------------------------------------------------------------------------------------------


def rotation(P: Tensor) -> Tensor:
    """The rows of P made orthonormal one after the other, by Gram and Schmidt."""
    rows: list[Tensor] = []
    for p in P:
        for row in rows:
            p = p - (row @ p) * row
        rows.append(p / p.norm())
    return torch.stack(rows)


def loreft(P: Tensor, W: Tensor, b: Tensor, h: Tensor) -> Tensor:
    R = rotation(P)
    return torch.stack([each + R.T @ (W @ each + b - R @ each) for each in h.flatten(0, -2)]).view_as(h)


def direft(P: Tensor, W: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return torch.stack([each + P.T @ (W @ each + b) for each in h.flatten(0, -2)]).view_as(h)


REFT = {"loreft": loreft, "direft": direft}


@pytest.mark.parametrize("form", REFT)
def test_reft_is_its_equation(form: str) -> None:
    delta = next(iter(hosts(perturbed("reft", tiny_model(), form=form)).values())).on()[0]
    h = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    exact = [t.detach().double().requires_grad_() for t in (delta.P, delta.W, delta.b, h)]
    h.requires_grad_()
    y, wanted = delta(h, h, None), REFT[form](*exact)
    close(y, wanted, form)
    grads = torch.autograd.grad((y * direction).sum(), [delta.P, delta.W, delta.b, h])
    for mine, exactly in zip(grads, torch.autograd.grad((wanted * direction.double()).sum(), exact), strict=True):
        close(mine, exactly, f"gradient of {form}")


@pytest.mark.parametrize("base", [tiny_model, tiny_gpt2])
def test_reft_acts_on_the_residual_stream_behind_every_layer(base: Any) -> None:
    model, plain = perturbed("reft", base()), base()
    deltas = [host.on()[0] for host in hosts(model).values()]
    layers = list(transformer_layers(plain).values())
    assert len(layers) == len(deltas)
    for layer, delta in zip(layers, deltas, strict=True):

        def after(module: Any, args: Any, out: Any, delta: Any = delta) -> Any:
            h = loreft(delta.P, delta.W, delta.b, out[0] if isinstance(out, tuple) else out)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        layer.register_forward_hook(after)
    close(logits(model), logits(plain), "the model")


def test_loreft_changes_r_directions_alone_and_sets_them() -> None:
    delta = next(iter(hosts(perturbed("reft", tiny_model(), r=3)).values())).on()[0]
    h = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    R = rotation(delta.P)
    assert torch.linalg.matrix_rank(delta(h, h, None) - h, rtol=1e-4) == 3
    close(R @ R.T, torch.eye(3), "orthonormal")
    close(delta(h, h, None) @ R.T, h @ delta.W.T + delta.b, "what h has in these directions")


def test_reft_refuses_more_directions_than_there_are() -> None:
    with raises("target/rank-too-large", match="r is 33, and .* has 32 directions"):
        attach_tiny("reft", tiny_model(), r=33)
