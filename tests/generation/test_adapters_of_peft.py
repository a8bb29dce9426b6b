"""Greedy answers of a mixed batch against transformers and PEFT, which run one adapter at a time."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.attach import attach, detach
from graftlm.testing.deltas import move
from tests.architectures import build
from tests.generation.adapters import spread
from tests.generation.test_engine import long_prompts

COUNT, NEW = 8, 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of different ranks."""
    place, found = tmp_path_factory.mktemp("adapters"), []
    for number in range(COUNT):
        model = base()
        move(attach(model, LoraConfig(r=2 + number % 3, alpha=8.0, targets="all-linear")), scale=0.3, seed=number)
        found.append(save_adapter(model, place / f"a{number}"))
        detach(model)
    return found


def base() -> Any:
    return spread(build("llama", head_dim=16))


Greedy = list[tuple[list[int], list[bool]]]
"""Of each prompt the new ids, and whether the two best logits were within 1e-4 there."""


@pytest.fixture(scope="module")
def wanted(folders: list[Path]) -> list[Greedy]:
    model: Any = peft.PeftModel.from_pretrained(base(), str(folders[0]), adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=f"a{number}")
    found: list[Greedy] = []
    for number in range(COUNT):
        model.set_adapter(f"a{number}")
        greedy: Greedy = []
        for ids in long_prompts(50):
            out = model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, output_logits=True,
                return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            best = [step[0].topk(2).values.tolist() for step in out.logits]
            greedy.append((out.sequences[0, len(ids) :].tolist(), [one - two < 1e-4 for one, two in best]))
        found.append(greedy)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("prefix_tokens", [0, 100_000])
@pytest.mark.parametrize("max_requests", [5, 32])
def test_mixed_batches_answer_as_peft(
    folders: list[Path], wanted: list[Greedy], prefix_tokens: int, max_requests: int
) -> None:
    """Asked twice, so that the second time has beginnings that were computed before."""
    model = base()
    pool = AdapterPool(model, slots=COUNT)
    for folder in folders:
        pool.register(folder.name, folder)
    engine = Engine(model, max_requests=max_requests, step_tokens=48, prefix_tokens=prefix_tokens)
    assert engine.reason == ""
    leases = [pool.acquire(folder.name) for folder in folders]
    asked = [(number, at, ids) for at, ids in enumerate(long_prompts(50)) for number in range(COUNT)]
    requests = [Request(ids, NEW, adapters=leases[number].adapters) for number, _, ids in asked]
    ties = differ = 0
    for _ in range(2):
        for index, generation in engine.run(requests):
            number, at, _ = asked[index]
            ids, close = wanted[number][at]
            for mine, theirs, tie in zip(generation.ids, ids, close, strict=True):
                if tie:
                    ties += 1
                    break
                assert mine == theirs, (number, at)
            differ += wanted[number][at][0] != wanted[(number + 1) % COUNT][at][0]
    assert ties <= 0.01 * 2 * len(asked)
    assert differ > len(asked), "adapters that answer alike would prove nothing"
    for lease in leases:
        lease.release()
