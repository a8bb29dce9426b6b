"""LoRA+ moves B as AdamW at `ratio` times the recipe's rate does, and everything else as AdamW at that rate."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from graftlm.callbacks.lora_plus import LoraPlus, LoraPlusConfig
from graftlm.config.schema import build
from graftlm.data.batches.pack import collate
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import trainable
from graftlm.recipe import Recipe
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.phases import Phases
from graftlm.training.state import ParameterGroup
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples


def after_a_step(chosen: list[Callback], rate: float) -> dict[str, torch.Tensor]:
    model = perturbed("lora", tiny_model())
    run(training(model, chosen, rate=rate), chosen, [[collate(examples())]])
    return {name: p.detach() for name, p in trainable(model).items()}


def test_B_has_a_rate_of_its_own() -> None:
    slow, fast = after_a_step([], 0.01), after_a_step([], 0.04)
    for name, p in after_a_step([LoraPlus(LoraPlusConfig(ratio=4.0))], 0.01).items():
        assert torch.equal(p, fast[name] if name.endswith(".B") else slow[name])


def test_the_groups_are_those_of_peft() -> None:
    """A, B and what lies at an embedding: every tensor's rate against that of PEFT's optimizer."""
    targets = ["q_proj", "down_proj", "embed_tokens"]
    theirs = peft.get_peft_model(
        tiny_model(tie_word_embeddings=False), peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=5.0)
    names = {id(p): name for name, p in theirs.named_parameters()}
    wanted = {names[id(p)]: group["lr"] for group in made.param_groups for p in group["params"]}
    model = attach(tiny_model(tie_word_embeddings=False), LoraConfig(r=4, targets=tuple(targets)))
    learning = trainable(model)
    group = ParameterGroup(learning, 0.01, frozenset(name for name in learning if "embed_tokens" in name))
    found = {
        name: part.rate for part in LoraPlus(LoraPlusConfig(ratio=5.0)).groups([group]) for name in part.parameters
    }
    assert found.keys() == learning.keys()
    for name, rate in found.items():
        site, _, factor = name.partition(".deltas.")
        (same,) = (n for n in wanted if f".{site}." in n and n.split(".")[-2 if "embed" in n else -3][-1] == factor[-1])
        assert rate == pytest.approx(wanted[same]), name


@pytest.mark.parametrize("learning_rate", [None, 0.003])
def test_the_default_rate_leaves_B_that_of_the_method_and_a_given_rate_is_As(learning_rate: float | None) -> None:
    recipe = build(
        Recipe,
        {
            "data": {"train": "rows.jsonl"},
            "delta": {"method": "lora", "targets": ["q_proj", "embed_tokens"]},
            "callbacks": ["lora-plus"],
            "train": {"steps": 4} | ({"learning_rate": learning_rate} if learning_rate else {}),
        },
        source="test",
    )
    model = attach(tiny_model(tie_word_embeddings=False), recipe.all_deltas()["default"])
    training = Phases(recipe.setup(), model, 4).begin(0).training
    names = {id(p): name for name, p in trainable(model).items()}
    rates = {names[id(p)]: group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
    rate_of_A = learning_rate or METHODS["lora"].delta.learning_rate / 16
    for name, rate in rates.items():
        wanted = 1e-6 if "embed_tokens" in name else 16 * rate_of_A if name.endswith(".B") else rate_of_A
        assert rate == pytest.approx(wanted), name


def test_without_a_B_it_is_refused() -> None:
    model = perturbed("ia3", tiny_model())
    chosen: list[Callback] = [LoraPlus(LoraPlusConfig())]
    with raises("training/callback-unsupported", match="lora-plus with ia3"):
        run(training(model, chosen), chosen, [[collate(examples())]])
