"""How factors start at embeddings: as PEFT's, and large enough to be learnt."""

from typing import Any

import peft
import pytest
import torch

from graftlm.deltas import METHODS
from graftlm.model.attach import attach
from graftlm.model.registry import hosts, shared_of
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, close, ids, logits, tiny_config

LIKE_LORA = ("lora", "dylora", "gated-lora", "moslora", "block-lora", "nlora")
WITH_A_RANDOM_A = ("multilora", "nola", "lora-mini", "eigenlorax")
VOCABULARY = 4000


def embeddings(name: str, **changes: Any) -> tuple[Any, Any]:
    """(the model, the delta on its embeddings), with a vocabulary whose root is far from 1."""
    model = tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=False)
    attach(model, tiny_config(name, targets=("embed_tokens",), **changes))
    (host,) = hosts(model).values()
    return model, host.on()[0]


@pytest.mark.parametrize("init", ["zero", "kaiming", "gaussian"])
@pytest.mark.parametrize("name", LIKE_LORA)
def test_lora_and_its_kin_start_as_peft_does_at_embeddings(name: str, init: str) -> None:
    theirs = peft.get_peft_model(
        tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=False),
        peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    )
    layer = theirs.base_model.model.model.embed_tokens
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    model, delta = embeddings(name, init=init)
    assert not A.any()
    assert torch.equal(delta.A, torch.zeros_like(delta.A))
    # 128 or more draws of N(0, 1): the deviation is 1 within five standard errors, theirs and ours
    for factor in (B, delta.B):
        assert abs(float(factor.detach().std()) - 1) < 5 / (2 * factor.numel()) ** 0.5
    base = tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=False)
    assert torch.equal(logits(model), logits(base)), "the fresh delta is the base"


@pytest.mark.parametrize("name", WITH_A_RANDOM_A)
def test_a_random_A_is_drawn_for_a_one_hot_x(name: str) -> None:
    """A x of a token is as large as A x of a linear layer is for an x of elements of size 1: not a root of the
    vocabulary smaller."""
    _, delta = embeddings(name)
    A, _ = delta.factors()
    linear = tiny_model()
    attach(linear, tiny_config(name, targets=("q_proj",)))
    (other, *_) = hosts(linear).values()
    A_linear, _ = other.on()[0].factors()
    x = torch.randn(1000, A_linear.shape[1], generator=torch.Generator().manual_seed(0)).sign()
    wanted = (x @ A_linear.detach().T).square().mean().sqrt()
    assert 0.4 < float(A.detach().square().mean().sqrt() / wanted) < 2.5


def test_tied_lora_starts_its_A_at_zero_at_embeddings_and_its_B_at_linear_layers() -> None:
    model = tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=False)
    attach(model, tiny_config("tied-lora", targets=("embed_tokens", "up_proj")))
    shared: Any = shared_of(model, "default")
    assert not shared.get_parameter(f"A_{VOCABULARY}x32").any()
    assert float(shared.get_parameter(f"B_{VOCABULARY}x32").detach().std()) == pytest.approx(1, abs=0.3)
    assert not shared.get_parameter("B_32x48").any()
    base = tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=False)
    close(logits(model), logits(base), "the fresh delta is the base")


@pytest.mark.parametrize("name", [*LIKE_LORA, *WITH_A_RANDOM_A, "tied-lora"])
def test_a_few_steps_on_embeddings_move_the_model_as_peft_does(name: str) -> None:
    """With AdamW at one rate: at least a third of what PEFT's LoRA moves the logits of the trained tokens."""

    def moved(model: Any) -> float:
        before = logits(model)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (-model(ids()).logits.log_softmax(-1)[..., 7]).mean().backward()
            optimizer.step()
        return float((logits(model) - before).norm())

    base = tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = moved(peft.get_peft_model(base, config).eval())
    model, _ = embeddings(name)
    assert moved(model) > theirs / 3


def test_every_method_on_embeddings_is_the_base_at_its_start() -> None:
    for name, method in METHODS.items():
        if "embedding" in method.delta.kinds and not method.delta.starts_away and not method.delta.needs:
            model = tiny_model(tie_word_embeddings=False)
            before = logits(model)
            attach_tiny(name, model, targets=("embed_tokens",))
            close(logits(model), before, name)
