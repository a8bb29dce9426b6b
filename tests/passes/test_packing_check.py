"""The proof before a run: planted leaks are found, however small, and a right architecture is never refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from graftlm.deltas.lora import LoraConfig
from graftlm.kernels import cpu
from graftlm.kernels.attention import SegmentLayout
from graftlm.kernels.backend import TORCH, Backend, compiled, pinned
from graftlm.model.attach import attach
from graftlm.model.quantize import QuantizedLinear
from graftlm.model.sites import decoder_of, transformer_layers
from graftlm.passes import first_layers, forward
from graftlm.passes.first_layers import first_layers_in_float32
from graftlm.passes.forward import head
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.packing_check import check_forward, check_packed_rows
from graftlm.testing import tiny_model
from tests.errors import raises

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 2.0},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "stablelm": {},
}
DTYPES = (torch.float32, torch.bfloat16)


def made(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny_model(kind, initializer_range=0.1, **(KINDS.get(kind, {}) | changes)).to(dtype)


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(3, 299, (length,), generator=torch.Generator().manual_seed(seed))


def rows(seed: int = 0, *lengths: int) -> list[Tensor]:
    return [ids(n, 10 * seed + k) for k, n in enumerate(lengths or (9, 14))]


def planted(model: Any, change: Callable[[Tensor], Tensor], layer: int = 0) -> Any:
    """The model with something more in what one of its layers computes, in packs and alone."""

    def after(module: nn.Module, inputs: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    list(transformer_layers(model).values())[layer].register_forward_hook(after)
    return model


def previous(x: Tensor) -> Tensor:
    """What stands before each token, of whatever row."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


LEAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum over all that came before": lambda x: x + 0.1 * x.cumsum(1),
    "a mean over the pack": lambda x: x + 0.1 * x.mean(1, keepdim=True),
    "the token before": lambda x: x + 0.1 * previous(x),
    "what comes after": lambda x: x + 0.1 * x.flip(1).cumsum(1).flip(1),
    "a millionth of the mean": lambda x: x + 1e-6 * x.mean(1, keepdim=True),
    "the size of the whole pack": lambda x: x * (1 + 0.01 * x.abs().max()),
}


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_mixes_rows_is_refused(kind: str, leak: str, dtype: torch.dtype) -> None:
    model = planted(made(kind, dtype), LEAKS[leak])
    with raises("training/cannot-pack", match="pack: false"):
        check_packed_rows(model, *rows())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_leak_in_the_last_layer_is_found_in_half_precision_too(kind: str, dtype: torch.dtype) -> None:
    """The layer is none of those that are compared in float32, and what it leaks is less than a rounding."""
    model = planted(made(kind, dtype, num_hidden_layers=5), LEAKS["a millionth of the mean"], layer=4)
    with raises("training/cannot-pack", match="takes in numbers of its neighbor|changes by .* with its neighbor"):
        check_packed_rows(model, *rows())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_sees_what_comes_after_a_token_is_refused_with_and_without_packing(
    kind: str, dtype: torch.dtype
) -> None:
    model = planted(made(kind, dtype), lambda x: x + 0.02 * torch.cat([x[:, 1:], x[:, -1:]], 1))
    with raises("training/model-not-causal"):
        check_forward(model, rows()[1])
    with raises("training/cannot-pack", match="comes after it in its row|with its neighbor"):
        check_packed_rows(model, *rows())


def test_two_way_attention_of_a_models_own_is_refused() -> None:
    with raises("training/model-not-causal"):
        check_forward(tiny_model("gemma3_text", use_bidirectional_attention=True, initializer_range=0.1), rows()[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [-1, 3], ids=["no parent", "the neighbor for a parent"])
def test_a_wrong_parent_of_a_shared_beginning_is_found(kind: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def layout(lengths: list[int], parents: list[int], **more: Any) -> SegmentLayout:
        return SegmentLayout(lengths, [wrong if n == 4 else parent for n, parent in enumerate(parents)], **more)

    model = made(kind)
    check_packed_rows(model, *rows(), sharing=True)
    monkeypatch.setattr(forward, "SegmentLayout", layout)
    with raises("training/cannot-pack", match="prefix_sharing: false"):
        check_packed_rows(model, *rows(), sharing=True)


# No false alarm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(1, 2), (2, 2), (1, 40), (40, 2)])
def test_rows_of_a_token_or_two_are_enough(lengths: tuple[int, int]) -> None:
    check_packed_rows(made("llama"), *rows(0, *lengths), sharing=True)


@pytest.mark.skipif(cpu.compiler() is None, reason="kernels and torch.compile need a C++ compiler")
@pytest.mark.parametrize("backend", ["ours", "torch", pytest.param("compiled", marks=pytest.mark.slow)])
def test_every_backend_computes_beside_numbers_that_are_none(backend: str) -> None:
    dtype = torch.float32 if backend == "compiled" else torch.bfloat16
    by: Backend = {"torch": TORCH}.get(backend) or (  # type: ignore[assignment]
        compiled() if backend == "compiled" else pinned("ours", torch.device("cpu"), dtype)
    )
    model = made("llama", dtype, hidden_size=64, head_dim=16, intermediate_size=96)
    attach(model, LoraConfig(r=4))
    for lengths in ((9, 14), (33, 2)) if backend == "compiled" else ((9, 14), (3, 50), (33, 2)):
        check_packed_rows(model, *rows(1, *lengths), sharing=True, backend=by)
    with raises("training/cannot-pack", match="its neighbor"):
        check_packed_rows(planted(model, LEAKS["a millionth of the mean"]), *rows(), backend=by)


# The first layers in float32 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layers_are_put_back_as_they_were(kind: str) -> None:
    model = made(kind, torch.bfloat16, num_hidden_layers=6)
    before, layers = dict(model.state_dict(keep_vars=True)), list(transformer_layers(model))
    with torch.no_grad():
        wanted = model(rows()[0][None]).logits
        with first_layers_in_float32(model) as decoder:
            assert len(transformer_layers(model)) == 2
            assert decoder(rows()[0][None]).last_hidden_state.dtype == torch.float32
        with pytest.raises(ZeroDivisionError), first_layers_in_float32(model):
            raise ZeroDivisionError
        assert list(transformer_layers(model)) == layers
        after = model.state_dict(keep_vars=True)
        assert all(after[key] is tensor for key, tensor in before.items())
        assert torch.equal(model(rows()[0][None]).logits, wanted)


def test_they_are_those_of_a_float32_copy() -> None:
    model, copy = (made("gemma2", torch.bfloat16, num_hidden_layers=6) for _ in range(2))
    copy = copy.float()
    shorter = decoder_of(copy)
    shorter.layers = shorter.layers[:2]
    with torch.no_grad(), first_layers_in_float32(model) as decoder:
        found = decoder(rows()[0][None]).last_hidden_state
        wanted = shorter(rows()[0][None]).last_hidden_state
    # Gemma scales its embeddings in the dtype of their weights
    assert float((found - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())


def test_every_kind_of_layer_is_among_them_and_embeddings_are_not_copied() -> None:
    types = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    model = tiny_model("gemma3_text", num_hidden_layers=6, layer_types=types, vocab_size=5000).bfloat16()
    wide = lambda: sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)  # noqa: E731
    with first_layers_in_float32(model):
        assert len(transformer_layers(model)) == 4
        assert 0 < wide() < 5000 * 32
    assert wide() == 0


def test_a_quantized_base_is_computed_in_float32_too() -> None:
    from graftlm.hub.quantize_base import quantize

    model = made("llama", torch.bfloat16)
    quantize(model, "int8")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    check_packed_rows(model, *rows(), sharing=True)
    with raises("training/cannot-pack", match="its neighbor"):
        check_packed_rows(planted(model, LEAKS["a millionth of the mean"]), *rows())


def test_kinds_of_layers_are_told_apart_by_their_settings() -> None:
    one, other = (nn.Linear(2, 2) for _ in range(2))
    assert first_layers._kind(one) == first_layers._kind(other)
    other.sliding_window = 4  # type: ignore[assignment]
    assert first_layers._kind(one) != first_layers._kind(other)


# The head ----------------------------------------------------------------------------------------------------------

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "divided": ("granite", {"logits_scaling": 8.0}),
    "multiplied by the same name": ("hyperclovax", {"logits_scaling": 0.25}),
    "multiplied": ("cohere", {"logit_scale": 0.0625}),
    "divided before the layer": ("minicpm3", {"dim_model_base": 8, "num_key_value_heads": 4}),
    "a number that no field has": ("llama", {}),
    "capped": ("gemma2", {"final_logit_softcapping": 1.5}),
    "capped by another name": ("recurrent_gemma", {"logits_soft_cap": 3.0}),
    "capped at 15": ("nanochat", {"final_logit_softcapping": 15.0}),
    "neither": ("qwen3", {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_what_a_head_does_to_its_logits_is_found_by_what_comes_out(name: str, dtype: torch.dtype) -> None:
    kind, changes = HEADS[name]
    model = tiny_model(kind, initializer_range=0.1, **changes).to(dtype)
    if name == "a number that no field has":
        own = model.forward
        model.forward = lambda *args, **kwargs: CausalLMOutput(logits=0.3217 * own(*args, **kwargs).logits)
    row = rows()[1]
    check_forward(model, row)
    hidden = decoder_of(model)(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]  # type: ignore[misc]
    wanted = model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    found = head(model, hidden, row[1:])
    error = float((found - wanted.gather(1, row[1:, None])[:, 0]).abs().max())
    assert error <= 8 * torch.finfo(dtype).eps * max(1.0, float(wanted.abs().max()))


# Decoders ----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_decoder_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(forward, "decoder_of", lambda model: None)
    with raises("training/unsupported-model", match=r"LlamaForCausalLM .*get_decoder\(\)"):
        check_forward(model, rows()[1])


# A forward that somebody set ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_a_forward_that_was_set_on_a_module_stays_and_is_called(kind: str) -> None:
    """As accelerate's hooks and other patches do: on norms, on feed-forward blocks and on whole layers."""
    model, calls = made(kind), list[str]()
    layer = model.model.layers[0]

    def counted(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return forward(*args, **kwargs)

    patched = {"norm": layer.input_layernorm, "mlp": layer.mlp, "layer": layer}
    for name, module in patched.items():
        module.forward = partial(counted, name, module.forward)
    before = {name: module.forward for name, module in patched.items()}
    with packed_attention(model):
        assert all(module.forward is before[name] for name, module in patched.items())
        assert "forward" in vars(model.model.layers[1].input_layernorm), "the others are replaced"
    check_packed_rows(model, *rows())
    assert set(calls) == set(patched)
    assert all(module.forward is before[name] for name, module in patched.items())
    assert "forward" not in vars(model.model.layers[1].input_layernorm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_by_gelu_are_not_taken_for_silu_where_numbers_are_small(dtype: torch.dtype) -> None:
    model = tiny_model("gemma2", initializer_range=0.02).to(dtype)
    with packed_attention(model):
        assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)
    model = tiny_model("llama", initializer_range=0.02).to(dtype)
    with packed_attention(model):
        assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
