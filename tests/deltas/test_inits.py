"""Every init on every method that admits it; what defines each, checked by another route; and PEFT's, where it has it.

The other route is NumPy in double precision on W, on gradients from plain autograd and on activations that plain hooks
hear, so that neither our linear algebra nor our collector is its own witness.
"""

import copy
import dataclasses
import sys
import warnings
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.deltas import METHODS
from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits import INITS
from graftlm.deltas.inits.lora_sb import ETA
from graftlm.deltas.inits.pissa_fast import pissa_fast
from graftlm.deltas.lora import Lora, LoraConfig
from graftlm.errors import TargetError
from graftlm.hub.load import load_base
from graftlm.hub.quantize_base import quantize
from graftlm.model.attach import attach, detach
from graftlm.model.initialize import part_with
from graftlm.model.modes import deltas_off
from graftlm.model.quantize import QuantizedLinear
from graftlm.model.registry import hosts, trainable
from graftlm.model.state_dict import merged_state
from graftlm.passes.statistics import collect
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move, plain_with, tiny_config
from graftlm.testing.tiny import save_tiny_base, tiny_gpt2, tiny_model
from tests.errors import raises

TARGETS = ("k_proj", "up_proj")
"""Layers of [16, 32] and [48, 32]: one wide, one tall."""
PAIR = sorted(name for name, init in INITS.items() if init.tensors == ("A", "B"))
"""The inits of a product B A, which LoRA admits."""
QUANTIZED = ["loftq", "lq-lora", "quailora"]
"""The inits that start from what quantizing lost: they want a quantized base, and its files."""
SPLIT = ["corda", "lora-ga", "milora", "olora", "pissa", "pissa-fast"]
"""Those of them whose B A is not zero."""


@cache
def deltas_of_all_methods() -> Mapping[str, Delta]:
    """A delta of every method that sits on linear layers, as a file would fill it."""
    found = {}
    for name, method in METHODS.items():
        if "linear" in method.delta.kinds:
            try:
                model = attach(tiny_model(), tiny_config(name, targets=TARGETS), start=False)
            except TargetError:  # a method that wants to choose its layers itself
                continue
            found[name] = next(iter(hosts(model).values())).on()[0]
    return found


def admits(method: str, init: str) -> bool:
    try:
        part_with(deltas_of_all_methods()[method], INITS[init].tensors, init)
    except TargetError:
        return False
    return True


@pytest.fixture(autouse=True, scope="module")
def _folder(base_folder: Path) -> None:
    FILES["tiny"] = base_folder


FILES: dict[str, Path] = {}


def base_for(init: str, quantization: str = "nf4") -> Any:
    """A tiny model, float32; with its linear layers quantized for the inits that want that."""
    return load_base(str(FILES["tiny"]), quantization=quantization).model.float() if init in QUANTIZED else tiny_model()


PAIRS = [
    pytest.param(init, method, id=f"{init}-{method}")
    for init in INITS
    for method in deltas_of_all_methods()
    if init != "zero" and admits(method, init)
]


def on(model: Any) -> dict[str, Any]:
    """Site -> the one delta there."""
    return {site: host.on()[0] for site, host in hosts(model).items()}


def loss(model: Any) -> Tensor:
    made: Tensor = model(ids(), labels=ids()).loss
    return made


def true_gradients(model: Any, like: Any) -> dict[str, np.ndarray]:
    """dL/dW at the sites of `like`, from a copy of the bare model whose weights have gradients."""
    twin = copy.deepcopy(model).requires_grad_(True)
    loss(twin).backward()
    return {site: double(twin.get_submodule(site).weight.grad) for site in hosts(like)}


def heard(model: Any, like: Any) -> dict[str, np.ndarray]:
    """What the layers at the sites of `like` read in the pass of `loss`, [tokens, d_in]."""
    twin, seen = copy.deepcopy(model), {}
    for site in hosts(like):
        twin.get_submodule(site).register_forward_hook(
            lambda _, x, __, site=site: seen.update({site: double(x[0].flatten(0, 1))})
        )
    loss(twin)
    return seen


def double(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().double())


def best(matrix: np.ndarray, r: int) -> np.ndarray:
    """The best approximation of rank r."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((U[:, :r] * S[:r]) @ Vh[:r])


def same(ours: Any, wanted: np.ndarray, what: str, tolerance: float = 1e-5) -> None:
    ours = ours.detach() if isinstance(ours, Tensor) else torch.as_tensor(ours)
    close(ours, torch.as_tensor(wanted), what, tolerance)


# Every init on every method ------------------------------------------------------------------------------------------


def start(method: str, model: Any, init: str) -> bool:
    """Put the method on the model with the init; False where they do not fit, if the refusal is as it must be."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    try:
        attach_tiny(method, model, init=init, targets=TARGETS)
        return True
    except TargetError as error:
        refusal = str(error)
    assert f"init {init!r}" in refusal or f"init: {init!r}" in refusal, f"the reason must name the init: {refusal}"
    assert all(modules[key] is module for key, module in model.named_modules()), "a refusal must leave the model"
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    return False


def test_the_methods_that_each_init_was_written_for_admit_it() -> None:
    for init in PAIR:
        for method in ("lora", "dora"):
            attach_tiny(method, base_for(init), init=init, targets=TARGETS)
    attach_tiny("lora-xs", tiny_model(), init="lora-sb", targets=TARGETS)
    attach_tiny("nlora", tiny_model(), init="nystrom", targets=TARGETS)


@pytest.mark.sampled
@pytest.mark.parametrize(("init", "method"), PAIRS)
def test_a_fresh_delta_is_the_base_and_can_learn(init: str, method: str) -> None:
    model = base_for(init)
    before = logits(model)
    if not start(method, model, init):
        return
    if INITS[init].starts_at_base and not METHODS[method].delta.starts_away:
        close(logits(model), before, f"the model with a fresh {method} from {init} against its base")
    loss(model).backward()
    for site, delta in on(model).items():
        gradients = [p.grad for p in delta.parameters() if p.requires_grad]
        assert any(g is not None and bool(g.any()) for g in gradients), f"{site}: nothing would ever move"


@pytest.mark.sampled
@pytest.mark.parametrize(("init", "method"), PAIRS)
def test_off_is_the_base_merged_is_the_model_and_it_survives_the_disk(init: str, method: str, tmp_path: Path) -> None:
    model = base_for(init)
    modules, before = dict(model.named_modules()), logits(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if not start(method, model, init):
        return
    moved = logits(move(model))
    assert not torch.equal(moved, before)
    with deltas_off(model):
        assert torch.equal(logits(model), before), "with deltas off, logits must be the base's bit for bit"
    if METHODS[method].mergeable:
        close(logits(plain_with(merged_state(model))), moved, "the merged model against the model with its delta")
    save_adapter(model, tmp_path / "a")
    other = base_for(init)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), moved), "a loaded adapter must compute the same bits"
    save_adapter(other, tmp_path / "b")
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b"), "save, load, save must give the same bytes"
    detach(model)
    assert all(modules[key] is module for key, module in model.named_modules())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def _bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("init", [init for init in PAIR if init not in QUANTIZED])
def test_on_layers_that_store_w_transposed_and_on_a_bf16_base(init: str) -> None:
    model = tiny_gpt2()
    before = logits(model)
    attach_tiny("lora", model, init=init)
    close(logits(model), before, f"GPT-2 with {init} against its base")
    model = tiny_model().bfloat16()
    before = logits(model)
    attach_tiny("lora", model, init=init)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    close(logits(model).float(), before.float(), f"a bf16 base with {init} against itself", tolerance=0.05)


@pytest.mark.parametrize("init", PAIR)
def test_the_same_seed_gives_the_same_start_and_the_global_generator_is_left_alone(init: str) -> None:
    starts = []
    for seed in (7, 7, 8):
        torch.manual_seed(len(starts))
        state = torch.get_rng_state()
        delta = on(attach_tiny("lora", base_for(init), init=init, seed=seed, targets=TARGETS))
        torch.manual_seed(len(starts))
        assert torch.equal(torch.get_rng_state(), state)
        starts.append({f"{site}.{key}": t for site, d in delta.items() for key, t in d.state_dict().items()})
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    drawn = init in ("gaussian", "kaiming", "lora-ga", "orthogonal", "pissa-fast")
    assert any(not torch.equal(starts[0][key], starts[2][key]) for key in starts[0]) is drawn


@pytest.mark.parametrize("init", ["pissa", "lora-ga"])
def test_a_second_delta_acts_beside_one_that_took_a_part_of_w_out(init: str) -> None:
    model = tiny_model()
    move(attach_tiny("lora", model, init=init, targets=TARGETS))
    attach_tiny("dora", model, delta="second", targets=TARGETS, init="milora")
    move(model, seed=4)
    close(logits(plain_with(merged_state(model))), logits(model), "both merged against both on")


@pytest.mark.parametrize("init", PAIR)
def test_an_offset_is_kept_only_where_b_a_is_not_zero(init: str) -> None:
    model = attach_tiny("lora", base_for(init), init=init, targets=TARGETS)
    for delta in on(model).values():
        assert (delta.offset_A is not None) is (init in SPLIT)
        assert (delta.offset_B is not None) is (init in SPLIT)


# What defines each ---------------------------------------------------------------------------------------------------


def layer(d_in: int = 400, d_out: int = 10, seed: int = 3) -> Site:
    return Site("a.b", d_in, d_out, lambda: torch.zeros(d_out, d_in), seed)


def test_gaussian_is_normal_with_a_standard_deviation_of_one_over_r() -> None:
    made = INITS["gaussian"].make(layer(), Lora(layer(), LoraConfig(r=50)))
    assert made.keys() == {"A"}
    scaled = made["A"] * 50
    assert scaled.shape == (50, 400)
    # 20,000 draws: mean, spread and the share beyond two, within five standard errors
    assert abs(float(scaled.mean())) < 5 / 20_000**0.5
    assert float(scaled.std()) == pytest.approx(1, abs=5 / 40_000**0.5)
    assert float((scaled.abs() > 2).float().mean()) == pytest.approx(0.0455, abs=0.0074)


def test_kaiming_is_loras_own_start() -> None:
    own, other = (on(attach_tiny("lora", tiny_model(), init=init)) for init in ("zero", "kaiming"))
    for site, delta in own.items():
        assert torch.equal(delta.A, other[site].A)
        assert not other[site].B.any()
    bound = torch.nn.init.calculate_gain("leaky_relu", 5**0.5) * (3 / 400) ** 0.5
    A = INITS["kaiming"].make(layer(), Lora(layer(), LoraConfig(r=50)))["A"]
    assert bound * 0.999 < float(A.abs().max()) <= bound


@pytest.mark.parametrize("r", [5, 8])
def test_orthogonal_has_two_factors_whose_product_is_zero(r: int) -> None:
    made = INITS["orthogonal"].make(layer(300, 200), Lora(layer(300, 200), LoraConfig(r=r)))
    A, B = double(made["A"]), double(made["B"])
    assert np.abs(B @ A).max() < 1e-6 * np.abs(B).max() * np.abs(A).max() * r
    assert np.linalg.matrix_rank(A, tol=1e-4) == (r + 1) // 2
    assert np.linalg.matrix_rank(B, tol=1e-4) == r // 2


def test_orthogonal_is_as_large_as_pefts() -> None:
    peft = torch.nn.Sequential(torch.nn.Linear(3000, 2000))
    torch.manual_seed(0)
    theirs = get_peft_model(peft, PeftLoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal"))
    state = {key.split("lora_")[1][0]: t for key, t in theirs.state_dict().items() if "lora_" in key}
    ours = INITS["orthogonal"].make(layer(3000, 2000), Lora(layer(3000, 2000), LoraConfig(r=8)))
    for key in "AB":  # the sum of 8,000 squares or more: 5 standard errors are 8 percent
        assert float(ours[key].norm()) == pytest.approx(float(state[key].norm()), rel=0.08)


def test_pissa_is_the_best_approximation_of_w_evenly_shared() -> None:
    model = tiny_model()
    for site, delta in on(attach_tiny("lora", model, init="pissa")).items():
        assert delta.scale == 1.5
        W = double(delta.site.W())
        same(delta.matrix(), best(W, 4), f"s B A at {site}")
        S = np.linalg.svd(W, compute_uv=False)[:4] / 1.5
        same(delta.A @ delta.A.T, np.diag(S), f"A A^T at {site}")
        same(delta.B.T @ delta.B, np.diag(S), f"B^T B at {site}")


def test_fast_pissa_comes_within_a_percent_of_the_least_error() -> None:
    for delta in on(attach_tiny("lora", tiny_model(), init="pissa-fast")).values():
        W = double(delta.site.W())  # random: no gap between the singular values, the hardest case
        least = np.linalg.norm(W - best(W, 4))
        assert least * 0.99999 <= np.linalg.norm(W - double(delta.matrix())) <= 1.01 * least


def test_fast_pissa_is_pissa_where_the_singular_values_fall() -> None:
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (200, 300))
    W = ((U * torch.arange(1, 201) ** -1.0) @ V[:200]).float()
    site = Site("a", 300, 200, lambda: W, seed=5)
    made = pissa_fast(site, Lora(site, LoraConfig(r=8, alpha=16)))
    same(2 * made["B"] @ made["A"], best(double(W), 8), "s B A")


def test_milora_takes_the_smallest_singular_values_and_leaves_the_others() -> None:
    for site, delta in on(attach_tiny("lora", tiny_model(), init="milora")).items():
        W = double(delta.site.W())
        same(delta.matrix(), W - best(W, min(W.shape) - 4), f"s B A at {site}")
        left = np.linalg.svd(W - double(delta.matrix()), compute_uv=False)
        whole = np.linalg.svd(W, compute_uv=False)
        same(left[:-4], whole[:-4], f"what is left at {site}")
        same(delta.A @ delta.A.T, np.diag(whole[-4:] / 1.5), f"A A^T at {site}")


def test_olora_is_a_qr_decomposition_cut_off() -> None:
    for site, delta in on(attach_tiny("lora", tiny_model(), init="olora")).items():
        W, A, B = double(delta.site.W()), double(delta.A), double(delta.B)
        same(B.T @ B, np.eye(4), f"B^T B at {site}")
        same(B @ A[:, :4], W[:, :4], f"the first columns at {site}")
        assert np.abs(np.tril(A[:, :4], -1)).max() < 1e-6, "A must be upper triangular"
        same(A, B.T @ W, f"A at {site}")


def test_lora_ga_spans_the_gradients_singular_vectors_at_the_papers_size() -> None:
    """With r = 8 the randomised SVD has as many directions as the matrix, and is exact; so in the next test."""
    model = tiny_model()
    deltas = on(attach_tiny("lora", model, init="lora-ga", r=8))
    gradients = true_gradients(tiny_model(), model)
    for site, delta in deltas.items():
        U, _, Vh = np.linalg.svd(gradients[site], full_matrices=False)
        size = delta.site.d_out**0.5 / 16  # (d_out^1/4 / gamma^1/2)^2
        A, B = double(delta.A), double(delta.B)
        same(A @ A.T, size * np.eye(8), f"A A^T at {site}")
        same(A.T @ A, size * Vh[:8].T @ Vh[:8], f"the span of A at {site}")
        same(B @ B.T, size * U[:, 8:16] @ U[:, 8:16].T, f"the span of B at {site}")


def test_lora_gas_first_step_goes_along_the_best_approximation_of_the_gradient_of_rank_2_r() -> None:
    model = tiny_model()
    deltas = on(attach_tiny("lora", model, init="lora-ga", r=8, rslora=True))
    gradients = true_gradients(tiny_model(), model)
    loss(model).backward()
    for site, delta in deltas.items():
        # d(s B A) for a step of -1 along the gradients of A and B, to first order
        step = -delta.scale * (delta.B @ delta.A.grad + delta.B.grad @ delta.A)
        size = delta.scale**2 * delta.site.d_out**0.5 / 16
        same(step, -size * best(gradients[site], 16), f"the first step at {site}")


def test_lora_gas_randomised_svd_comes_within_a_percent_of_the_least_error() -> None:
    model = tiny_model()
    deltas = on(attach_tiny("lora", model, init="lora-ga"))
    gradients = true_gradients(tiny_model(), model)
    for site, delta in deltas.items():
        G, A, B = gradients[site], double(delta.A), double(delta.B)
        V1, U2 = np.linalg.qr(A.T)[0], np.linalg.qr(B)[0]
        reached = U2 @ (U2.T @ G) + (G - U2 @ (U2.T @ G)) @ V1 @ V1.T
        least = np.linalg.norm(G - best(G, 8))
        assert np.linalg.norm(G - reached) <= 1.01 * least


@pytest.mark.parametrize("alpha", [4, 6])
def test_lora_sb_starts_at_the_best_approximation_of_adams_first_step(alpha: float) -> None:
    model = tiny_model()
    deltas = on(attach_tiny("lora-xs", model, init="lora-sb", alpha=alpha, targets=TARGETS))
    gradients = true_gradients(tiny_model(), model)
    for site, delta in deltas.items():
        step = -ETA * np.sign(gradients[site])
        same(delta.matrix(), best(step, 4), f"s B R A at {site}")
        assert (gradients[site] * double(delta.matrix())).sum() < 0, "the step must go downhill"
        same(delta.B.T @ delta.B, np.eye(4), f"B^T B at {site}")
        same(delta.A @ delta.A.T, np.eye(4), f"A A^T at {site}")
        assert delta.offset_A is None, "the model begins after the step, not at the base"
        assert [key for key, p in delta.named_parameters() if p.requires_grad] == ["R"]


def test_lora_sb_begins_below_the_base() -> None:
    """By what the gradient promises for so small a step, in double precision."""
    model = tiny_model().double()
    before = precise_loss(model)
    deltas = on(attach_tiny("lora-xs", model, init="lora-sb", targets=TARGETS))
    gradients = true_gradients(tiny_model(), model)
    for delta in deltas.values():
        delta.double()
    downhill = sum((gradients[site] * double(delta.matrix())).sum() for site, delta in deltas.items())
    assert precise_loss(model) - before == pytest.approx(downhill, rel=1e-3)


def precise_loss(model: Any) -> float:
    """`loss` without the cast to float32 that transformers makes in it."""
    found, targets = logits(model)[:, :-1], ids()[:, 1:]
    return float(torch.nn.functional.cross_entropy(found.flatten(0, 1), targets.flatten()))


def test_nystrom_copies_rows_columns_and_the_block_where_they_cross() -> None:
    for delta in on(attach_tiny("nlora", tiny_model(), init="nystrom", targets=TARGETS)).values():
        W = delta.site.W()
        for i in range(4):
            assert torch.equal(delta.A[i], W[i])
            assert torch.equal(delta.B[:, i], W[:, i])
            for j in range(4):
                assert delta.N[i, j] == W[i, j]


def test_eva_is_the_right_singular_vectors_of_what_the_layer_reads() -> None:
    model = tiny_model()
    deltas = on(attach_tiny("lora", model, init="eva"))
    for site, x in heard(tiny_model(), model).items():
        A, (_, S, Vh) = double(deltas[site].A), np.linalg.svd(x, full_matrices=False)
        same(A @ A.T, np.eye(4), f"A A^T at {site}")
        same(np.linalg.norm(x @ A.T, axis=0), S[:4], f"what each row of A explains at {site}")
        same(np.abs((A * Vh[:4]).sum(1)), np.ones(4), f"the directions at {site}", 1e-4)
        assert not deltas[site].B.any()


def test_evas_b_has_a_greater_gradient_than_that_of_any_other_orthonormal_a() -> None:
    """Theorem 3.2 is about the expectation over gradients that do not depend on x; so is this."""
    model = tiny_model()
    deltas = on(attach_tiny("lora", model, init="eva"))
    generator = np.random.default_rng(0)
    for site, x in heard(tiny_model(), model).items():
        other = np.linalg.qr(generator.standard_normal((x.shape[1], 4)))[0].T
        back = generator.standard_normal((500, len(x)))
        mine, theirs = (np.square(back @ (x @ A.T)).mean() for A in (double(deltas[site].A), other))
        assert mine > theirs


def test_corda_is_the_best_approximation_as_the_layers_inputs_weigh_it() -> None:
    model = tiny_model()
    deltas = on(attach_tiny("lora", model, init="corda"))
    for site, x in heard(tiny_model(), model).items():
        W, C = double(deltas[site].site.W()), x.T @ x / len(x)
        C = C / np.diag(C).mean() + 0.01 * np.eye(len(C))
        A, B, taken = double(deltas[site].A), double(deltas[site].B), double(deltas[site].matrix())
        S = np.linalg.svd(W @ C, compute_uv=False)
        assert np.linalg.norm((W - taken) @ C) == pytest.approx(np.linalg.norm(S[4:]), rel=1e-4)
        same(taken @ C, best(W @ C, 4), f"s B A C at {site}", 1e-4)
        same(B.T @ B, np.diag(S[:4] / 1.5), f"B^T B at {site}", 1e-4)
        same(A @ C @ C @ A.T, np.diag(S[:4] / 1.5), f"A C C A^T at {site}", 1e-4)


def test_corda_does_not_depend_on_the_size_of_the_activations() -> None:
    site = layer(30, 20)
    W, x = (torch.randn(n, 30, generator=torch.Generator().manual_seed(n)) for n in (20, 50))
    made = []
    for size in (1.0, 1e-3, 1e3):
        there = Site("a", 30, 20, lambda: W, 0, statistics={"second_moment": size * x.T @ x / 50})
        made.append(INITS["corda"].make(there, Lora(site, LoraConfig(r=4))))
    for key in "AB":
        close(made[1][key], made[0][key], key)
        close(made[2][key], made[0][key], key)


# Against PEFT --------------------------------------------------------------------------------------------------------


def peft_start(init: Any, r: int = 4, **settings: Any) -> Any:
    config = PeftLoraConfig(r=r, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights=init, **settings)
    return config, tiny_model()


def against_peft(theirs: Any, ours: Any, tolerance: float = 1e-5) -> None:
    """The whole effective model: PEFT's residual W is our W less the offset, its A and B are ours up to signs."""
    close(logits(ours), logits(theirs), "logits", tolerance)
    for site, delta in on(ours).items():
        peft = theirs.get_submodule(f"base_model.model.{site}")
        A, B = peft.lora_A["default"].weight, peft.lora_B["default"].weight
        close(delta.matrix(), peft.scaling["default"] * B @ A, f"s B A at {site}", tolerance)
        close(delta.site.W() - delta.offset_B @ delta.offset_A, peft.base_layer.weight, f"W at {site}", tolerance)
        signs = (delta.A * A).sum(1).sign()
        close(signs[:, None] * delta.A, A, f"A at {site}", tolerance)
        close(signs * delta.B, B, f"B at {site}", tolerance)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_are_pefts(init: str) -> None:
    config, model = peft_start(init)
    theirs = get_peft_model(model, config).eval()
    against_peft(theirs, attach_tiny("lora", tiny_model(), init=init, targets=TARGETS))


def test_corda_is_pefts_from_the_same_second_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass)
    )  # PEFT does not ask for it
    from peft.tuners.lora.corda import preprocess_corda

    def balanced(moment: Tensor) -> Tensor:
        return moment / moment.diagonal().mean()

    config = tiny_config("lora", init="corda", targets=TARGETS)
    ours = tiny_model()
    statistics = collect(ours, config, ("second_moment",), [lambda: loss(ours)])
    attach(ours, config, statistics=statistics)
    torch.save({site: balanced(found["second_moment"]) for site, found in statistics.items()}, tmp_path / "moments")
    corda = CordaConfig(corda_method="ipm", covariance_file=str(tmp_path / "moments"))
    settings, model = peft_start("corda", corda_config=corda)
    preprocess_corda(model, settings)
    against_peft(get_peft_model(model, settings).eval(), ours, tolerance=1e-4)  # PEFT inverts in float32


def test_lora_gas_directions_are_pefts_and_the_sizes_are_the_papers() -> None:
    """With r = 8 both randomised SVDs are exact. Its B carries the gradient's singular values, ours does not."""
    config, model = peft_start("lora_ga", r=8, lora_ga_config=LoraGAConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its hook counts passes through layers whose input needs no gradient
        preprocess_loraga(model, config, lambda: loss(model).backward())
    theirs = get_peft_model(model, config).eval()
    ours = attach_tiny("lora", tiny_model(), init="lora-ga", r=8, targets=TARGETS)
    for site, delta in on(ours).items():
        peft = theirs.get_submodule(f"base_model.model.{site}")
        for mine, other, axis in ((delta.A, peft.lora_A, 1), (delta.B, peft.lora_B, 0)):
            unit = [t / t.norm(dim=axis, keepdim=True) for t in (mine, other["default"].weight)]
            close((unit[0] * unit[1]).sum(axis).abs(), torch.ones(8), f"directions at {site}", 1e-4)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vera", "bitfit", "full", "ia3"])
@pytest.mark.parametrize("init", ["pissa", "gaussian", "lora-sb", "nystrom", "eva"])
def test_a_method_without_such_a_product_refuses_and_says_what_it_has(method: str, init: str) -> None:
    model = tiny_model()
    modules = dict(model.named_modules())
    wanted = " and ".join(INITS[init].tensors)
    with raises("target/init-unfit-for-method", match=f"'{init}' sets {wanted} .* '{method}'"):
        attach(model, tiny_config(method, init=init))
    assert all(modules[key] is module for key, module in model.named_modules())


@pytest.mark.parametrize("init", ["lora-sb", "nystrom"])
def test_a_product_of_three_needs_three(init: str) -> None:
    with raises("target/init-unfit-for-method", match="'lora' has A, B"):
        attach(tiny_model(), LoraConfig(init=init), statistics=gathered())


@cache
def gathered() -> Any:
    model = tiny_model()
    return collect(model, LoraConfig(), ("fisher", "gradient", "second_moment"), [lambda: loss(model)])


@pytest.mark.parametrize("init", [name for name, init in INITS.items() if init.needs])
def test_statistics_that_are_missing_are_asked_for_by_name(init: str) -> None:
    method = "lora" if init in PAIR else "lora-xs"
    (needed,) = INITS[init].needs
    other = next(key for key in ("gradient", "second_moment") if key != needed)
    some = {site: found for site, found in gathered().items() if site.endswith("q_proj")}
    without = {site: {other: found[other]} for site, found in gathered().items()}
    for statistics, lacking in ((None, 14), ({}, 14), (without, 14), (some, 12)):
        model = tiny_model()
        says = rf"{method} with init '{init}' starts from the {needed} of each layer, which {lacking} of 14 sites lack"
        with raises("target/missing-statistics", match=says):
            attach(model, tiny_config(method, init=init), statistics=statistics)
        assert not hosts(model)


@pytest.mark.parametrize("init", [name for name in SPLIT if name != "olora"])
def test_a_rank_that_the_layer_cannot_have_is_refused(init: str) -> None:
    r = 9 if init == "lora-ga" else 17  # k_proj has 16 rows; LoRA-GA takes 2 r singular vectors
    model = tiny_model()
    with raises("target/init-unfit-for-method", match=rf"'{init}' .*k_proj: . is \["):
        attach(model, LoraConfig(r=r, init=init, targets=TARGETS), statistics=gathered())
    assert not hosts(model)
    attach(model, LoraConfig(r=r - 1, init=init, targets=TARGETS), statistics=gathered())


def test_an_unknown_init_is_refused_with_the_nearest() -> None:
    with raises("target/unknown-init", match=r"'pisa'.*pissa"):
        attach(tiny_model(), LoraConfig(init="pisa"))


# From what quantizing lost -------------------------------------------------------------------------------------------


def lost(site: str, delta: Delta) -> np.ndarray:
    """W as it was before quantizing, in bf16 as it was read, less what the quantized weights stand for."""
    return double(tiny_model().get_submodule(site).weight) - double(delta.site.W())


@pytest.mark.parametrize("quantization", ["int4", "int8", "nf4"])
def test_loftq_is_the_best_approximation_of_what_quantizing_lost(quantization: str) -> None:
    model = base_for("loftq", quantization)
    for site, delta in on(attach_tiny("lora", model, init="loftq")).items():
        D = lost(site, delta)  # noise: its singular values lie close together, so the error is compared, not the matrix
        least = np.linalg.norm(D - best(D, 4))
        assert np.linalg.norm(D - double(delta.matrix())) == pytest.approx(least, rel=1e-5)
        same(delta.A @ delta.A.T, double(delta.B.T @ delta.B), f"balance at {site}")
        assert delta.offset_A is None, "the model begins nearer to the float base than its quantized weights"


def test_loftq_brings_the_output_back_towards_the_float_base() -> None:
    model = base_for("loftq")
    wanted, quantized = logits(tiny_model()), logits(model)
    attach_tiny("lora", model, init="loftq", r=16)
    assert float((logits(model) - wanted).norm()) < 0.5 * float((quantized - wanted).norm())


def test_lq_lora_weighs_rows_and_columns_by_the_gradient() -> None:
    """With one pass the Fisher diagonal is the squared gradient; the weighted error is that of no other B A."""
    model = base_for("lq-lora")
    squared = {s: g**2 for s, g in plain_gradients(model).items()}
    deltas = on(attach_tiny("lora", model, init="lq-lora"))
    for site, delta in deltas.items():
        F = squared[site] / squared[site].mean() + 1e-3
        weight = np.sqrt(F.mean(1, keepdims=True) * F.mean(0, keepdims=True))
        D = lost(site, delta)
        reached = np.linalg.norm(weight * (D - double(delta.matrix())))
        least = np.linalg.norm(weight * D - best(weight * D, 4))  # the weight is of rank 1: this is the minimum
        assert reached == pytest.approx(least, rel=1e-4)
        assert reached < np.linalg.norm(weight * (D - best(D, 4)))


def plain_gradients(model: Any) -> dict[str, np.ndarray]:
    """dL/dW of the dequantized weights, from a float model that has them."""
    twin = plain_with(merged_state(model)).requires_grad_(True)
    loss(twin).backward()
    return {name.removesuffix(".weight"): double(p.grad) for name, p in twin.named_parameters() if p.grad is not None}


def test_quailora_reaches_the_least_error_of_the_outputs() -> None:
    """In closed form: the best approximation of D M^1/2, taken back by M^-1/2."""
    model = base_for("quailora")
    like = attach_tiny("lora", base_for("quailora"))
    seen = heard(model, like)
    for site, delta in on(attach_tiny("lora", model, init="quailora")).items():
        x, D = seen[site], lost(site, delta)
        M = x.T @ x / len(x)
        M = M / np.diag(M).mean() + 0.01 * np.eye(len(M))
        values, vectors = np.linalg.eigh(M)
        root = (vectors * np.sqrt(values)) @ vectors.T
        reached = np.linalg.norm((D - double(delta.matrix())) @ root)
        least = np.linalg.norm(D @ root - best(D @ root, 4))
        assert least * 0.9999 <= reached <= 1.01 * least
        same(delta.A @ delta.A.T, double(delta.B.T @ delta.B), f"balance at {site}", 1e-4)


@pytest.mark.parametrize("init", QUANTIZED)
def test_what_was_not_lost_cannot_be_started_from(init: str, tmp_path: Path) -> None:
    cases = {
        "not quantized": tiny_model(),
        "not loaded from a folder": quantize(tiny_model(), "nf4"),
        "not in the files": base_for(init),
    }
    for key in list(cases):
        model = cases[key]
        if key == "not in the files":
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.original = partial(module.original.func, str(tmp_path), *module.original.args[1:])
        modules = dict(model.named_modules())
        code = "target/layer-not-quantized" if key == "not quantized" else "target/original-weight-missing"
        with raises(code, match=f"init: '{init}' at .*{key}"):
            attach_tiny("lora", model, init=init, targets=TARGETS)
        assert modules == dict(model.named_modules())


def test_an_original_of_another_base_is_not_taken(tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "b")
    model = load_base(str(tmp_path / "b"), quantization="nf4").model
    tiny_model(seed=4).save_pretrained(tmp_path / "b")
    with raises("target/original-weight-missing", match="moved or changed"):
        attach_tiny("lora", model, init="loftq", targets=TARGETS)
