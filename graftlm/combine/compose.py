"""Several adapters of one base as one LoRA adapter.

    D_i = s_i B_i A_i -> matrices in a space -> rule -> D = B A        a site at a time, in float64

Space and rule are free of each other: `spaces.py` says what the matrices are, `rules/` what is made of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graftlm.adapters.adapter import NO_CHAT, Adapter, ChatRecord
from graftlm.adapters.peft import target_modules
from graftlm.adapters.save import adapter_of
from graftlm.combine.changes import changes_of
from graftlm.combine.core import Change, Factorization, factorize
from graftlm.combine.rules import COMPOSERS
from graftlm.combine.rules.base import Convention, MomentRule, Rule, RuleConfig
from graftlm.combine.spaces import Space, coordinates
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import AdapterError, BaseModelError, RecipeError, nearest
from graftlm.hub.fingerprint import Fingerprint, difference
from graftlm.hub.load import load_base
from graftlm.model.attach import attach, detach
from graftlm.model.registry import deltas_by_site
from graftlm.model.sites import site_seed

NAME = "graft-composed"
"""The name under which the result is on the model while its adapter is made."""

Moments = Mapping[str, Tensor] | Callable[[str], Tensor]
"""Site -> the mean of x x^T over the inputs x of the site in rows of one adapter [d_in, d_in]: the `second_moment` of
`graftlm/passes/statistics.py: collect`."""

EVERYWHERE = ""
"""Stands for a site where weights are of whole adapters."""

Weights = Sequence[float] | Mapping[str, Sequence[float]]
"""One for each adapter, or site -> one for each adapter."""


class SiteReport(NamedTuple):
    """The result of a composition at one site."""

    rank: int
    error: float
    """||D - D'|| / ||D||, D the result of the rule and D' what is kept of it; 0 where it is exact. In space `ctm`, the
    share of the adapters' norms that is outside of the common subspace, if that is larger."""
    cross_share: float | None = None
    """In space `factors`, ||D - sum_i w_i D_i|| / ||D||, and w_i^2 in place of w_i for `lorahub`. For a sum of factors
    that is the part which is products of one adapter's B with another's A."""


class Composition(NamedTuple):
    """One adapter made of several."""

    adapter: Adapter
    sites: dict[str, SiteReport]
    notes: list[str]
    """Warnings: parts of the adapters that the result does not have."""


@torch.no_grad()
def compose(
    model_or_base: nn.Module | str,
    adapters: Sequence[Adapter | str | Path],
    *,
    by: RuleConfig | str = "linear",
    weights: Weights | None = None,
    space: Space | None = None,
    convention: Convention | None = None,
    rank: int | None = None,
    seed: int = 0,
    moments: Sequence[Moments] | None = None,
) -> Composition:
    """Compose adapters of one base into one LoRA adapter, scale 1 at each site.

    `weights`: one for each adapter, by default 1, or for each site one for each adapter. `space` and `convention`:
    those of the rule's `spaces` and `conventions`, by default its first (mostly `core` and `paper`). `rank` is the
    largest of the result at a site; the sites' errors say what it cuts. `seed` is for rules that draw, `moments`, one
    for each adapter, for `regmean` and `ziplora`.
    The model is left as it was. Raises RecipeError for options that do not go together, AdapterError and BaseModelError
    for adapters that do not fit the base or each other, TargetError for one that does more than change weight matrices.
    """
    config = config_named(by) if isinstance(by, str) else by
    rule = _rule(config, space, convention)
    space = space or rule.spaces[0]
    members = read_adapters(adapters)
    shares = _weights_of(rule, weights, len(members))
    _check_moments(rule, moments, len(members))
    _check_rank(config, rule, space, rank)
    check_one_base(members)
    model = loaded(model_or_base)
    every = rule.convention == "peft" or EVERYWHERE not in shares
    used = [i for i in range(len(members)) if every or shares[EVERYWHERE][i] != 0]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    sites: dict[str, SiteReport] = {}
    needs_rank = rank is None and rule.energy == 1
    with ExitStack() as stack:
        read = partial(changes_of, model, needs_rank=needs_rank)
        each = [(stack.enter_context(read(members[i], f"{NAME}-{i}")), i) for i in used]
        wanted = in_order(model, [changes for changes, _ in each])
        _check_sites(shares, wanted)
        for site in wanted:
            own = shares.get(site) or shares[EVERYWHERE]
            counts = [i for i, weight in enumerate(own) if weight != 0 or rule.convention == "peft"]
            here = [(changes[site](), i) for changes, i in each if site in changes and i in counts]
            if not here:
                continue
            result, cross = compose_changes(
                [change for change, _ in here],
                [own[i] for _, i in here],
                rule,
                space,
                rank=rank,
                generator=torch.Generator().manual_seed(site_seed(seed, site)),
                site=site,
                moments=None if moments is None else [_moment(moments[i], site, D.A.shape[1]) for D, i in here],
            )
            found[site] = result.Y.float(), (rule.scale * result.X).float()
            sites[site] = SiteReport(result.Y.shape[0], result.error, cross)
    adapter, notes = with_chat(lora_with(model, found), [members[i] for i in used])
    return Composition(adapter, sites, notes)


def compose_changes(
    changes: Sequence[Change],
    weights: Sequence[float],
    rule: Rule,
    space: Space,
    *,
    rank: int | None,
    generator: torch.Generator,
    site: str = "this site",
    moments: Sequence[Tensor] | None = None,
) -> tuple[Factorization, float | None]:
    """One site: (B and A of the result without `rule.scale`, cross share). A weight belongs to each change, and, in a
    MomentRule, a moment [d_in, d_in]."""
    if space == "factors":
        return _of_factors(changes, weights, rule, rank, generator, site)
    at = coordinates(changes, space, rank)
    # The largest first: sums and random numbers then do not depend on the order in which the adapters are given.
    order = sorted(range(len(changes)), key=lambda i: -float(at.matrices[i].norm()))
    matrices, shares = [at.matrices[i] for i in order], [weights[i] for i in order]
    if isinstance(rule, MomentRule) and moments is not None:
        prepared = [rule.prepared(moments[i].double().cpu()) for i in order]
        V = at.V
        M = rule.merge_with(matrices, shares, prepared if V is None else [V.T @ G @ V for G in prepared])
    else:
        M = rule.merge(matrices, shares, generator)
    return at.factorize(M, rank, rule.energy), None


def _of_factors(
    changes: Sequence[Change],
    weights: Sequence[float],
    rule: Rule,
    rank: int | None,
    generator: torch.Generator,
    site: str,
) -> tuple[Factorization, float]:
    """The rule on the A_i and on the B_i, each with the root of w_i (or with w_i), and of s_i: PEFT has s_i in the
    weights, and for rules that divide by weights it must be in the matrices."""
    check_ranks(site, changes)
    peft = rule.convention == "peft"
    inner = [1.0 if peft else change.scale**0.5 for change in changes]
    if rule.weighs_factors:
        signed = roots = list(weights)
        weights = [weight**2 for weight in weights]
    else:
        roots = [abs(w * (change.scale if peft else 1.0)) ** 0.5 for w, change in zip(weights, changes, strict=True)]
        signed = [-root if weight < 0 else root for root, weight in zip(roots, weights, strict=True)]
    A = rule.merge(
        [inside * change.A.double() for inside, change in zip(inner, changes, strict=True)], signed, generator
    )
    B = rule.merge(
        [inside * change.B.double() for inside, change in zip(inner, changes, strict=True)], roots, generator
    )
    summed = [Change(A, B, -weight * scale) for weight, (A, B, scale) in zip(weights, changes, strict=True)]
    size, apart = norm_of_sum([Change(A, B)]), norm_of_sum([Change(A, B), *summed])
    cross = apart / size if size else 0.0
    if rank is None or rank >= len(A):
        return Factorization(B, A, 0.0), cross
    Q, R = torch.linalg.qr(B)
    P, L = torch.linalg.qr(A.T)
    X, Y, error = factorize(R @ L.T, rank)
    return Factorization(Q @ X, Y @ P.T, error), cross


def check_ranks(site: str, changes: Sequence[Change]) -> None:
    """Raise AdapterError where factors have no sum."""
    ranks = [len(change.A) for change in changes]
    if len(set(ranks)) > 1:
        raise AdapterError(
            f"{site}: ranks {', '.join(map(str, ranks))}: factors of different ranks have no sum. Use space core",
            code="ranks-differ",
        )


def norm_of_sum(changes: Sequence[Change]) -> float:
    """||sum_i D_i||, Frobenius, without a matrix of the layer's size."""
    A = torch.cat([change.A.double() for change in changes])
    B = torch.cat([change.scale * change.B.double() for change in changes], dim=1)
    return float((torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T).norm())


# What is asked for ------------------------------------------------------------------------------------------------


def read_adapters(adapters: Sequence[Adapter | str | Path]) -> list[Adapter]:
    return [each if isinstance(each, Adapter) else Adapter.read(each) for each in adapters]


def loaded(model_or_base: nn.Module | str) -> nn.Module:
    return load_base(model_or_base).model if isinstance(model_or_base, str) else model_or_base


def config_named(name: str) -> RuleConfig:
    """The defaults of a rule. Raises RecipeError for an unknown name."""
    if name in ("knots", "ctm"):
        raise RecipeError(
            f"{name} is a space, not a rule, and every rule works in it: choose a rule, and set space to {name}",
            code="unknown-composer",
        )
    if name not in COMPOSERS:
        raise RecipeError(f"unknown composition rule {name!r}. {nearest(name, COMPOSERS)}", code="unknown-composer")
    return COMPOSERS[name].config(name=name)


def _rule(config: RuleConfig, space: Space | None, convention: Convention | None) -> Rule:
    kind = COMPOSERS[config.name].rule
    for what, given, known in (("space", space, kind.spaces), ("convention", convention, kind.conventions)):
        if given is not None and given not in known:
            raise RecipeError(
                f"{config.name} has no {what} {given!r}, only {', '.join(known)}", code="conflicting-settings"
            )
    return kind(config, convention)


def _weights_of(rule: Rule, weights: Weights | None, count: int) -> dict[str, list[float]]:
    """Site, or EVERYWHERE -> a weight for each adapter."""
    if not count:
        raise RecipeError("there is no adapter to compose: name two or more", code="missing-option")
    if isinstance(weights, Mapping):
        return {site: _checked_weights(rule, own, count) for site, own in weights.items()}
    return {EVERYWHERE: _checked_weights(rule, [1.0] * count if weights is None else weights, count)}


def _check_sites(shares: Mapping[str, list[float]], sites: Sequence[str]) -> None:
    """Raise RecipeError for weights by site that are not those of `sites`."""
    if EVERYWHERE in shares:
        return
    if lacking := [site for site in sites if site not in shares]:
        raise RecipeError(
            f"{lacking[0]} has no weights, and an adapter changes it: give weights for each layer, or one for each "
            "adapter",
            code="unusable-weights",
        )
    if unknown := [site for site in shares if site not in sites]:
        raise RecipeError(
            f"weights for {unknown[0]}, which no adapter changes. {nearest(unknown[0], sites)}", code="unusable-weights"
        )


def _checked_weights(rule: Rule, given: Sequence[float], count: int) -> list[float]:
    """A finite weight for each adapter; shares of one whole where the rule wants these."""
    name = rule.config.name
    weights = [float(weight) for weight in given]
    if len(weights) != count:
        raise RecipeError(f"{len(weights)} weights for {count} adapters: give one for each", code="unusable-weights")
    if not all(abs(weight) < float("inf") for weight in weights) or not any(weights):
        raise RecipeError(f"weights {weights}: they must be finite, and not all 0", code="unusable-weights")
    if rule.relative and min(weights) < 0:
        raise RecipeError(
            f"{name} takes weights as shares of one whole, and {min(weights):g} is below 0. Negative weights have a "
            "meaning for linear and ties",
            code="unusable-weights",
        )
    used = len(weights) - weights.count(0.0)
    if rule.most is not None and used > rule.most:
        raise RecipeError(
            f"{name} is for {rule.most} adapters, and here are {used}: use karcher", code="too-many-adapters"
        )
    return [weight / sum(weights) for weight in weights] if rule.relative else weights


def _check_moments(rule: Rule, moments: Sequence[Moments] | None, count: int) -> None:
    name = rule.config.name
    if not isinstance(rule, MomentRule):
        if moments is not None:
            raise RecipeError(f"{name} takes no moments: leave them out, or use regmean", code="conflicting-settings")
    elif moments is None and not rule.needs_moments:
        return
    elif moments is None:
        raise RecipeError(
            f"{name} needs the second moments of each adapter's inputs, which come from its rows and are given in "
            "Python alone: compose(..., moments=[...]). Without rows, use wudi",
            code="missing-moments",
        )
    elif len(moments) != count:
        raise RecipeError(f"{len(moments)} moments for {count} adapters: give one for each", code="missing-moments")


def _moment(moments: Moments, site: str, d_in: int) -> Tensor:
    if isinstance(moments, Mapping) and site not in moments:
        raise RecipeError(
            f"{site} has no second moment, and an adapter changes it. {nearest(site, moments)}", code="missing-moments"
        )
    G = moments[site] if isinstance(moments, Mapping) else moments(site)
    if G.shape != (d_in, d_in):
        raise RecipeError(
            f"{site}: the second moment is {list(G.shape)}, and for {d_in} inputs it must be [{d_in}, {d_in}]",
            code="unusable-moments",
        )
    return G


def _check_rank(config: RuleConfig, rule: Rule, space: Space, rank: int | None) -> None:
    if rank is not None:
        return
    if space == "ctm" or (space == "product" and rule.energy == 1):
        why = "the dimension of the common subspace" if space == "ctm" else "a rule makes matrices of full rank there"
        raise RecipeError(f"space {space} needs a rank ({why}): --rank 32", code="missing-option")
    if config.name == "svd" and rule.energy == 1:
        raise RecipeError("svd needs a rank or an energy: --rank 32, or --set energy=0.99", code="missing-option")


def check_one_base(adapters: Sequence[Adapter]) -> None:
    """Raise BaseModelError where two adapters that know their base were trained on different ones."""
    known = [(adapter, adapter.base) for adapter in adapters if adapter.base is not None]
    for adapter, base in known[1:]:
        first, other = known[0]
        if what := difference(base, Fingerprint(dict(other["tensors"]), dict(other["config"]))):
            raise BaseModelError(
                f"{first.where} was trained on {other['name']!r} ({other['digest'][:19]}), {adapter.where} on "
                f"{base['name']!r} ({base['digest'][:19]}): {what}. Only adapters of one base can be composed",
                code="other-base",
            )


# The result -------------------------------------------------------------------------------------------------------


def in_order(model: nn.Module, each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sites of all, in the order of the model."""
    wanted = {site for changes in each for site in changes}
    return [name for name, _ in model.named_modules() if name in wanted]


def lora_with(model: nn.Module, found: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
    """A LoRA with these factors and scale 1, with the record of the model's base."""
    if not found:
        raise RecipeError("all weights of the adapters that change a layer are 0", code="unusable-weights")
    ranks = Counter(len(A) for A, _ in found.values())
    r = ranks.most_common(1)[0][0]
    patterns = {re.escape(s): {"r": len(A), "alpha": float(len(A))} for s, (A, _) in found.items() if len(A) != r}
    targets = target_modules(model, found)
    config = LoraConfig(
        r=r, alpha=float(r), targets=targets if isinstance(targets, str) else tuple(targets), patterns=patterns
    )
    attach(model, config, name=NAME, start=False)
    try:
        for name, site, delta in deltas_by_site(model):
            if name == NAME:
                delta.A.data, delta.B.data = (t.contiguous() for t in found[site])
        made = adapter_of(model, NAME)
        return replace(made, tensors={key: t.detach() for key, t in made.tensors.items()}, position=0)
    finally:
        detach(model, NAME)


def common_chat(members: Sequence[Adapter]) -> ChatRecord | None:
    """How all adapters are asked; None where they have different chat templates."""
    first = members[0].chat
    same = all((each.chat.digest, each.chat.template) == (first.digest, first.template) for each in members)
    return first if same else None


def with_chat(made: Adapter, members: Sequence[Adapter]) -> tuple[Adapter, list[str]]:
    """The result with the tokenizer and the chat template of the adapters, where these are the same, and notes."""
    notes = []
    first = members[0]
    if all(each.tokenizer_files == first.tokenizer_files for each in members):
        made = replace(made, tokenizer_files=first.tokenizer_files)
    else:
        notes.append("the adapters have different tokenizer files: the result has none, and asks with the base's")
    chat = common_chat(members)
    made = replace(made, chat=chat or NO_CHAT)
    if chat is None:
        notes.append("the adapters have different chat templates: the result has none, and asks with the base's")
    if heads := [str(each.where) for each in members if each.heads]:
        notes.append(f"tensors beside the deltas (heads) are not composed: {', '.join(heads)}")
    return made, notes
