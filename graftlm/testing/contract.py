"""The contract of a method, as functions.

`check_method(name)` runs the whole contract over one row of METHODS; `tests/test_contract.py` runs each of its clauses
by name. A clause sees a method only through the interface, so a new method is tested without a new test.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import why_not_peft
from graftlm.adapters.save import save_adapter
from graftlm.data.batches.pack import Example, collate
from graftlm.deltas import METHODS
from graftlm.deltas.base import AdditiveDelta, Delta, Site, WeightDelta
from graftlm.model.attach import attach, detach
from graftlm.model.hosts import CACHE_NAMES, Host, LayerHost
from graftlm.model.modes import activate, by_row, deltas_off
from graftlm.model.registry import hosts, shared_of, trainable
from graftlm.model.state_dict import merged_state
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.recompute import recomputed_layers
from graftlm.plugins import load_plugins
from graftlm.testing.deltas import (
    attach_tiny,
    close,
    ids,
    load_merged_state,
    logits,
    move,
    perturbed,
    plain_with,
    tiny_config,
)
from graftlm.testing.tiny import tiny_gpt2, tiny_model


def identity_at_start(name: str) -> None:
    model = tiny_model()
    before = logits(model)
    attach_tiny(name, model)
    if METHODS[name].delta.starts_away:
        assert not torch.allclose(logits(model), before), "starts_away says that the fresh delta changes the model"
        return
    close(logits(model), before, "the model with a fresh delta against its base")


def off_is_the_base(name: str) -> None:
    model = tiny_model()
    before = logits(model)
    perturbed(name, model)
    assert not torch.equal(logits(model), before), "a delta away from its start must change the logits"
    with deltas_off(model):
        assert torch.equal(logits(model), before), "with deltas off, logits must be the base's bit for bit"
    assert not torch.equal(logits(model), before), "after deltas_off, the delta must be on again"


def only_the_delta_learns(name: str) -> None:
    model = tiny_model()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    perturbed(name, model)
    before = {key: p.detach().clone() for key, p in trainable(model).items()}
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    model(ids()).logits.float().log_softmax(-1)[..., 0].sum().backward()
    for key, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{key} got no gradient"
        assert bool(parameter.grad.any()), f"{key} got a gradient of zero"
    optimizer.step()
    for key, parameter in trainable(model).items():
        assert not torch.equal(parameter, before[key]), f"{key} did not move"
    detach(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[key]), f"{key} of the base was changed"


def fast_path_is_the_equation(name: str) -> None:
    """Outputs and all gradients of the model as it runs, against W' and b' applied by plain autograd."""
    fast, plain = perturbed(name, tiny_model()), perturbed(name, tiny_model())
    for host in hosts(plain).values():
        if isinstance(host, LayerHost):
            object.__setattr__(host, "forward", _by_the_equation(host))
    outputs = []
    for model in (fast, plain):
        out = model(ids()).logits
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        outputs.append(out.detach())
    close(outputs[0], outputs[1], "logits of the fast path against the equation")
    for (key, ours), reference in zip(trainable(fast).items(), trainable(plain).values(), strict=True):
        assert ours.grad is not None
        assert reference.grad is not None
        close(ours.grad, reference.grad, f"gradient of {key} on the fast path against the equation")


def _by_the_equation(host: Host) -> Callable[[Tensor], Tensor]:
    assert isinstance(host, LayerHost)

    def forward(x: Tensor) -> Tensor:
        (delta,) = host.on()
        if isinstance(delta, WeightDelta):
            return host.view.apply(x, *host.effective())
        y: Tensor = delta(x, host.view(x), host.view)
        return y

    return forward


def merged_is_the_model(name: str) -> None:
    if not METHODS[name].mergeable:
        assert METHODS[name].delta.not_mergeable, "a method that cannot be merged must say why (not_mergeable)"
        return
    model = perturbed(name, tiny_model())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    reference, state = logits(model), merged_state(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "merging changed it"
    close(logits(plain_with(state)), reference, "the merged model against the model with its delta")


def save_load_save_is_stable(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = perturbed(name, tiny_model(tie_word_embeddings=False))
        layout = METHODS[name].delta.peft
        if layout is not None and layout.mark is None:  # with a mark, the layout is that of some configs alone
            reason = why_not_peft(model)
            assert not reason, f"the method has a PEFT layout, but {reason}"
        save_adapter(model, f"{folder}/a")
        other = tiny_model(tie_word_embeddings=False)
        load_adapter(other, f"{folder}/a")
        assert torch.equal(logits(other), logits(model)), "a loaded adapter must compute the same bits"
        save_adapter(other, f"{folder}/b")
        first, second = (Path(folder, n, "adapter_model.safetensors").read_bytes() for n in "ab")
        assert first == second, "save, load, save must give the same bytes"


def detach_returns_the_very_modules(name: str) -> None:
    model = tiny_model()
    modules, before = dict(model.named_modules()), logits(model)
    attach_tiny(name, model)
    detach(model)
    after = dict(model.named_modules())
    assert modules.keys() == after.keys(), "detach must leave no module behind"
    assert all(modules[key] is after[key] for key in modules), "detach must put back the very modules"
    assert torch.equal(logits(model), before)


def same_seed_same_start(name: str) -> None:
    """Everything that a fresh delta holds, frozen or not; and another seed matters wherever anything is drawn."""
    starts: list[Mapping[str, Tensor]] = []
    draws = 0
    generator = Site.generator

    def counted(site: Site) -> torch.Generator:
        nonlocal draws
        draws += 1
        return generator(site)

    for seed in (7, 7, 8):
        model = tiny_model()
        with patch.object(Site, "generator", counted):
            attach_tiny(name, model, seed=seed)
        everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        starts.append({key: tensor for key, tensor in everything.items() if "graft_shared" in key or "deltas" in key})
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0]), (
        "the same seed must give the same start"
    )
    if draws:
        assert any(not torch.equal(starts[0][key], starts[2][key]) for key in starts[0]), "another seed, another start"


def parameters_are_as_declared(name: str) -> None:
    model = attach_tiny(name, tiny_model())
    shapes = set()
    for site, host in hosts(model).items():
        for delta in host.on():
            values = facts_of(delta)
            shapes.add((delta.site.d_in, delta.site.d_out))
            counted = sum(p.numel() for p in delta.parameters() if p.requires_grad)
            declared = evaluate(delta.formula, values)
            assert counted == declared, f"{site}: {counted} trainable parameters, {delta.formula} says {declared}"
    shared = shared_of(model, "default")
    counted = sum(p.numel() for p in shared.parameters() if p.requires_grad) if shared is not None else 0
    values |= {"shapes": shapes, "sizes": getattr(shared, "sizes", ())}
    declared = evaluate(METHODS[name].delta.shared_formula, values)
    assert counted == declared, f"shared: {counted} trainable parameters, shared_formula says {declared}"


def facts_of(delta: Delta) -> dict[str, Any]:
    """What a formula may speak of: the config's fields and the site's sizes."""
    values = {f.name: getattr(delta.config, f.name) for f in fields(delta.config)}
    values |= {key: value for key, value in vars(delta).items() if isinstance(value, bool | int)}
    layers, groups, size = delta.site.heads or (0, 0, 0)
    site = {key: getattr(delta.site, key) for key in ("d_in", "d_out", "has_bias", "kind", "name")}
    return values | site | {"layers": layers, "kv_heads": groups, "head_dim": size}


def evaluate(formula: str, values: Mapping[str, Any]) -> int:
    """The number that a formula of a method's class means."""
    allowed = {"__builtins__": {}, "int": int, "min": min, "max": max, "sum": sum, "len": len}
    return int(eval(formula, allowed | dict(values)))  # noqa: S307 (a literal of the method's class)


def factors_are_the_matrix(name: str) -> None:
    model = perturbed(name, tiny_model())
    for site, host in hosts(model).items():
        for delta in host.on():
            if isinstance(delta, AdditiveDelta) and isinstance(host, LayerHost) and host.view.kind == "linear":
                x = torch.randn(5, delta.site.d_in, generator=torch.Generator().manual_seed(2))
                matrix = delta.matrix()
                assert matrix.shape == (delta.site.d_out, delta.site.d_in), f"{site}: matrix() has shape {matrix.shape}"
                close(delta.increment(x, host.view), x @ matrix.T, f"{site}: increment() against matrix()")
                if (factors := delta.factors()) is not None:
                    close(factors[1] @ factors[0], matrix, f"{site}: B A against matrix()")


class OneLayer(nn.Module):
    """The smallest model that a mergeable delta can sit on: one linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 48)
        self.norm = nn.LayerNorm(48)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        return y


def pairs_with(name: str) -> list[str]:
    """The methods that can share a layer with this one, and be merged: none where it cannot itself."""
    able = [each for each, m in METHODS.items() if m.mergeable and set(m.delta.kinds) & {"linear", "norm"}]
    return able if name in able else []


def two_deltas_compose(name: str) -> None:
    """With one method of each sort as a second delta beside it. Neighbors in the table get different ones.

    All pairs, whose number is the square of the number of methods: `two_deltas_compose_as`.
    """
    able, sorts = pairs_with(name), dict[Any, list[str]]()
    for other in able:
        sorts.setdefault(sort_of(other), []).append(other)
    for members in sorts.values():
        two_deltas_compose_as(name, members[able.index(name) % len(members)])


def sort_of(name: str) -> tuple[str, bool, bool]:
    """What decides how a method composes: its family, whether it adds to W, whether it sits on linear layers."""
    delta = METHODS[name].delta
    return delta.family, issubclass(delta, AdditiveDelta), "linear" in delta.kinds


def two_deltas_compose_as(name: str, other: str) -> None:
    """Two deltas on one layer: forward = merged, and the first is itself after the second was detached."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    model = OneLayer()
    for number, each in enumerate((name, other)):
        kinds = METHODS[each].delta.kinds
        config = tiny_config(each, targets=("layer",) if "linear" in kinds else ("norm",), init="zero")
        attach(model, config, name=f"d{number}", start=not METHODS[each].delta.needs)
        move(model, scale=0.1, seed=number)
    with torch.no_grad():
        both = model(x)
        plain = OneLayer()
        plain.load_state_dict(merged_state(model))
        close(plain(x), both, f"{name} and {other} merged against both on")
        activate(model, "d0")
        alone = model(x)
        detach(model, "d1")
        assert torch.equal(model(x), alone), f"{name} must be itself after {other} was taken off again"


def rows_of_a_batch(name: str) -> None:
    """Each row of a batch with its own deltas computes what it computes in a batch of its own."""
    model = attach_tiny(name, perturbed("lora", tiny_model()), delta="other")
    move(model, seed=3)
    rows: list[tuple[str, ...]] = [("other",), (), ("default",), ("other", "default"), ("other",)]
    batch = ids(rows=len(rows))
    with torch.no_grad():
        with by_row(model, rows):
            together = model(batch).logits
        for number, names in enumerate(rows):
            activate(model, *names)
            alone = model(batch[number : number + 1]).logits
            close(together[number : number + 1], alone, f"row {number} with {names or 'the bare base'}")


def packed_is_unpacked(name: str) -> None:
    """Rows in one packed pass, two with their beginning in common, are what each is alone, deltas on."""
    model = perturbed(name, tiny_model())
    rows = [ids(seed=n, rows=1, length=length)[0] for n, length in enumerate((5, 14, 3))]
    rows.append(torch.cat([rows[1][:9], rows[0]]))
    weights = [np.linspace(1, 2, len(row), dtype=np.float32) * (np.arange(len(row)) > 0) for row in rows]
    examples = [Example(row.int().numpy(), weight, "") for row, weight in zip(rows, weights, strict=True)]
    apart, shared = collate(examples), collate(examples, share=True)
    assert shared.ids.numel() < apart.ids.numel()
    with torch.no_grad():
        with packed_attention(model):
            found, found_shared = log_probs(model, apart), log_probs(model, shared)
        alone = [model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0] for row in rows]
    reference = torch.cat(alone)
    close(found, reference, "log-probabilities of packed rows against the rows alone")
    loss = (reference * torch.from_numpy(np.concatenate([w[1:] for w in weights]))).sum()
    close((found_shared * shared.weights).sum(), loss, "the loss of rows that share a beginning against the rows alone")


def generating_is_forward(name: str) -> None:
    """With a cache, token by token, the logits are those of one pass over the whole row."""
    model = perturbed(name, tiny_model())
    row = ids(rows=1, length=7)
    with torch.no_grad():
        whole = model(row).logits
        (argument,) = (name for name in CACHE_NAMES if name in signature(model.forward).parameters)
        cache = {argument: DynamicCache(config=model.config)}  # the model appends to it in place
        pieces = [model(piece, use_cache=True, **cache).logits for piece in (row[:, :4], *row[:, 4:].split(1, dim=1))]
    close(torch.cat(pieces, dim=1), whole, "logits with a cache against one pass", tolerance=1e-4)


def other_kinds_of_layer(name: str) -> None:
    """Conv1D, which stores W transposed, and embeddings, whose x are ids, where the method has a meaning there."""
    if "linear" in METHODS[name].delta.kinds:
        model = perturbed(name, tiny_gpt2())
        if METHODS[name].mergeable:
            plain = load_merged_state(merged_state(model), tiny_gpt2(seed=5))
            close(logits(plain), logits(model), "GPT-2 merged against GPT-2 with its delta")
    if "embedding" in METHODS[name].delta.kinds:
        model = tiny_model(tie_word_embeddings=False)
        before = logits(model)
        perturbed(name, model, targets=("embed_tokens",))
        assert not torch.equal(logits(model), before), "a delta on the embeddings must change the logits"
        plain = load_merged_state(merged_state(model), tiny_model(seed=5, tie_word_embeddings=False))
        close(logits(plain), logits(model), "merged embeddings against embeddings with their delta")


def bf16_base(name: str) -> None:
    """On a bf16 base trainable tensors stay float32, and outputs agree with float32 to bf16's precision."""
    reference = logits(perturbed(name, tiny_model()))
    model = perturbed(name, tiny_model().bfloat16())
    assert all(p.dtype == torch.float32 for p in trainable(model).values()), "trainable tensors must be float32"
    out = model(ids()).logits
    assert out.dtype == torch.bfloat16, f"a bf16 base must compute in bf16, this is {out.dtype}"
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable(model).values())
    close(out.detach().float(), reference, "logits on a bf16 base against float32", tolerance=0.05)


def checkpointing_changes_nothing(name: str) -> None:
    """Neither our own, as in a run, nor transformers', for whoever trains with their loop."""
    gradients = []
    for whose in ("nobody's", "ours", "transformers'"):
        model = perturbed(name, tiny_model())
        model.train()
        model.config.use_cache = False
        torch.manual_seed(0)  # a method may draw while it trains
        if whose == "transformers'":
            name = "activation_checkpointing_enable"  # from transformers 5.23 on
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
        with recomputed_layers(model) if whose == "ours" else nullcontext():
            model(ids()).logits.square().sum().backward()
        gradients.append([p.grad for p in trainable(model).values()])
    for found in gradients[1:]:
        for ours, reference in zip(found, gradients[0], strict=True):
            assert ours is not None
            assert reference is not None
            close(ours, reference, "gradient under checkpointing")


CONTRACT: dict[str, Callable[[str], None]] = {
    clause.__name__: clause
    for clause in (
        identity_at_start,
        off_is_the_base,
        only_the_delta_learns,
        fast_path_is_the_equation,
        merged_is_the_model,
        save_load_save_is_stable,
        detach_returns_the_very_modules,
        same_seed_same_start,
        parameters_are_as_declared,
        factors_are_the_matrix,
        two_deltas_compose,
        rows_of_a_batch,
        packed_is_unpacked,
        generating_is_forward,
        other_kinds_of_layer,
        bf16_base,
        checkpointing_changes_nothing,
    )
}


def check_method(name: str) -> None:
    """Run every clause of the contract on one method of METHODS; raises AssertionError with the clause's name."""
    load_plugins("graftlm.methods")
    for title, clause in CONTRACT.items():
        try:
            clause(name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {title}: {error}") from None
        except Exception as error:  # whatever else a method breaks, its author is told in which clause
            raise AssertionError(f"{name}: {title}: {type(error).__name__}: {error}") from error
