"""Trainable tokens: the embeddings of a few tokens learn. Gal et al. 2022, arXiv:2208.01618, section 3.

    W'[:, t_i] = T_i        T [k, d_model] learnt, at first the embeddings T_0 themselves; t [k] token ids
    dW = (T - T_0)^T S      S [k, vocabulary]: row i is 1 at t_i and 0 elsewhere

The paper (textual inversion) learns one word of a model that makes images; PEFT has the same for language models, for
tokens that were added to the vocabulary. T is kept whole, as PEFT keeps it.

At an output head W is [vocabulary, d_model], and it is the rows t_i that are T: W' = W + S^T (T - T_0).

A head is left alone unless it is a target, also where it is tied to the embeddings; then T is learnt apart for both.
PEFT moves a tied head with the embeddings, with one T: its adapters of such models sit on both here, and ours are
written in a form that PEFT refuses.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from graftlm.config.schema import Count, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, PeftLayout, Site, Targets
from graftlm.errors import TargetError


@config
class TrainableTokensConfig(DeltaConfig):
    method: Literal["trainable-tokens"] = "trainable-tokens"
    tokens: Annotated[tuple[Count, ...], Field(min_length=1)] = (0,)
    """The ids of the tokens to train. Required: no default fits every model."""
    targets: Targets = r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)"

    def __post_init__(self) -> None:
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens: {self.tokens} has an id twice")

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        if inside := [site.name for site in sites if site.kind == "linear" and site.layer is not None]:
            raise TargetError(
                f"targets: {inside[0]} has no row for each token; embeddings and output heads have",
                code="not-an-embedding",
            )
        return sites


class TrainableTokens(AdditiveDelta):
    family = "specification"
    paper = "Gal et al. 2022, arXiv:2208.01618"
    formula = "len(tokens) * (d_out if kind == 'embedding' else d_in)"
    kinds = ("embedding", "linear")
    learning_rate = 8e-2
    peft = PeftLayout(
        type="TRAINABLE_TOKENS",
        tensors={"T": "trainable_tokens_delta"},
        fields={"tokens": "token_indices"},
        defaults={"token_indices": ()},
        why_not_at=lambda site: "PEFT would move the tied output head as well" if site.tied else "",
    )
    t: Tensor
    T_0: Tensor
    place: Tensor

    def __init__(self, site: Site, config: TrainableTokensConfig) -> None:
        super().__init__(site, config)
        self.count = site.d_in if site.kind == "embedding" else site.d_out
        if max(config.tokens) >= self.count:
            raise TargetError(
                f"tokens: {max(config.tokens)} is no id at {site.name}, which has {self.count} of them",
                code="token-out-of-range",
            )
        t = torch.tensor(config.tokens)
        T_0 = (site.W()[:, t].T if site.kind == "embedding" else site.W()[t]).clone()
        self.T = nn.Parameter(T_0.clone())
        self.register_buffer("t", t, persistent=False)
        self.register_buffer("T_0", T_0, persistent=False)
        place = torch.full((self.count,), len(t)).index_copy(0, t, torch.arange(len(t)))  # id -> row of T, or len(t)
        self.register_buffer("place", place, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        S = F.one_hot(self.t, self.count).to(self.T)
        return (S, (self.T - self.T_0).T) if self.site.kind == "embedding" else (self.T - self.T_0, S.T)

    def increment(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind != "embedding":
            return super().increment(x, base)
        here = base.take(x, (self.place < len(self.t)).to(self.T)[None])  # [.., 1], 0 at all other ids
        return here * F.embedding(self.place[x], F.pad(self.T - self.T_0, (0, 0, 0, 1)))
