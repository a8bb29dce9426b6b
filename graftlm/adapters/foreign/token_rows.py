"""Rows of some tokens in place of the base's: the delta `trainable-tokens` that they are."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from graftlm.adapters.foreign.contents import Contents
from graftlm.adapters.foreign.keys import TOKENS
from graftlm.adapters.foreign.reading import Member, Reading
from graftlm.adapters.tensors import PREFIX, widened
from graftlm.deltas import METHODS
from graftlm.deltas.trainable_tokens import TrainableTokensConfig
from graftlm.errors import AdapterError


def token_ids(reading: Reading, contents: Contents) -> dict[str, Tensor]:
    """Module -> the ids of its tokens [k]."""
    indices, found = reading.where.trainable_token_indices, dict[str, Tensor]()
    if not indices and not contents.rows:
        return found
    if not contents.rows or not indices:
        what = f"trainable_token_indices={indices!r}, and {len(contents.rows)} modules with {TOKENS}"
        raise AdapterError(f"{reading.file}: {what}: the one is nothing without the other", code="token-rows-mismatch")
    for module, one in contents.rows.items():
        ids = indices if isinstance(indices, tuple) else _by_end(indices, one.there)
        base = reading.view(module)
        if ids is None or base is None or base.kind == "norm":
            reading.problems.append(f"{one.file_key}: trainable_token_indices says nothing about {one.there}")
            continue
        count, width = (base.d_in, base.d_out) if base.kind == "embedding" else (base.d_out, base.d_in)
        if list(one.tensor.shape) != [len(ids), width]:
            needs = f"for {len(ids)} tokens this model needs {[len(ids), width]}"
            reading.problems.append(f"{one.file_key}: has shape {list(one.tensor.shape)}, {needs}")
        elif max(ids) >= count or len(set(ids)) < len(ids):
            reading.problems.append(f"trainable_token_indices: {ids} are not {len(ids)} of the {count} of {module}")
        else:
            found[module] = torch.tensor(ids)
    return found


def _by_end(indices: Mapping[str, tuple[int, ...]], module: str) -> tuple[int, ...] | None:
    return next((ids for end, ids in indices.items() if module.endswith(end)), None)


def token_rows(reading: Reading, contents: Contents, ids: Mapping[str, Tensor]) -> Member | None:
    """The delta `trainable-tokens` of the rows of these ids; a head that is tied to the embeddings has them too."""
    rows = {module: contents.rows[module].tensor for module in ids}
    ids = dict(ids)
    if len(reading.ends) == 2 and reading.tied() and reading.ends[0] in rows and reading.ends[1] not in rows:
        rows[reading.ends[1]], ids[reading.ends[1]] = rows[reading.ends[0]], ids[reading.ends[0]]
    sites = [module for module in reading.places if module in rows]
    if not sites:
        return None
    tokens = {module: tuple(ids[module].tolist()) for module in sites}
    targets = reading.targets(sites, METHODS["trainable-tokens"].delta.kinds)
    others = {re.escape(module): {"tokens": list(own)} for module, own in tokens.items() if own != tokens[sites[0]]}
    config = TrainableTokensConfig(tokens=tokens[sites[0]], targets=targets, patterns=others)
    return Member("tokens", config, None, {f"{PREFIX}{module}.T": widened(rows[module]) for module in sites})
