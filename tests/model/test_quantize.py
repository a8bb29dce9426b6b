"""Codecs against their definitions and against bitsandbytes; the layer against its dequantized weight; the base."""

import gc
import json
import weakref
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftlm
from graftlm.adapters.export.export import lost_by_quantizing, merged_int4, plain_lora
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.hub import dtypes
from graftlm.hub.dtypes import dtype_name
from graftlm.hub.fingerprint import fingerprint
from graftlm.hub.load import load_base
from graftlm.hub.quantize_base import quantization_of, quantize
from graftlm.model.attach import attach
from graftlm.model.bases import view
from graftlm.model.modes import deltas_off
from graftlm.model.quantize import BLOCK, CODECS, GROUP, QuantizedLinear, dynamic_levels, normal_levels
from graftlm.model.registry import hosts, trainable
from graftlm.model.state_dict import base_state, merged_state
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.adapters.folders import write_record
from tests.errors import raises

QUANTIZATIONS = sorted(CODECS)
ODD = [(5, 7), (33, 57), (1, 1), (64, 1), (1, 130), (12, 96)]
"""Shapes that fill no block, group or byte, and some that do."""


def weights(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(quantization: str, W: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    codec = CODECS[quantization]
    return codec.dequantize(codec.quantize(W), (W.shape[0], W.shape[1]), dtype)


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


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("shape", ODD)
def test_zeros_stay_zero(quantization: str, shape: tuple[int, int]) -> None:
    assert torch.equal(through(quantization, torch.zeros(shape)), torch.zeros(shape))
    if quantization != "int4":  # which keeps least and greatest, and zero in between only nearly
        some = weights(shape)
        some[0, 0] = 0.0
        assert float(through(quantization, some)[0, 0]) == 0.0


def test_a_group_of_equal_weights_is_kept() -> None:
    W = torch.full((3, 40), -0.7)
    close(through("int4", W), W, "equal weights", 1e-6)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_half_precision_is_the_float_weight_rounded_once(quantization: str) -> None:
    W = weights((33, 57))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(through(quantization, W, dtype), through(quantization, W).to(dtype))


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
    ours = CODECS["nf4"].quantize(W)
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
        "dequantized",
        1e-6 if dtype.itemsize == 4 else 4e-3,
    )


# The layer ------------------------------------------------------------------------------------------------------------


def pair(quantization: str) -> tuple[Any, Any]:
    """A quantized layer, and a plain one with its dequantized weight."""
    torch.manual_seed(0)
    plain = nn.Linear(70, 50).requires_grad_(False)
    quantized = QuantizedLinear(plain.weight, plain.bias, CODECS[quantization])
    plain.weight.copy_(quantized.dequantized())
    return quantized, plain


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("with_gain", [False, True])
def test_gradients_are_those_over_the_dequantized_weight(quantization: str, with_gain: bool) -> None:
    quantized, plain = pair(quantization)
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 9, 70), (3, 70), (50, 3), (50,))]
    x, A, B, gain = inputs
    for ours, wanted in (
        (view(quantized).low_rank(x, A, B, gain if with_gain else None), None),  # type: ignore[union-attr]
        (quantized(x), plain(x)),
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


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_nothing_but_quantized_weights_is_kept_between_forward_and_backward(
    quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No saved tensor is as large as W, and every W that was made is gone when the forward pass is over."""
    model = attach_tiny(
        "lora", quantize(tiny_model(tie_word_embeddings=False), quantization), targets=("q_proj", "up_proj")
    )
    made: list[Any] = []
    codec = type(CODECS[quantization])
    dequantize = codec.dequantize

    def watched(self: Any, *args: Any) -> Tensor:
        W = dequantize(self, *args)
        made.append(weakref.ref(W))
        return W

    monkeypatch.setattr(codec, "dequantize", watched)
    saved: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(ids(rows=1, length=5)).logits  # 5 tokens: no activation has the shape of a weight
    gc.collect()
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(made) == len(layers)
    assert not [ref for ref in made if ref() is not None], "a dequantized weight outlived its product"
    assert not {layer.shape for layer in layers} & set(saved.values())
    out.sum().backward()
    assert len(made) > len(layers), "the backward pass must make the weights again"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_cast_model_keeps_its_constants(quantization: str) -> None:
    layer, _ = pair(quantization)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    layer.bfloat16()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.tensors().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in layer.tensors().items())
    assert layer(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.dtype == torch.bfloat16


# The base -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_base_is_quantized_as_it_is_loaded(base_folder: Path, quantization: str) -> None:
    plain, _ = load_base(str(base_folder), dtype="float32")
    model, _ = load_base(str(base_folder), quantization=quantization)
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name, module in plain.named_modules():
        quantized = isinstance(module, nn.Linear) and name != "lm_head"
        assert kinds[name] is (QuantizedLinear if quantized else type(module))
        if quantized:
            assert not list(model.get_submodule(name).parameters())
            rounded = module.weight.bfloat16()  # it is read in bf16
            close(model.get_submodule(name).dequantized(), through(quantization, rounded), name, 1e-6)
    assert quantization_of(model) == quantization
    assert quantization_of(plain) == "none"
    assert fingerprint(model) == fingerprint(plain)
    close(logits(model).float(), logits(plain), "logits", 0.5)


@pytest.mark.parametrize("fast", [False, True])
def test_all_but_the_quantized_weights_has_the_dtype_of_auto(
    base_folder: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "multiplies_bf16_fast", lambda device: fast)
    auto, quantized = (load_base(str(base_folder), quantization=kind).model for kind in ("none", "nf4"))
    of_quantized = {**dict(quantized.named_parameters()), **dict(quantized.named_buffers())}
    for name, tensor in {**dict(auto.named_parameters()), **dict(auto.named_buffers())}.items():  # rotations, too
        layer = name.rpartition(".")[0]
        if isinstance(quantized.get_submodule(layer), QuantizedLinear):
            assert quantized.get_submodule(layer).dtype == tensor.dtype
        else:
            assert of_quantized[name].dtype == tensor.dtype, name
    assert logits(quantized).dtype == logits(auto).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_quantized_has_the_dtype_that_is_given(base_folder: Path, dtype: torch.dtype) -> None:
    plain, _ = load_base(str(base_folder), dtype="bfloat16")
    name = str(dtype).removeprefix("torch.")
    model, _ = load_base(graftlm.BaseConfig(name=str(base_folder), dtype=name, quantization="int4"))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(key).to(dtype)), key
    for key, buffer in plain.named_buffers():  # frequencies of positions
        assert buffer.dtype == torch.float32
        assert torch.equal(model.get_buffer(key), buffer), key
    for key, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            wanted = CODECS["int4"].quantize(plain.get_parameter(f"{key}.weight"))
            assert all(torch.equal(tensor, wanted[part]) for part, tensor in layer.tensors().items())
            assert layer.dtype == dtype
    assert logits(model).dtype == dtype
    close(logits(model).float(), logits(load_base(str(base_folder), dtype="float32").model), "logits", 0.5)


def test_arguments_override_the_config(base_folder: Path) -> None:
    config = graftlm.BaseConfig(name=str(base_folder), dtype="float16", quantization="nf4")
    model, _ = load_base(config, quantization="none")
    assert quantization_of(model) == "none"
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    model, _ = load_base(config, dtype="fp32")
    assert quantization_of(model) == "nf4"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_unknown_quantization_names_those_that_there_are(base_folder: Path) -> None:
    with raises("base/unknown-quantization", match="nf4"):
        load_base(str(base_folder), quantization="nf")
    with raises("base/unknown-quantization", match="nf4"):
        quantize(tiny_model(), "nf3")


def test_quantized_weights_without_a_record_of_what_they_stand_for_have_no_fingerprint() -> None:
    model = quantize(tiny_model(), "nf4")
    del model.graft_fingerprint
    with raises("base/unknown-original-weights"):
        fingerprint(model)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_adapter_goes_from_quantization_to_quantization(
    base_folder: Path, tmp_path: Path, quantization: str
) -> None:
    model, _ = load_base(str(base_folder), quantization=quantization)
    move(attach(model, graftlm.LoraConfig(r=4)))
    save_adapter(model, tmp_path / "a")
    again, _ = load_base(str(base_folder), quantization=quantization)
    note = load_adapter(again, tmp_path / "a")
    assert "trained" not in note
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "b")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert files[0] == files[1]
    other, _ = load_base(str(base_folder), dtype="float32")
    assert f"trained on quantization {quantization}" in load_adapter(other, tmp_path / "a")
    assert "this base has none" in load_adapter(other, tmp_path / "a", name="twice")
    for key, tensor in trainable(model).items():
        assert torch.equal(trainable(other)[key], tensor)
    record = tmp_path / "a" / "graftlm.json"
    written = json.loads(record.read_text())
    assert (written["base"].pop("dtype"), written["base"].pop("quantization")) == (dtype_name(model), quantization)
    for store, is_another in ((quantization, False), ("fp32", True)):  # a record of before
        write_record(record.parent, written | {"base": written["base"] | {"store": store}})
        assert ("trained on" in load_adapter(again, tmp_path / "a", name=store)) == is_another
    with raises("base/other-base", match="weights differ"):
        load_adapter(quantize(tiny_model(seed=9), quantization), tmp_path / "a")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("make", [lambda: tiny_model(tie_word_embeddings=False), tiny_gpt2])
def test_merging_gives_float_weights(quantization: str, make: Any) -> None:
    """Under the base's own names and as it lays them out, those of layers without a delta too."""
    model = quantize(make(), quantization)
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


# Merging onto quantized weights --------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_quantizing_lost_is_told_in_changes(base_folder: Path) -> None:
    model, _ = load_base(str(base_folder), quantization="nf4")
    float_base, _ = load_base(str(base_folder), dtype="float32")
    move(attach_tiny("lora", model, targets=("q_proj", "up_proj")))
    found = lost_by_quantizing(model)
    assert [item.share for item in found] == sorted((item.share for item in found), reverse=True)
    assert len(found) == 4
    for item in found:
        delta = model.get_submodule(item.layer).deltas["default"]
        lost = float_base.get_submodule(item.layer).weight - model.get_submodule(item.layer).base.dequantized()
        assert item.share == pytest.approx(float(lost.norm() / delta.matrix().norm()), rel=1e-3)
    move(attach_tiny("dora", model, delta="second", targets=("q_proj",)))  # not additive: the whole of W' counts
    assert len(lost_by_quantizing(model)) == 4
    made = graftlm.export(model, base_folder.parent / "merged-codes", to="merged")
    assert made["base_quantization"] == "nf4"
    assert len(made["lost_by_quantizing"]) == 4
    unknown = move(attach_tiny("lora", quantize(tiny_model(), "nf4")))
    with raises("target/original-weight-missing", match="not loaded from a folder"):
        lost_by_quantizing(unknown)
    assert "not loaded" in graftlm.export(unknown, base_folder.parent / "unknown", to="merged")["lost_by_quantizing"]


@pytest.mark.parametrize("group", [GROUP, 2 * GROUP])
def test_qa_lora_goes_into_the_zero_points_of_an_int4_base(group: int) -> None:
    changes = {"hidden_size": 96, "intermediate_size": 80, "tie_word_embeddings": False}
    model = quantize(tiny_model(**changes), "int4")
    before = base_state(model)
    move(attach_tiny("qa-lora", model, group=group))
    state = merged_int4(model)
    assert state.keys() == before.keys()
    for key, tensor in state.items():  # codes and scales are the base's own
        assert torch.equal(tensor, before[key]) is (not key.endswith(".zero")), key
        assert tensor.dtype == before[key].dtype
    plain = quantize(tiny_model(seed=3, **changes), "int4")
    plain.load_state_dict(state)
    for site, host in hosts(model).items():
        layer = plain.get_submodule(site)
        assert isinstance(layer, QuantizedLinear)
        wanted = host.base.dequantized() + host.on()[0].matrix()  # type: ignore[attr-defined, operator]
        close(layer.dequantized(), wanted, site, 1e-6)
    close(logits(plain), logits(model), "the int4 model against the int4 base with its delta")


def test_what_does_not_fit_into_zero_points_is_refused() -> None:
    unfit, unquantized = "target/not-mergeable-in-int4", "target/base-not-int4"
    refusals = [
        (unfit, "groups of 32", attach_tiny("lora", quantize(tiny_model(), "int4"))),
        # finer than the base's own
        (unfit, "groups of 32", attach_tiny("qa-lora", quantize(tiny_model(), "int4"), group=16)),
        (unfit, "dora", attach_tiny("dora", quantize(tiny_model(), "int4"))),
        (unquantized, None, attach_tiny("qa-lora", quantize(tiny_model(), "nf4"), group=32)),
        (unquantized, None, attach_tiny("norm-tuning", quantize(tiny_model(), "int4"))),
    ]
    for code, says, model in refusals:
        with raises(code, match=says):
            merged_int4(move(model))
