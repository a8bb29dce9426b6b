"""A reward model: a causal base with a linear head of one output, read where the answer ends (Ouyang et al. 2022,
arXiv:2203.02155, section 3.5). It is a folder or a hub id that transformers reads for sequence classification with one
label, its weights in safetensors; no code that comes with it is run.

The whole conversation, answer included, is rendered by the reward model's own chat template.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoModelForSequenceClassification

from graftlm.config.dtypes import DTYPES, Dtype
from graftlm.config.schema import PositiveCount, config
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.errors import BaseModelError
from graftlm.hub.config import BaseConfig
from graftlm.hub.dtypes import resolve_dtype
from graftlm.hub.locate import locate
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig


@config
class RewardModelConfig(ScorerConfig):
    by: Literal["reward-model"] = "reward-model"
    model: str
    """A folder, or a hub id (which needs `network: true` unless it is in the local cache)."""
    dtype: Dtype = "auto"
    """Dtype of its weights, as `base.dtype`."""
    REPLACED: ClassVar[Mapping[str, str]] = {"store": f"dtype ({', '.join(DTYPES)})"}
    """Keys of earlier versions, and what took their place."""
    at_once: PositiveCount = 8
    """Answers of one forward pass."""


def make(config: RewardModelConfig, network: bool, today: datetime.date) -> Scorer:
    """Raises BaseModelError for a model that cannot be loaded, or that has no trained head of one output."""
    base = BaseConfig(name=config.model)
    renderer = Renderer(load_tokenizer(base, network=network), today=today)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, about = AutoModelForSequenceClassification.from_pretrained(
            locate(base, network=network),
            dtype=resolve_dtype(config.dtype, device),
            use_safetensors=True,
            local_files_only=not network,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(
            f"{config.model}: no reward model: {str(error).strip()[:300]}", code="not-a-reward-model"
        ) from None
    if about["missing_keys"] or model.config.num_labels != 1:
        why = "no trained head" if about["missing_keys"] else f"{model.config.num_labels} outputs"
        raise BaseModelError(
            f"{config.model}: a reward model has a head of one output, and this has {why}. A base is none: train one "
            "for sequence classification with num_labels=1",
            code="not-a-reward-model",
        )
    model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def score(answers: Sequence[Completion]) -> list[Reward]:
        rows = [_ids(renderer, completion) for completion in answers]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[Reward] = [None] * len(rows)
        for start in range(0, len(order), config.at_once):
            some = order[start : start + config.at_once]
            for i, reward in zip(some, _rewards(model, [rows[i] for i in some]), strict=True):
                found[i] = reward
        return found

    return score


def _ids(renderer: Renderer, completion: Completion) -> list[int]:
    if not completion.answer:  # templates may refuse an answer that says nothing
        return [int(i) for i in renderer.prompt(completion.messages)]
    return [int(i) for i in renderer.conversation([*completion.messages, Message("assistant", completion.answer)]).ids]


def _rewards(model: Any, rows: Sequence[list[int]]) -> list[float]:
    """The output of the head at the last token of each row: padding on the right is never looked at."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    # Not model(...): transformers finds the last token by its id, which fails where an answer ends with the padding's.
    hidden = model.base_model(ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
    last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
    rewards: list[float] = head_of(model)(last)[:, 0].float().tolist()
    return rewards


def head_of(model: Any) -> Any:
    """The linear layer from hidden states to the reward."""
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise BaseModelError(
            f"{type(model).__name__} has no linear layer `score`: its head is not known here", code="not-a-reward-model"
        )
    return head
