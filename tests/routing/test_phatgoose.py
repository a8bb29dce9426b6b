"""PHATGOOSE: gates learn as by hand, alone, once for each adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graftlm.data.batches.pack import batches
from graftlm.model.registry import attachment
from graftlm.routing.fit import WARMUP
from graftlm.routing.routers.phatgoose import Phatgoose, PhatgooseConfig, read_gates
from graftlm.routing.routing import Routing
from tests.errors import raises
from tests.generation.adapters import base
from tests.routing.libraries import SITES, TOKENIZER, pool_of, random_library


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name in ("a", "b"):
        file = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"prompt": f"{name} {n}", "completion": f"{name} is {n}"}) for n in range(6)]
        file.write_text("\n".join(lines) + "\n")
        found[name] = str(file)
    return found


def learnt(routing: Routing) -> Any:
    router = routing._now().router
    assert isinstance(router, Phatgoose)
    return router.gates_of


def by_hand(factors: Any, examples: Any, steps: int, rate: float, batch_rows: int) -> dict[str, torch.Tensor]:
    """The gates of an adapter, learnt through hooks on a plain base."""
    model, v = base(), {site: torch.zeros(A.shape[1], requires_grad=True) for site, (A, _) in factors.items()}
    for site, (A, B) in factors.items():
        model.get_submodule(site).register_forward_hook(
            lambda _, args, y, site=site, A=A, B=B: (
                y + torch.sigmoid(args[0] @ v[site])[..., None] * (args[0] @ A.T @ B.T)
            )
        )
    optimizer = torch.optim.AdamW(v.values(), lr=rate, weight_decay=0)
    for step, chosen in enumerate(batches(len(examples), batch_rows, steps, 0)):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / max(1, WARMUP * steps))
        optimizer.zero_grad()
        total, count = torch.zeros(()), 0.0
        for row in chosen:
            ids = torch.from_numpy(examples[row].ids.astype("int64"))
            w = torch.from_numpy(examples[row].weights[1:])
            lp = model(ids[None]).logits[0, :-1].log_softmax(1)
            total, count = total - (w * lp[torch.arange(len(w)), ids[1:]]).sum(), count + float(w.sum())
        (total / count).backward()
        optimizer.step()
    return {site: each.detach() for site, each in v.items()}


def test_gates_learn_as_by_hand_and_alone(tmp_path: Path, rows: dict[str, str]) -> None:
    library = random_library("a", "b")
    pool = pool_of(library, tmp_path / "library")
    config = PhatgooseConfig(rows=rows, steps=5, batch_rows=2, learning_rate=0.01)
    routing = Routing(pool, TOKENIZER, config)
    assert list(attachment(pool.model).factors) == [routing.mixture.delta]  # type: ignore[union-attr]
    for name in library:
        examples = routing.library.examples(name, rows, 200, 0)
        wanted = by_hand(library[name], examples, 5, 0.01, 2)
        for site in SITES:
            assert float(wanted[site].abs().max()) > 0.01
            assert torch.allclose(learnt(routing)[name][site], wanted[site], atol=2e-4), (name, site)
    assert all(p.grad is None for p in pool.model.parameters())


def test_gates_are_kept_in_a_file_by_the_fingerprint_of_their_adapter(tmp_path: Path, rows: dict[str, str]) -> None:
    library, file = random_library("a", "b"), tmp_path / "gates.safetensors"
    config = PhatgooseConfig(rows=rows, steps=2, gates=str(file))
    first = Routing(pool_of({"a": library["a"]}, tmp_path / "library"), TOKENIZER, config)
    second = Routing(pool_of({"b": library["b"]}, tmp_path / "library"), TOKENIZER, config)
    assert len(read_gates(file)) == 2, "those of other adapters stay"
    without_rows = PhatgooseConfig(gates=str(file))
    both = Routing(pool_of(library, tmp_path / "library"), TOKENIZER, without_rows)
    for name, routing in {"a": first, "b": second}.items():
        for site in SITES:
            assert torch.equal(learnt(both)[name][site], learnt(routing)[name][site])
    other = pool_of({"a": random_library("b", seed=9)["b"]}, tmp_path / "other")
    with raises("recipe/no-rows-for-router", "'a'"):
        Routing(other, TOKENIZER, without_rows)
    file.write_bytes(b"none")
    with raises("recipe/unreadable-gates"):
        Routing(other, TOKENIZER, without_rows)


def test_a_gate_finds_inputs_that_are_like_it() -> None:
    """Vectors of the rows of each adapter around a direction of its own, which its v has."""
    torch.manual_seed(0)
    directions = F.layer_norm(torch.linalg.qr(torch.randn(32, 32)).Q[:6], (32,))
    router = Phatgoose(PhatgooseConfig(top_k=1))
    names = tuple("abcdef")
    router.gates_of = {name: {"site": v} for name, v in zip(names, directions, strict=True)}
    from graftlm.model.routed import Experts

    experts, mine = Experts(names, torch.zeros(6, 1, 32), torch.zeros(6, 3, 1)), torch.arange(6).repeat_interleave(20)
    x = 3 * directions[mine] + 0.3 * torch.randn(120, 32)
    assert torch.equal(router.gates("site", experts)(x, torch.zeros(120, 6, 1)).argmax(1), mine)
