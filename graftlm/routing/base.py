"""What a router is: which adapters of a library answer, for every token at every layer or for a request.

    TokenRouter.gates(site, experts)  -> (x [T, d_in], A_e x [T, n, r]) -> weights [T, n]
    RequestRouter.weights(ids)        -> adapter -> weight, before the prompt is read

Made as `Class(config)`, and `prepare(library)` is called once before anything else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from graftlm.config.schema import config
from graftlm.model.routed import Experts, Gates
from graftlm.routing.library import Library

Grain = Literal["token", "sequence", "task"]
"""What has weights of its own: a token at a layer, a request, or the task that a request is taken for."""


@config
class RouterConfig:
    """The base of all configs of routers; each adds `name`, its key in ADAPTER_ROUTERS, and its options."""

    name: str
    among: tuple[str, ...] = ()
    """Adapters that may be chosen; without it, all that are registered."""


class Router(Protocol):
    """What both kinds of routers have."""

    paper: ClassVar[str]
    grain: ClassVar[Grain]

    def prepare(self, library: Library) -> None:
        """Learn what is needed about the adapters. Raises RecipeError where the config lacks something for it."""


class TokenRouter:
    """Weights for every token at every layer, from the layer's input."""

    paper: ClassVar[str]
    grain: ClassVar[Grain] = "token"

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, library: Library) -> None:
        """What is not in the factors of the adapters."""

    def gates(self, site: str, experts: Experts) -> Gates:
        """The weights of the adapters at a layer."""
        raise NotImplementedError


class RequestRouter:
    """Weights for a request."""

    paper: ClassVar[str]
    grain: ClassVar[Grain] = "sequence"
    fuses = False
    """Whether the parameters of several adapters are averaged, and not their outputs."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, library: Library) -> None:
        """What is learnt about the adapters from rows."""
        raise NotImplementedError

    def weights(self, ids: Sequence[int]) -> Mapping[str, float]:
        """Adapter -> its weight, of a prompt. What is not named has weight 0; {} is the base."""
        raise NotImplementedError


def among_top(scores: Tensor, top_k: int | None) -> Tensor:
    """Which of the scores [T, n] are among the `top_k` largest of their row; None, and more than there are, is all.

    Of equal scores the first ones are taken.
    """
    if top_k is None or top_k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    kept = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)


def softmax_of_top(scores: Tensor, top_k: int | None, temperature: float = 1.0) -> Tensor:
    """softmax(scores / temperature) over the `top_k` largest scores of each row [T, n], and 0 elsewhere."""
    return (scores / temperature).masked_fill(~among_top(scores, top_k), -torch.inf).softmax(dim=-1)
