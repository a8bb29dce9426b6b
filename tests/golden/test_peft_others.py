"""The orthogonal methods (oft, boft, hra), the products (loha, lokr) and randlora, shira, adalora, against PEFT.

Outputs, gradients and both ways through the disk are PEFT's to check. What PEFT has not, or has otherwise than the
papers (penalties, starts, ranks), is checked below against the papers' equations, written out plainly.
"""

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from peft.tuners.lokr.layer import factorization
from torch import Tensor

from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import why_not_peft
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lokr import _left
from graftlm.model.attach import attach
from graftlm.model.registry import hosts, penalty
from graftlm.model.state_dict import merged_state
from graftlm.testing.deltas import attach_tiny, close, logits, perturbed, tiny_config
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises
from tests.golden.check import LINEAR, against_peft, against_reference

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ON: dict[str, Any] = {"target_modules": LINEAR, **LM}
CASES: dict[str, tuple[str, Any]] = {
    "oft": ("oft", peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, **ON)),
    "oft by the series": ("oft", peft.OFTConfig(oft_block_size=8, **ON)),
    "oft with blocks that do not fit": ("oft", peft.OFTConfig(oft_block_size=20, use_cayley_neumann=False, **ON)),
    "oft by the number of blocks": ("oft", peft.OFTConfig(r=5, oft_block_size=0, use_cayley_neumann=False, **ON)),
    "oft with one block for all": ("oft", peft.OFTConfig(oft_block_size=8, block_share=True, **ON)),
    "boft with one factor": ("boft", peft.BOFTConfig(boft_block_size=8, **ON)),
    "boft": ("boft", peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **ON)),
    "boft with three factors": ("boft", peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, **ON)),
    "loha": ("loha", peft.LoHaConfig(r=4, alpha=6, **ON)),
    "loha of full rank": ("loha", peft.LoHaConfig(r=8, alpha=6, **ON)),
    "loha with patterns": (
        "loha",
        peft.LoHaConfig(r=2, alpha=6, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 1}, **ON),
    ),
    "lokr": ("lokr", peft.LoKrConfig(r=8, alpha=6, **ON)),
    "lokr of low rank": ("lokr", peft.LoKrConfig(r=2, alpha=6, decompose_factor=2, **ON)),
    "lokr of low rank on both sides": ("lokr", peft.LoKrConfig(r=1, alpha=6, decompose_both=True, **ON)),
    "lokr with patterns": (
        "lokr",
        peft.LoKrConfig(r=2, alpha=6, decompose_factor=8, rank_pattern={"up_proj": 1}, **ON),
    ),
    "hra": ("hra", peft.HRAConfig(r=4, **ON)),
    "hra with an odd number": ("hra", peft.HRAConfig(r=5, **ON)),
    "shira": ("shira", peft.ShiraConfig(r=3, **ON)),
    "adalora": ("adalora", peft.AdaLoraConfig(init_r=6, lora_alpha=7, total_step=10, **ON)),
}


@pytest.fixture(autouse=True)
def _butterflies_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's BOFT has more than one factor only with its CUDA kernel; here its place is taken by the same in torch."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*each) for each in blocks])

    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", BlockDiagonal)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_against_peft(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    against_peft(name, config, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_on_gpt2_against_peft(tmp_path: Path) -> None:
    """Of these methods PEFT has AdaLoRA and RandLoRA (below) on GPT-2's transposed layers."""
    config = peft.AdaLoraConfig(
        init_r=6, total_step=10, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, **LM
    )
    against_peft("adalora", config, tmp_path, base=tiny_gpt2)


# RandLoRA: PEFT repeats the shared bases at every layer of its file --------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [tiny_model, tiny_gpt2])
def test_randlora_against_peft(base: Any, tmp_path: Path) -> None:
    on = {"target_modules": LINEAR} if base is tiny_model else {"target_modules": ["c_attn", "c_fc", "c_proj"]}
    against_peft("randlora", peft.RandLoraConfig(r=5, randlora_alpha=7, **on, **LM), tmp_path, base=base)


@pytest.mark.filterwarnings("ignore")
def test_adalora_as_peft_writes_it_after_pruning(tmp_path: Path) -> None:
    """PEFT's file has no trace of pruned triplets but a list of which were kept."""
    theirs = peft.get_peft_model(tiny_model(), peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, **ON)).eval()
    generator = torch.Generator().manual_seed(3)
    masks: dict[str, list[bool]] = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.normal_(generator=generator)
            if ".lora_E" in name:
                mask = torch.rand(4, generator=generator) < 0.6
                parameter[~mask] = 0
                masks[name] = mask.tolist()
    prefix = "base_model.model."
    theirs.peft_config["default"].rank_pattern = {key.removeprefix(prefix): mask for key, mask in masks.items()}
    theirs.save_pretrained(tmp_path)
    ours = tiny_model()
    load_adapter(ours, tmp_path)
    close(logits(ours), logits(theirs), "pruned AdaLoRA")
    assert any(not all(mask) for mask in masks.values())


def test_randlora_is_the_sum_of_the_paper() -> None:
    """sum_j B_j L_j A G_j, with the columns of the B_j numbered as they are used, and of full rank."""

    def reference(t: Any, W: Tensor, b: Any, x: Tensor, delta: Any) -> Tensor:
        small, large = min(W.shape), max(W.shape)
        r, n = t["l"].shape
        columns = [t["shared.B"][:large, k // r, k % r] for k in range(r * n)]
        total = torch.zeros(large, small)
        for j in range(n):
            B_j = torch.stack([columns[i * n + j] for i in range(r)], dim=1)
            total = total + B_j @ torch.diag(t["l"][:, j]) @ t["shared.A"][:, 0, :small] @ torch.diag(t["g"][j])
        return x @ (W + 6 / 4 * (total if W.shape[1] == small else total.T)).T

    against_reference("randlora", reference)
    for host in hosts(perturbed("randlora", tiny_model())).values():
        (delta,) = host.on()
        assert torch.linalg.matrix_rank(delta.matrix(), rtol=1e-6) == min(delta.site.d_in, delta.site.d_out)


def test_randlora_is_the_same_for_few_tokens_and_for_many() -> None:
    host = hosts(perturbed("randlora", tiny_model()))["model.layers.0.mlp.up_proj"]
    x = torch.randn(200, 32)
    with torch.no_grad():
        close(host(x), torch.cat([host(part) for part in x.split(20)]), "randlora in parts")


# Orthogonal methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oft", "boft", "hra"])
def test_angles_between_neurons_stay(name: str) -> None:
    """W' W'^T = W W^T where nothing is scaled: what the orthogonal methods are for."""
    model = perturbed(name, tiny_model())
    for host in hosts(model).values():
        (delta,) = host.on()
        if name == "boft":
            delta.s.data.fill_(1)
        W, _ = host.effective()
        base = host.view.weight
        close(W @ W.T, base @ base.T, f"{name}: inner products of neurons")
        assert (W - base).abs().max() > 1e-3 * base.abs().max()


def test_boft_with_enough_factors_is_dense() -> None:
    """BOFT(1 + log2(d / b), b) mixes every input with every other (section 4), and d = 32 needs 4 factors for b = 4."""
    for factors, dense in ((3, False), (4, True)):
        model = perturbed("boft", tiny_model(), targets=("q_proj",), block=4, factors=factors)
        (delta, *_) = next(iter(hosts(model).values())).on()
        R, _ = delta.effective(torch.eye(32), None)
        assert bool((R != 0).all()) == dense


@pytest.mark.filterwarnings("ignore")
def test_boft_in_m_products_is_boft_in_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("graftlm.deltas.boft.FAR", 0)
    against_peft("boft", peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, **ON), tmp_path)


def test_boft_refuses_sizes_that_do_not_fit() -> None:
    with raises("target/indivisible-layer", match="2 factors with blocks of 5"):
        attach_tiny("boft", tiny_model(), block=5)


def test_the_series_of_oft_is_near_the_exact_inverse() -> None:
    """Up to Q^4; PEFT keeps Q with the other sign for it."""
    x = torch.randn(7, 32)
    host = {
        n: hosts(attach_tiny("oft", tiny_model(), neumann=n))["model.layers.0.self_attn.q_proj"] for n in (False, True)
    }
    Q = 0.05 * torch.randn(host[False].on()[0].Q.shape)
    with torch.no_grad():
        host[False].on()[0].Q.copy_(-Q)
        host[True].on()[0].Q.copy_(Q)
        exact, series = host[False](x), host[True](x)
    assert 1e-6 < float((exact - series).abs().max() / exact.abs().max()) < 0.01


def test_hra_penalty_is_equation_6() -> None:
    model = perturbed("hra", tiny_model(), orthogonality=0.5)
    wanted = torch.zeros(())
    for host in hosts(model).values():
        U = host.on()[0].U
        units = [U[:, i] / U[:, i].norm() for i in range(U.shape[1])]
        for i, j in itertools.product(range(len(units)), repeat=2):
            wanted = wanted + 0.5 * (units[i] @ units[j] - float(i == j)) ** 2
    close(penalty(model), wanted, "hra: penalty")
    assert penalty(perturbed("hra", tiny_model(), orthogonality=0.0)) is None


def test_hra_starts_at_the_identity_in_half_precision_too() -> None:
    model = tiny_model().bfloat16()
    before = logits(model)
    attach_tiny("hra", model, r=8)
    assert torch.equal(logits(model), before)
    with raises("target/odd-rank"):
        attach_tiny("hra", tiny_model(), r=3)


# Products ------------------------------------------------------------------------------------------------------------


def test_loha_has_the_rank_of_proposition_1_and_starts_as_its_authors_start_it() -> None:
    delta = hosts(perturbed("loha", tiny_model(), scale=1.0, r=3))["model.layers.0.mlp.up_proj"].on()[0]
    assert torch.linalg.matrix_rank(delta.matrix()) == 9
    fresh = hosts(attach_tiny("loha", tiny_model()))["model.layers.0.mlp.up_proj"].on()[0]
    for tensor, deviation in ((fresh.A1, 1), (fresh.A2, 1), (fresh.B1, 0.1), (fresh.B2, 0)):
        assert float(tensor.detach().std()) == pytest.approx(deviation, rel=0.2)


def test_lokr_splits_sizes_as_equation_5_and_as_peft() -> None:
    for d, factor in itertools.product(range(1, 200), (-1, 2, 3, 4, 7, 8, 16)):
        u = _left(d, factor)
        assert (u, d // u) == factorization(d, factor)
        if factor > 0 and factor**2 <= d:
            assert u == max(u for u in range(1, factor + 1) if d % u == 0 and u * u <= d)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_lokr_is_one_in_peft_too(tmp_path: Path) -> None:
    """r = 0, as in the paper's experiments: both parts whole, no scale. PEFT says so by a rank above all sizes."""
    model = perturbed("lokr", tiny_model(), r=0)
    delta = hosts(model)["model.layers.0.mlp.up_proj"].on()[0]
    close(delta.matrix(), torch.kron(delta.C, delta.W2), "lokr: dW")
    save_adapter(model, tmp_path / "a")
    close(logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "a")), logits(model), "a whole lokr in PEFT")
    (tmp_path / "a" / "graftlm.json").unlink()
    again = tiny_model()
    load_adapter(again, tmp_path / "a")
    close(logits(again), logits(model), "a whole lokr from PEFT")
    at = {"patterns": {"q_proj": {"r": 1}}}
    assert "no rank 0" in why_not_peft(attach_tiny("lokr", tiny_model(), r=0, **at))
    assert not why_not_peft(attach_tiny("lokr", tiny_model(), r=2, **at))


# SHiRA and AdaLoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_shira_changes_its_places_and_no_other_weight(mask: str) -> None:
    model, base = perturbed("shira", tiny_model(), r=2, mask=mask), tiny_model().state_dict()
    merged = merged_state(model)
    for site, host in hosts(model).items():
        before = base[f"{site}.weight"]
        changed = merged[f"{site}.weight"] != before
        assert int(changed.sum()) == 2 * sum(before.shape) == host.on()[0].S.numel()
        if mask == "magnitude":
            assert before[changed].abs().min() >= before[~changed].abs().max()
        else:
            assert torch.linalg.matrix_rank(host.on()[0].matrix()) > 4  # what a LoRA with as many numbers reaches


def test_shira_refuses_more_places_than_there_are() -> None:
    with raises("target/rank-too-large", match=r"k_proj has 512 weights, r = 11 would choose 528"):
        attach_tiny("shira", tiny_model(), r=11)


def test_adalora_penalty_is_equation_4() -> None:
    model = perturbed("adalora", tiny_model(), orthogonality=0.3)
    wanted = torch.zeros(())
    for host in hosts(model).values():
        delta = host.on()[0]
        for vectors in (delta.P.T, delta.Q):
            for i, j in itertools.product(range(len(vectors)), repeat=2):
                wanted = wanted + 0.3 * ((vectors[i] * vectors[j]).sum() - float(i == j)) ** 2
    close(penalty(model), wanted, "adalora: penalty")
    assert penalty(perturbed("adalora", tiny_model(), orthogonality=0.0)) is None


def test_adalora_without_a_triplet_has_a_rank_less() -> None:
    model = tiny_model()
    attach(model, tiny_config("adalora", targets=("up_proj",)))
    delta = hosts(model)["model.layers.0.mlp.up_proj"].on()[0]
    delta.E.data.copy_(torch.tensor([[1.0], [0.0], [2.0], [3.0]]))
    plain = sum(size * torch.outer(delta.P[:, i], delta.Q[i]) for i, size in ((0, 1.0), (2, 2.0), (3, 3.0)))
    close(delta.matrix(), 6 / (4 + 1e-5) * plain, "adalora: dW")
    assert torch.linalg.matrix_rank(delta.matrix()) == 3
