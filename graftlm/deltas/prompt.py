"""Prompt Tuning: The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et al. 2021, arXiv:2104.08691.

    the model reads [P; E(x)]        P [p, d_model] learnt, E the frozen embeddings (section 2)

P starts as the embeddings of p random tokens (section 3.2: better than noise at every size). Something is read before
the row from the first step on, so the fresh delta is not the identity.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import DeltaConfig, InputDelta, PeftLayout, Site, Targets


@config
class PromptConfig(DeltaConfig):
    method: Literal["prompt"] = "prompt"
    p: PositiveCount = 20
    """Positions of the prompt."""
    targets: Targets = "model"


class Prompt(InputDelta):
    family = "addition"
    paper = "Lester et al. 2021, arXiv:2104.08691"
    formula = "p * d_out"
    learning_rate = 0.032
    starts_away = "the row is read after the prompt from the first step on"
    peft = PeftLayout(
        type="PROMPT_TUNING",
        tensors={"P": "prompt_embeddings"},
        fields={"p": "num_virtual_tokens"},
        harmless=("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
        facts=lambda site, config: {
            "num_layers": (site.heads or (0, 0, 0))[0],
            "num_attention_heads": (site.heads or (0, 0, 0))[1],
            "num_transformer_submodules": 1,
            "token_dim": site.d_out,
        },
    )

    def __init__(self, site: Site, config: PromptConfig) -> None:
        super().__init__(site, config)
        tokens = torch.randint(site.d_in, (config.p,), generator=site.generator())
        self.P = nn.Parameter(site.W()[:, tokens].T.clone())

    def prompt(self) -> Tensor:
        return self.P
