"""A packed forward pass is the rows one at a time, on many architectures; and what cannot be packed is refused."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama import modeling_llama

from graftlm.data.batches.pack import Example, Pack, collate
from graftlm.deltas.lora import LoraConfig
from graftlm.kernels import head
from graftlm.kernels.backend import TORCH, Backend, compiled
from graftlm.model.attach import attach
from graftlm.model.registry import trainable
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import SEGMENTS, packed_attention
from graftlm.passes.packing_check import check_forward, check_packed_rows
from graftlm.testing import tiny_model
from tests.errors import raises
from tests.passes.test_check_packing import leaking

pytestmark = pytest.mark.versions

LENGTHS = [5, 1, 12, 9, 2]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied, biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "mistral, sliding window": ("mistral", {"sliding_window": 4}),
    "gemma2": ("gemma2", {"sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "olmo2": ("olmo2", {}),
    "stablelm, hands no argument on": ("stablelm", {}),
    "nemotron, hands no argument on": ("nemotron", {}),
    "gpt_oss, sinks": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
}


def family(name: str, **more: Any) -> Any:
    """A tiny model of that family, attending as written in its paper, with LoRA away from its start on every layer."""
    kind, changes = FAMILIES.get(name, (name, {}))
    model = tiny_model(kind, attn_implementation="eager", initializer_range=0.1, **changes, **more)
    attach(model, LoraConfig(r=3, alpha=6))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(vocabulary: int = 300, lengths: list[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]


def pack(of: list[Tensor]) -> Pack:
    """Rows laid end to end, with the next token of each position as its target."""
    return collate([Example(row.int().numpy(), np.arange(len(row), dtype=np.float32), "") for row in of])


def weighted_sum(found: Tensor) -> Tensor:
    """A loss in which every token counts otherwise, so that no two tokens can be mixed up."""
    return (found * torch.linspace(0.5, 2, len(found))).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    return found


def reference(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """By the model's own code alone: every row by itself, its full logits, their log-softmax."""
    found = []
    for row in rows():
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        found.append(logits.log_softmax(-1).gather(1, row[1:, None])[:, 0])
    together = torch.cat(found)
    weighted_sum(together).backward()
    return together.detach(), gradients(model)


def assert_packed_is_the_reference(model: Any, backend: Backend = TORCH) -> None:
    wanted, wanted_gradients = reference(model)
    with packed_attention(model, backend):
        found = log_probs(model, pack(rows()))
        weighted_sum(found).backward()
    assert float((found.detach() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    largest = max(float(g.abs().max()) for g in wanted_gradients.values())
    for key, gradient in gradients(model).items():
        assert float((gradient - wanted_gradients[key]).abs().max()) <= 1e-5 * largest, key


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_one_row_at_a_time_in_log_probs_and_in_every_gradient(name: str) -> None:
    assert_packed_is_the_reference(family(name))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at inputs that are not leaves
def test_compiled_is_one_row_at_a_time_and_leaves_the_modelling_file_as_it_was() -> None:
    model = family("llama")
    file = sys.modules[type(model).__module__]
    before = file.apply_rotary_pos_emb  # type: ignore[attr-defined]
    assert_packed_is_the_reference(model, compiled())
    assert file.apply_rotary_pos_emb is before  # type: ignore[attr-defined]


def tree() -> tuple[list[Tensor], list[Tensor]]:
    """Rows that share beginnings at two depths, one of them wholly inside another; and a weight for every token.

    Some beginnings are trained, so that tokens with several weights occur, as with the masks that train a prompt.
    """
    generator = torch.Generator().manual_seed(8)

    def text(length: int) -> Tensor:
        return torch.randint(3, 300, (length,), generator=generator)

    document, question = text(11), text(9)
    made = [
        torch.cat([document, question, text(4)]),
        torch.cat([document, question, text(7)]),
        torch.cat([document, text(5)]),
        torch.cat([document, question]),
        text(6),
    ]
    weights = [torch.rand(len(row), generator=generator).round(decimals=2) for row in made]
    for number, weight in enumerate(weights):
        weight[0] = 0
        weight[1 : 4 * number] = 0
    return made, weights


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_beginnings_give_the_loss_and_every_gradient_of_the_rows_alone(name: str) -> None:
    model = family(name)
    made, weights = tree()
    wanted = torch.zeros(())
    for row, weight in zip(made, weights, strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        wanted = wanted + (logits.log_softmax(-1).gather(1, row[1:, None])[:, 0] * weight[1:]).sum()
    wanted.backward()
    wanted_gradients = gradients(model)
    examples = [Example(row.int().numpy(), weight.numpy(), "") for row, weight in zip(made, weights, strict=True)]
    shared = collate(examples, share=True)
    assert max(shared.parents) >= 1, "a tree of two levels"
    assert shared.ids.numel() < sum(map(len, made)) / 1.5
    with packed_attention(model):
        found = (log_probs(model, shared) * shared.weights).sum()
        found.backward()
    assert abs(float((found - wanted).detach())) <= 1e-5 * abs(float(wanted.detach()))
    largest = max(float(g.abs().max()) for g in wanted_gradients.values())
    for key, gradient in gradients(model).items():
        assert float((gradient - wanted_gradients[key]).abs().max()) <= 1e-5 * largest, key


@pytest.mark.parametrize("name", FAMILIES)
def test_check_packing_lets_every_family_pass(name: str) -> None:
    check_packed_rows(family(name), *rows()[2:4], sharing=True)


def test_one_row_without_packed_attention_is_the_models_own_forward_pass() -> None:
    model, row = family("llama"), rows()[2]
    with torch.no_grad():
        found = log_probs(model, pack([row]))
        wanted = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
    assert float((found.detach() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_delta_on_the_head_counts_and_learns() -> None:
    model = tiny_model(tie_word_embeddings=False)
    attach(model, LoraConfig(r=3), targets=("lm_head", "q_proj"))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    assert_packed_is_the_reference(model)


# Memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes, the model's own weights and views of them left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, at_once = 5000, 8  # rows of logits
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once * vocabulary)
    model = tiny_model(kind, vocab_size=vocabulary)
    attach(model, LoraConfig(r=2))
    packed = pack(rows(vocabulary, [40, 30, 30]))
    with Largest(model) as made, packed_attention(model):
        weighted_sum(log_probs(model, packed)).backward()
    assert at_once * vocabulary <= made.elements, "the logits of a chunk must have been seen, or this proves nothing"
    assert made.elements < len(packed.targets) * vocabulary / 5


# What is put back ------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Afterwards the model attends, and its modules compute, by what they did before."""
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    implementations = [c._attn_implementation for c in configs]
    forwards = {name: "forward" in vars(m) for name, m in model.named_modules()}
    with torch.no_grad():
        before = model(rows()[2][None]).logits
    yield
    assert [c._attn_implementation for c in configs] == implementations
    assert {name: "forward" in vars(m) for name, m in model.named_modules()} == forwards
    with torch.no_grad():
        assert torch.equal(model(rows()[2][None]).logits, before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_attention_and_norms_are_restored(name: str) -> None:
    model = family(name)
    with unchanged(model):
        with packed_attention(model):
            assert model.config._attn_implementation == SEGMENTS
            log_probs(model, pack(rows()))
        check_packed_rows(model, *rows()[2:4])


def test_attention_and_norms_are_restored_after_an_exception() -> None:
    model = family("llama")
    with unchanged(model), pytest.raises(ZeroDivisionError), packed_attention(model):
        raise ZeroDivisionError


def test_norms_and_gated_blocks_are_found_and_what_computes_otherwise_is_left_alone() -> None:
    for name, count in (("llama", 7), ("gemma2", 9), ("qwen3", 11), ("phi3", 5), ("gpt2", 0)):
        model = family(name)
        with packed_attention(model):
            assert sum("forward" in vars(m) for m in model.modules()) == count, name


def test_packing_one_model_leaves_another_of_the_same_kind_alone() -> None:
    one, other = family("llama"), family("llama")
    with unchanged(other), packed_attention(one):
        pass
    with packed_attention(one), torch.no_grad():
        assert other(rows()[2][None]).logits.isfinite().all()


# What cannot be packed -------------------------------------------------------------------------------------------


def assert_packing_is_refused_with_the_remedy(model: Any) -> None:
    with raises("training/cannot-pack", match="pack: false") as raised:
        check_packed_rows(model, *rows()[2:4])
    assert type(model).__name__ in str(raised.value)


def test_a_model_without_attention_is_refused() -> None:
    assert_packing_is_refused_with_the_remedy(tiny_model("mamba", initializer_range=0.5))


def test_a_model_that_ignores_the_attention_interface_is_refused() -> None:
    """Its attention is plain causal attention over all that it gets, as in modeling files older than the interface."""
    model = tiny_model(initializer_range=0.5)

    def attend(
        layer: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **_: Any
    ) -> Any:
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return layer.o_proj(mixed.transpose(1, 2).flatten(2)), None

    row = rows()[2][None]
    before = model(row).logits
    for layer in model.model.layers:
        layer.self_attn.forward = partial(attend, layer.self_attn)
    torch.testing.assert_close(model(row).logits, before, msg="else the model is refused for another reason")
    assert_packing_is_refused_with_the_remedy(model)


@pytest.mark.parametrize(("kind", "changes"), [("bloom", {}), ("gptj", {"rotary_dim": 8})])
def test_a_family_is_packed_from_the_version_of_transformers_on_that_gives_it_the_interface(
    kind: str, changes: dict[str, Any]
) -> None:
    """GPT-J has it from 5.24 on; before, it attends by code of its own and is refused."""
    file = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    if hasattr(file, "ALL_ATTENTION_FUNCTIONS"):
        assert_packed_is_the_reference(family(kind, **changes))
    else:
        assert_packing_is_refused_with_the_remedy(tiny_model(kind, initializer_range=0.5, **changes))


@pytest.mark.parametrize(
    ("kind", "changes"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25}), ("llama", {})]
)
def test_a_head_that_scales_its_logits_is_followed(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_model(kind, initializer_range=0.5, **changes)
    check_forward(model, rows()[2])
    check_packed_rows(model, *rows()[2:4], sharing=True)


def test_a_head_that_does_something_else_to_its_logits_is_found_out() -> None:
    model = tiny_model(initializer_range=0.5, tie_word_embeddings=False)
    model.lm_head.register_forward_hook(lambda layer, inputs, logits: logits.square())
    with raises("training/unsupported-model"):
        check_forward(model, rows()[2])


def test_a_layer_that_carries_a_state_from_row_to_row_is_found_out() -> None:
    model = tiny_model()
    leaking(model)
    with raises("training/cannot-pack", match="with its neighbor"):
        check_packed_rows(model, *rows()[2:4])
