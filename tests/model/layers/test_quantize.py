"""Codecs against their definitions and against bitsandbytes; the layer against its dequantised weight; the base."""

import gc
import weakref
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftlm
from graftlm.adapters.export.export import lost_by_quantising, merged_int4, plain_lora
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.errors import BaseModelError, TargetError
from graftlm.model.hub import load
from graftlm.model.hub.load import fingerprint, load_base, quantise, store_of
from graftlm.model.layers.attach import attach
from graftlm.model.layers.bases import view
from graftlm.model.layers.modes import deltas_off
from graftlm.model.layers.quantize import BLOCK, CODECS, GROUP, QuantisedLinear, dynamic_levels, normal_levels
from graftlm.model.layers.registry import hosts, trainable
from graftlm.model.layers.state_dict import base_state, merged_state
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move
from graftlm.testing.tiny import tiny_gpt2, tiny_model

STORES = sorted(CODECS)
ODD = [(5, 7), (33, 57), (1, 1), (64, 1), (1, 130), (12, 96)]
"""Shapes that fill no block, group or byte, and some that do."""


def weights(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(store: str, W: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    codec = CODECS[store]
    return codec.dequantise(codec.quantise(W), (W.shape[0], W.shape[1]), dtype)


# Levels ---------------------------------------------------------------------------------------------------------------


def test_the_levels_of_nf4_are_the_quantiles_of_the_paper() -> None:
    normal, outermost = NormalDist(), 1 - (1 / 30 + 1 / 32) / 2
    positive = [normal.inv_cdf(outermost - i * (outermost - 0.5) / 8) for i in range(8)]
    negative = [-normal.inv_cdf(outermost - i * (outermost - 0.5) / 7) for i in range(7)]
    wanted = sorted([*positive, *negative, 0.0])
    close(normal_levels().double(), torch.tensor([w / wanted[-1] for w in wanted], dtype=torch.float64), "levels", 1e-7)
    assert float(normal_levels()[7]) == 0.0
    assert (float(normal_levels()[0]), float(normal_levels()[15])) == (-1.0, 1.0)


def test_the_second_level_has_as_many_fractions_as_its_decade_has_room_for() -> None:
    levels = dynamic_levels()
    assert len(levels) == 256
    assert torch.equal(levels, levels.unique())  # ascending, none twice
    for e in range(7):
        inside = (levels > 10.0 ** (e - 7)) & (levels < 10.0 ** (e - 6))
        assert int(inside.sum()) == 2**e
    assert {0.0, 1.0} <= set(levels.tolist())


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ODD)
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    W = weights(shape)
    step = W.abs().amax(1, keepdim=True) / 127
    assert bool(((through("int8", W) - W).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("shape", ODD)
def test_int4_is_off_by_half_a_step_of_its_group_at_most(shape: tuple[int, int]) -> None:
    W = weights(shape)
    error = (through("int4", W) - W).abs()
    for start in range(0, shape[1], GROUP):
        part = W[:, start : start + GROUP]
        step = (part.amax(1) - part.amin(1)) / 15
        step = torch.where(step > 0, step, part.abs().amax(1))
        # the scale is rounded to 8 bits, which moves the far end of the group by up to 15 / 256 of a step
        assert bool((error[:, start : start + GROUP] <= (0.5 + 16 / 256) * step[:, None] + 1e-9).all())


@pytest.mark.parametrize("shape", ODD)
def test_nf4_takes_the_nearest_level_of_its_block(shape: tuple[int, int]) -> None:
    W, levels = weights(shape), normal_levels()
    made, flat = through("nf4", W).view(-1), W.view(-1)
    widest = float((levels[1:] - levels[:-1]).max()) / 2
    spread = torch.stack([block.abs().max() for block in flat.split(BLOCK)])
    second = float((spread - spread.mean()).abs().max()) / 100  # a constant is off by under a hundredth of the widest
    for start, constant in zip(range(0, len(flat), BLOCK), spread, strict=True):
        error = (made[start : start + BLOCK] - flat[start : start + BLOCK]).abs()
        assert float(error.max()) <= widest * float(constant) + second + 1e-7


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shape", ODD)
def test_zeros_stay_zero(store: str, shape: tuple[int, int]) -> None:
    assert torch.equal(through(store, torch.zeros(shape)), torch.zeros(shape))
    if store != "int4":  # which keeps least and greatest, and zero in between only nearly
        some = weights(shape)
        some[0, 0] = 0.0
        assert float(through(store, some)[0, 0]) == 0.0


def test_a_group_of_equal_weights_is_kept() -> None:
    W = torch.full((3, 40), -0.7)
    close(through("int4", W), W, "equal weights", 1e-6)


@pytest.mark.parametrize("store", STORES)
def test_half_precision_is_the_float_weight_rounded_once(store: str) -> None:
    W = weights((33, 57))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(through(store, W, dtype), through(store, W).to(dtype))


def test_bits_a_weight() -> None:
    W = weights((576, 576))
    assert CODECS["nf4"].bits(W) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert CODECS["int4"].bits(W) == pytest.approx(4 + (16 + 32) / GROUP)
    assert CODECS["int8"].bits(W) == pytest.approx(8 + 32 / 576)


@pytest.mark.parametrize("shape", [(576, 64), (33, 57), (35, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_has_the_codes_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    close(normal_levels(), theirs.get_4bit_type("nf4", "cpu"), "levels", 1e-6)
    assert torch.equal(dynamic_levels(), theirs.create_dynamic_map())
    W = weights(shape).to(dtype)
    codes, state = theirs.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = CODECS["nf4"].quantise(W)
    assert torch.equal(ours["codes"][: codes.numel()], codes.view(-1))
    assert torch.equal(ours["scale"], state.state2.absmax)
    assert torch.equal(ours["mean"], state.offset)
    # Their fast CPU kernel takes a neighbour of the nearest level here and there; their plain route, for doubles, not.
    constants = F.pad(W.float().view(-1), (0, -W.numel() % 64)).view(-1, 64).abs().amax(1)
    plain, _ = torch.ops.bitsandbytes.quantize_blockwise.default(
        (constants - constants.mean()).double(), theirs.create_dynamic_map(), 256
    )
    assert torch.equal(ours["constants"], plain)
    assert int((ours["constants"].int() - state.absmax.int()).abs().max()) <= 2
    state.absmax = ours["constants"]
    close(
        through("nf4", W),
        theirs.dequantize_4bit(codes, state).float(),
        "dequantised",
        1e-6 if dtype.itemsize == 4 else 4e-3,
    )


# The layer ------------------------------------------------------------------------------------------------------------


def pair(store: str) -> tuple[Any, Any]:
    """A quantised layer, and a plain one with its dequantised weight."""
    torch.manual_seed(0)
    plain = nn.Linear(70, 50).requires_grad_(False)
    coded = QuantisedLinear(plain.weight, plain.bias, CODECS[store])
    plain.weight.copy_(coded.dequantised())
    return coded, plain


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("with_gain", [False, True])
def test_gradients_over_codes_are_those_over_the_dequantised_weight(store: str, with_gain: bool) -> None:
    coded, plain = pair(store)
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 9, 70), (3, 70), (50, 3), (50,))]
    x, A, B, gain = inputs
    for ours, wanted in (
        (view(coded).low_rank(x, A, B, gain if with_gain else None), None),  # type: ignore[union-attr]
        (coded(x), plain(x)),
    ):
        leaves = inputs if wanted is None and with_gain else [x, A, B] if wanted is None else [x]
        if wanted is None:
            z = x @ (plain.weight + B @ A).T
            wanted = (gain * z if with_gain else z) + plain.bias
        close(ours, wanted, "output")
        grads = [
            torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves) for y in (ours, wanted)
        ]
        for one, other in zip(*grads, strict=True):
            close(one, other, "gradient")


@pytest.mark.parametrize("store", STORES)
def test_nothing_but_codes_is_kept_between_forward_and_backward(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No saved tensor is as large as W, and every W that was made is gone when the forward pass is over."""
    model = attach_tiny("lora", quantise(tiny_model(tie_word_embeddings=False), store), targets=("q_proj", "up_proj"))
    made: list[Any] = []
    codec = type(CODECS[store])
    dequantise = codec.dequantise

    def watched(self: Any, *args: Any) -> Tensor:
        W = dequantise(self, *args)
        made.append(weakref.ref(W))
        return W

    monkeypatch.setattr(codec, "dequantise", watched)
    saved: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(ids(rows=1, length=5)).logits  # 5 tokens: no activation has the shape of a weight
    gc.collect()
    layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    assert len(made) == len(layers)
    assert not [ref for ref in made if ref() is not None], "a dequantised weight outlived its product"
    assert not {layer.shape for layer in layers} & set(saved.values())
    out.sum().backward()
    assert len(made) > len(layers), "the backward pass must make the weights again"


@pytest.mark.parametrize("store", STORES)
def test_a_cast_model_keeps_its_constants(store: str) -> None:
    layer, _ = pair(store)
    before = {name: tensor.clone() for name, tensor in layer.stored().items()}
    layer.bfloat16()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.stored().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in layer.stored().items())
    assert layer(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.dtype == torch.bfloat16


# The base -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_a_base_is_loaded_into_codes(base_folder: Path, store: str) -> None:
    plain, _ = load_base(str(base_folder), store="fp32")
    model, _ = load_base(str(base_folder), store=store)
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name, module in plain.named_modules():
        coded = isinstance(module, nn.Linear) and name != "lm_head"
        assert kinds[name] is (QuantisedLinear if coded else type(module))
        if coded:
            assert not list(model.get_submodule(name).parameters())
            rounded = module.weight.bfloat16()  # it is read in bf16
            close(model.get_submodule(name).dequantised(), through(store, rounded), name, 1e-6)
    assert store_of(model) == store
    assert store_of(plain) == "fp32"
    assert fingerprint(model) == fingerprint(plain)
    close(logits(model).float(), logits(plain), "logits", 0.5)


@pytest.mark.parametrize("fast", [False, True])
def test_all_but_the_codes_is_as_auto_keeps_it(base_folder: Path, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "multiplies_bf16_fast", lambda device: fast)
    auto, coded = (load_base(str(base_folder), store=store).model for store in ("auto", "nf4"))
    of_coded = {**dict(coded.named_parameters()), **dict(coded.named_buffers())}
    for name, tensor in {**dict(auto.named_parameters()), **dict(auto.named_buffers())}.items():  # rotations, too
        layer = name.rpartition(".")[0]
        if isinstance(coded.get_submodule(layer), QuantisedLinear):
            assert coded.get_submodule(layer).dtype == tensor.dtype
        else:
            assert of_coded[name].dtype == tensor.dtype, name
    assert logits(coded).dtype == logits(auto).dtype


def test_a_store_that_does_not_exist_names_those_that_do(base_folder: Path) -> None:
    with pytest.raises(BaseModelError, match="nf4"):
        load_base(str(base_folder), store="nf")
    with pytest.raises(BaseModelError, match="nf4"):
        quantise(tiny_model(), "nf3")


def test_codes_without_a_record_of_what_they_stand_for_have_no_fingerprint() -> None:
    model = quantise(tiny_model(), "nf4")
    del model.graft_fingerprint
    with pytest.raises(BaseModelError, match="codes"):
        fingerprint(model)


@pytest.mark.parametrize("store", STORES)
def test_an_adapter_goes_from_store_to_store(base_folder: Path, tmp_path: Path, store: str) -> None:
    model, _ = load_base(str(base_folder), store=store)
    move(attach(model, graftlm.LoraConfig(r=4)))
    save_adapter(model, tmp_path / "a")
    again, _ = load_base(str(base_folder), store=store)
    said = load_adapter(again, tmp_path / "a")
    assert "trained" not in said
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "b")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert files[0] == files[1]
    other, _ = load_base(str(base_folder), store="fp32")
    assert f"trained on {store}" in load_adapter(other, tmp_path / "a")
    assert "this base is kept in fp32" in load_adapter(other, tmp_path / "a", name="twice")
    for key, tensor in trainable(model).items():
        assert torch.equal(trainable(other)[key], tensor)
    with pytest.raises(BaseModelError, match="weights differ"):
        load_adapter(quantise(tiny_model(seed=9), store), tmp_path / "a")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("make", [lambda: tiny_model(tie_word_embeddings=False), tiny_gpt2])
def test_merging_gives_float_weights(store: str, make: Any) -> None:
    """Under the base's own names and as it lays them out, those of layers without a delta too."""
    model = quantise(make(), store)
    end = "c_attn" if "gpt2" in type(model).__name__.lower() else "q_proj"
    attach_tiny("lora", model, targets=(end,))
    move(model)
    state, plain = merged_state(model), make()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    close(logits(plain), logits(model), "the merged model against the model with its delta")
    with deltas_off(model):
        assert {key: tuple(t.shape) for key, t in merged_state(model, dtype=None).items()} == {
            key: tuple(t.shape) for key, t in plain.state_dict().items()
        }
    assert plain_lora(model).rank == 4
    site, host = next(iter(hosts(model).items()))
    assert host.view.transposed == (end == "c_attn"), site  # type: ignore[union-attr]


# Merging onto codes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_quantising_lost_is_told_in_changes(base_folder: Path) -> None:
    model, _ = load_base(str(base_folder), store="nf4")
    float_base, _ = load_base(str(base_folder), store="fp32")
    move(attach_tiny("lora", model, targets=("q_proj", "up_proj")))
    found = lost_by_quantising(model)
    assert [item.share for item in found] == sorted((item.share for item in found), reverse=True)
    assert len(found) == 4
    for item in found:
        delta = model.get_submodule(item.layer).deltas["default"]
        lost = float_base.get_submodule(item.layer).weight - model.get_submodule(item.layer).base.dequantised()
        assert item.share == pytest.approx(float(lost.norm() / delta.matrix().norm()), rel=1e-3)
    move(attach_tiny("dora", model, delta="second", targets=("q_proj",)))  # not additive: the whole of W' counts
    assert len(lost_by_quantising(model)) == 4
    made = graftlm.export(model, base_folder.parent / "merged-codes", to="merged")
    assert made["base_store"] == "nf4"
    assert len(made["lost_by_quantising"]) == 4
    unknown = move(attach_tiny("lora", quantise(tiny_model(), "nf4")))
    with pytest.raises(TargetError, match="not loaded from a folder"):
        lost_by_quantising(unknown)
    assert "not loaded" in graftlm.export(unknown, base_folder.parent / "unknown", to="merged")["lost_by_quantising"]


@pytest.mark.parametrize("group", [GROUP, 2 * GROUP])
def test_qa_lora_goes_into_the_zero_points_of_an_int4_base(group: int) -> None:
    changes = {"hidden_size": 96, "intermediate_size": 80, "tie_word_embeddings": False}
    model = quantise(tiny_model(**changes), "int4")
    before = base_state(model)
    move(attach_tiny("qa-lora", model, group=group))
    state = merged_int4(model)
    assert state.keys() == before.keys()
    for key, tensor in state.items():  # codes and scales are the base's own
        assert torch.equal(tensor, before[key]) is (not key.endswith(".zero")), key
        assert tensor.dtype == before[key].dtype
    plain = quantise(tiny_model(seed=3, **changes), "int4")
    plain.load_state_dict(state)
    for site, host in hosts(model).items():
        layer = plain.get_submodule(site)
        assert isinstance(layer, QuantisedLinear)
        wanted = host.base.dequantised() + host.on()[0].matrix()  # type: ignore[attr-defined, operator]
        close(layer.dequantised(), wanted, site, 1e-6)
    close(logits(plain), logits(model), "the int4 model against the int4 base with its delta")


def test_what_does_not_fit_into_zero_points_is_refused() -> None:
    refusals = {
        "inside groups of 32": attach_tiny("lora", quantise(tiny_model(), "int4")),
        "inside groups": attach_tiny("qa-lora", quantise(tiny_model(), "int4"), group=16),  # finer than the base's own
        "more than an addition": attach_tiny("dora", quantise(tiny_model(), "int4")),
        "no int4 layer": attach_tiny("qa-lora", quantise(tiny_model(), "nf4"), group=32),
        "no int4 layer, so": attach_tiny("norm-tuning", quantise(tiny_model(), "int4")),
    }
    for says, model in refusals.items():
        with pytest.raises(TargetError, match=says):
            merged_int4(move(model))
