"""LoRA+ moves B as AdamW at `ratio` times the recipe's rate does, and everything else as AdamW at that rate."""

import pytest
import torch

from graftlm.data.pack import collate
from graftlm.errors import TrainingError
from graftlm.model.attach import trainable
from graftlm.testing import perturbed, tiny_model
from graftlm.training.policies.base import Policy
from graftlm.training.policies.lora_plus import LoraPlus, LoraPlusConfig
from tests.training.policies.test_policies import run, training
from tests.training.test_loop import examples


def after_a_step(chosen: list[Policy], rate: float) -> dict[str, torch.Tensor]:
    model = perturbed("lora", tiny_model())
    run(training(model, chosen, rate=rate), chosen, [[collate(examples())]])
    return {name: p.detach() for name, p in trainable(model).items()}


def test_B_has_a_rate_of_its_own() -> None:
    slow, fast = after_a_step([], 0.01), after_a_step([], 0.04)
    for name, p in after_a_step([LoraPlus(LoraPlusConfig(ratio=4.0))], 0.01).items():
        assert torch.equal(p, fast[name] if name.endswith(".B") else slow[name])


def test_without_a_B_it_is_refused() -> None:
    model = perturbed("ia3", tiny_model())
    chosen: list[Policy] = [LoraPlus(LoraPlusConfig())]
    with pytest.raises(TrainingError, match="lora-plus with ia3"):
        run(training(model, chosen), chosen, [[collate(examples())]])
