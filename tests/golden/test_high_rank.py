"""Changes of weights of high rank or unusual shape: MoRA, FourierFT, VB-LoRA, KaSA, Bone, GLoRA and FLoRA."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import why_not_peft
from graftlm.adapters.save import adapter_of
from graftlm.deltas.base import Site
from graftlm.deltas.bone import Bone, BoneConfig
from graftlm.deltas.flora import Flora, FloraConfig
from graftlm.deltas.fourierft import FourierFT, FourierFTConfig
from graftlm.deltas.glora import GloraConfig
from graftlm.deltas.kasa import Kasa, KasaConfig
from graftlm.deltas.mora import Mora, MoraConfig
from graftlm.deltas.vb_lora import VbLoraConfig
from graftlm.model.attach import attach
from graftlm.model.bases import LinearBase
from graftlm.model.registry import hosts, penalty, trainable
from graftlm.model.state_dict import merged_state
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move, perturbed
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises
from tests.golden import check
from tests.golden.check import LINEAR, against_peft, against_reference, pattern_comes_and_is_not_written

LM = {"task_type": "CAUSAL_LM"}
ATTENTION = LINEAR[:4]


def biased() -> Any:
    """A tiny model whose attention has biases, other than zero."""
    model = tiny_model(attention_bias=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(key)))
    return model


def site(d_in: int, d_out: int, seed: int = 3) -> Site:
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
    return Site("layer", d_in, d_out, lambda: W, seed)


PEFT_CASES: dict[str, tuple[str, Any]] = {
    "fourierft": ("fourierft", peft.FourierFTConfig(n_frequency=60, scaling=30.0, target_modules=LINEAR, **LM)),
    "fourierft from zero, with a seed": (
        "fourierft",
        peft.FourierFTConfig(n_frequency=60, random_loc_seed=5, init_weights=True, target_modules=LINEAR, **LM),
    ),
    "vb-lora": (
        "vb-lora",
        peft.VBLoRAConfig(r=4, num_vectors=12, vector_length=8, topk=3, target_modules=LINEAR, **LM),
    ),
    "bone": ("bone", peft.MissConfig(r=4, target_modules=LINEAR, **LM)),
    "bone with a last slice that is narrower": ("bone", peft.MissConfig(r=5, target_modules=LINEAR, **LM)),
    "bone, bat": ("bone", peft.MissConfig(r=4, init_weights="bat", target_modules=LINEAR, **LM)),
}


@pytest.fixture(autouse=True)
def _one_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's model names the bank by the first layer that holds it, its file by itself."""

    def named(model: Any) -> dict[str, Any]:
        return {"base_model.vblora_vector_bank" if "bank" in k else k: p for k, p in trainable(model).items()}

    monkeypatch.setattr(check, "trainable", named)


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore")
def test_against_peft(case: str, tmp_path: Path) -> None:
    name, config = PEFT_CASES[case]
    against_peft(name, config, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_on_gpt2_against_peft(tmp_path: Path) -> None:
    there = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True, **LM}
    fourier = peft.FourierFTConfig(n_frequency=60, scaling=30.0, **there)
    against_peft("fourierft", fourier, tmp_path / "fourierft", base=tiny_gpt2)
    bank = peft.VBLoRAConfig(r=4, num_vectors=12, vector_length=8, **there)
    against_peft("vb-lora", bank, tmp_path / "vb-lora", base=tiny_gpt2)


@pytest.mark.filterwarnings("ignore")
def test_a_pattern_of_frequencies_comes_from_peft_and_is_not_written_where_peft_would_not_find_it(
    tmp_path: Path,
) -> None:
    config = peft.FourierFTConfig(
        n_frequency=60, n_frequency_pattern={"q_proj": 9}, scaling=30.0, target_modules=LINEAR, **LM
    )
    pattern_comes_and_is_not_written(config, "n_frequency_pattern", tmp_path)


# MoRA ------------------------------------------------------------------------------------------------------------


def mora(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    """Element by element; a turned pair of elements is a complex number times e^(i j theta)."""
    M, (d_out, d_in) = t["M"], W.shape
    k = len(M)
    rows = []
    for row in x:
        chunks = [torch.stack([row[(j * k + i) % d_in] for i in range(k)]) for j in range(math.ceil(d_in / k))]
        if d.config.type == "truncation":
            outputs = torch.cat([M @ row[:k], row.new_zeros(d_out)])
        elif d.config.type == "sharing":
            outputs = M @ torch.stack(chunks).sum(0)
        else:
            turned = []
            for j, chunk in enumerate(chunks):
                turn = torch.tensor([j * 10000 ** (-2 * i / k) for i in range(k // 2)])
                z = torch.complex(chunk[: k // 2], chunk[k // 2 :]) * torch.polar(torch.ones(k // 2), turn)
                turned.append(M @ torch.cat([z.real, z.imag]))
            outputs = torch.cat(turned)
        rows.append(torch.stack([outputs[q % len(outputs)] for q in range(d_out)]))
    return x @ W.T + torch.stack(rows) + (0 if b is None else b)


@pytest.mark.parametrize("kind", ["rotation", "sharing", "truncation"])
def test_mora(kind: str) -> None:
    against_reference("mora", mora, type=kind)


@pytest.mark.parametrize("kind", ["rotation", "sharing", "truncation"])
def test_mora_of_an_odd_size_and_with_biases(kind: str) -> None:
    against_reference("mora", mora, type=kind, r=1, base=biased)


def test_mora_has_the_size_of_lora_and_more_rank() -> None:
    assert Mora(site(4096, 4096), MoraConfig(r=8)).k == 256  # the paper's example
    assert Mora(site(32, 48), MoraConfig(r=4, type="sharing")).k == 17  # floor(sqrt(320))
    assert Mora(site(32, 48), MoraConfig(r=4)).k == 16
    for kind, rank in (("rotation", 32), ("sharing", 16), ("truncation", 16)):
        delta: Any = Mora(site(32, 32), MoraConfig(r=4, type=kind))
        torch.nn.init.normal_(delta.M, generator=torch.Generator().manual_seed(1))
        assert torch.linalg.matrix_rank(delta.matrix()) == rank


# FourierFT -------------------------------------------------------------------------------------------------------


def test_fourierft_is_a_sum_of_cosines() -> None:
    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        d_out, d_in = W.shape
        drawn = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(777))[:50].tolist()
        p, q = torch.arange(d_out, dtype=torch.float64)[:, None], torch.arange(d_in, dtype=torch.float64)
        waves = [torch.cos(2 * math.pi * (at // d_in * p / d_out + at % d_in * q / d_in)) for at in drawn]
        dW = 6 / (d_in * d_out) * torch.stack(waves, dim=-1) @ t["c"].double()
        return x @ (W + dW).T

    against_reference("fourierft", reference)


@pytest.mark.parametrize(("d_in", "d_out"), [(7, 9), (8, 9), (7, 6), (8, 6), (1, 2)])
def test_fourierft_with_every_entry_of_odd_and_even_sizes(d_in: int, d_out: int) -> None:
    """With all entries trained each half of each spectrum and both of its ends take part."""
    delta = FourierFT(site(d_in, d_out), FourierFTConfig(n_frequency=1000))
    assert delta.c.shape == (d_in * d_out,)
    torch.nn.init.normal_(delta.c, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, d_in, generator=torch.Generator().manual_seed(2))
    base = LinearBase(torch.nn.Linear(d_in, d_out))
    close(delta.increment(x, base), x @ delta.matrix().T, "increment against the transform of F")


# VB-LoRA ---------------------------------------------------------------------------------------------------------


def test_vb_lora_learns_the_bank_and_only_the_largest_logits() -> None:
    model = attach_tiny("vb-lora", tiny_model())
    close(logits(model), logits(tiny_model()), "a fresh vb-lora is close to the base", tolerance=1e-2)
    model(ids()).logits.square().sum().backward()
    delta = model.model.layers[0].mlp.up_proj.deltas["default"]
    assert ((delta.z_A.grad != 0).sum(-1) == 2).all()
    assert bool(delta.site.shared.bank.grad.any())
    chosen = delta.z_A.topk(2).indices
    assert torch.equal(delta.z_A.grad.abs().topk(2).indices.sort().values, chosen.sort().values)


def test_vb_lora_refuses_sizes_that_sub_vectors_do_not_fill() -> None:
    with raises("target/indivisible-layer", match=r"vector_length 5 .*32 and 32 of model\.layers\.0"):
        attach(tiny_model(), VbLoraConfig(vector_length=5))
    with raises("target/vector-bank-mismatch", match="top_k 4 of 3 vectors"):
        attach(tiny_model(), VbLoraConfig(vector_length=8, num_vectors=3, top_k=4))


# KaSA ------------------------------------------------------------------------------------------------------------


def test_kasa_keeps_the_large_components_of_w() -> None:
    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        U, S, V = torch.svd(W)
        rank = min(len(S), W.shape[1] - 4)  # the first d_in - r of them, where there are so many
        world = sum(S[i] * torch.outer(U[:, i], V[:, i]) for i in range(rank))
        assert isinstance(world, Tensor)
        y = x @ world.T + 6 / 4 * (t["sigma"] * (x @ t["V"].T)) @ t["U"].T
        return y if b is None else y + b

    against_reference("kasa", reference, base=biased)


@pytest.mark.filterwarnings("ignore")
def test_kasa_against_peft_which_edits_its_base() -> None:
    not_narrow = ("q_proj", "o_proj", "gate_proj", "up_proj")  # d_out >= d_in: of narrow layers PEFT cuts r too
    config = peft.LoraConfig(
        r=4, lora_alpha=6, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7), target_modules=[*not_narrow], **LM
    )
    theirs = move(peft.get_peft_model(tiny_model(), config).eval())
    ours = attach_tiny("kasa", tiny_model(), beta=0.3, gamma=0.7, targets=not_narrow)
    pairs = []
    for name, host in hosts(ours).items():
        layer, delta = theirs.base_model.model.get_submodule(name), host.deltas["default"]
        pairs += [(delta.V, layer.lora_A.default.weight), (delta.U, layer.lora_B.default.weight)]
        pairs += [(delta.sigma, layer.lora_diag.default)]
    with torch.no_grad():
        for mine, wanted in pairs:
            mine.copy_(wanted)
    close(logits(ours), logits(theirs), "kasa against PEFT")
    added, wanted_added = penalty(ours), theirs.base_model._get_kasa_loss()
    assert added is not None
    close(added, wanted_added, "what kasa adds to the loss")
    for model, more in ((ours, added), (theirs, wanted_added)):
        (model(ids()).logits.square().mean() + more).backward()
    for mine, wanted in pairs:
        close(mine.grad, wanted.grad, "gradient of kasa against PEFT")


def test_kasa_starts_without_the_smallest_components_and_never_takes_all() -> None:
    for d_in, d_out, left in ((12, 8, 8), (12, 12, 9), (8, 12, 5), (12, 10, 9)):  # d_in - 3, where there are so many
        here = site(d_in, d_out)
        delta = Kasa(here, KasaConfig(r=3))
        with torch.no_grad():
            delta.start()
        singular_values, whole = torch.linalg.svdvals(here.W() + delta.matrix()), torch.linalg.svdvals(here.W())
        wanted = torch.cat([whole[:left], torch.zeros(len(whole) - left)])
        close(singular_values, wanted, f"singular values of a fresh kasa on {d_out} x {d_in}")
    with raises("target/rank-too-large", match="12 x 8 weight"):
        Kasa(site(8, 12), KasaConfig(r=8))


# Bone ------------------------------------------------------------------------------------------------------------


def bone(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    """Block by block."""
    r, dW = d.config.r, torch.zeros_like(W)
    for i in range(0, W.shape[0], r):
        for j in range(0, W.shape[1], r):
            block = W[i : i + r, j : j + r]
            if d.config.bat:
                dW[i : i + r, j : j + r] = block @ t["D"][i // r] + t["D"][i // r]
            else:
                dW[i : i + r, j : j + r] = t["D"][: block.shape[1], i : i + r].T
    y = x @ (W + dW).T
    return y if b is None else y + b


@pytest.mark.parametrize(("r", "bat"), [(4, True), (8, True), (4, False), (7, False)])
def test_bone(r: int, bat: bool) -> None:
    against_reference("bone", bone, r=r, bat=bat, base=biased)


def test_bone_keeps_its_promises_in_both_forms() -> None:
    for bat, rank in ((False, 4), (True, 32)):
        delta = Bone(site(32, 32), BoneConfig(r=4, bat=bat))
        assert not delta.matrix().any()
        assert (delta.factors() is None) == bat
        torch.nn.init.normal_(delta.D, generator=torch.Generator().manual_seed(1))
        assert torch.linalg.matrix_rank(delta.matrix()) == rank
    with raises("target/rank-too-large", match="r = 5 .* 32 x 32 weight"):
        attach(tiny_model(), BoneConfig(r=5, bat=True))


@pytest.mark.filterwarnings("ignore")
def test_bone_refuses_the_form_of_peft_that_it_has_not(tmp_path: Path) -> None:
    config = peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=LINEAR, **LM)
    peft.get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    with raises("adapter/does-not-fit-model"):
        load_adapter(tiny_model(), tmp_path)


# GLoRA -----------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, str]] = {
    "low-rank": {"A": "low-rank", "B": "low-rank", "C": "low-rank", "D": "vector", "E": "vector"},
    "vector": {"A": "vector", "B": "vector", "C": "vector", "D": "vector", "E": "scalar"},
    "scalar": {"A": "scalar", "B": "scalar", "C": "none", "D": "scalar", "E": "vector"},
    "no A": {"A": "none", "B": "low-rank", "C": "vector", "D": "none", "E": "none"},
    "A alone": {"A": "low-rank", "B": "none", "C": "none", "D": "none", "E": "none"},
    "the bias alone": {"A": "none", "B": "none", "C": "none", "D": "none", "E": "vector"},
}


@pytest.mark.parametrize("forms", FORMS)
def test_glora(forms: str) -> None:
    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        b = W.new_zeros(len(W)) if b is None else b
        sizes = {"A": W.shape, "B": W.shape, "C": (W.shape[1], 1), "D": (len(W), 1), "E": (len(W), 1)}
        whole = {}
        for name, size in sizes.items():
            if f"{name}.left" in t:
                whole[name] = t[f"{name}.left"] @ t[f"{name}.right"]
            else:
                column = t.get(f"{name}.whole", W.new_zeros(1)).view(-1, 1)
                whole[name] = column.expand(size)
        shift = (whole["D"] * b[:, None] + whole["E"] + W @ whole["C"])[:, 0]
        return x @ (W + W * whole["A"] + whole["B"]).T + b + shift

    against_reference("glora", reference, base=biased, new_bias=True, **FORMS[forms])


GLORA_OF_PEFT: dict[str, dict[str, Any]] = {
    "by default": {},
    "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    "numbers": {"config_A_B": "constant", "config_C": "none"},
    "no C, D and E": {"config_C": "none", "config_D_E": "none"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", GLORA_OF_PEFT)
@pytest.mark.parametrize("base", [tiny_model, biased])
def test_glora_against_peft(case: str, base: Any, tmp_path: Path) -> None:
    config = peft.GloraConfig(r=4, target_modules=LINEAR, **GLORA_OF_PEFT[case], **LM)
    against_peft("glora", config, tmp_path, base=base, scale=0.03)  # B is added to each weight: more drowns them


@pytest.mark.filterwarnings("ignore")
def test_glora_of_biases_alone_against_peft(tmp_path: Path) -> None:
    config = peft.GloraConfig(config_A_B="none", config_C="vector", target_modules=ATTENTION, **LM)
    against_peft("glora", config, tmp_path, base=biased)


def test_glora_is_in_peft_s_layout_where_peft_has_a_word_for_it() -> None:
    for changes, why in (
        ({}, ""),
        ({"new_bias": True}, "no layer a new bias"),
        ({"new_bias": True, "C": "none", "D": "none", "E": "none"}, ""),
        ({"A": "vector"}, "one form for A and B"),
        ({"E": "scalar"}, "one form for A and B, and one for D and E"),
    ):
        found = why_not_peft(attach_tiny("glora", tiny_model(), **changes))
        assert why in found
        assert bool(why) == bool(found)


@pytest.mark.parametrize("forms", FORMS)
def test_folders_of_glora_as_they_were_written_before_are_read(forms: str, tmp_path: Path) -> None:
    """Each form was `left`, [rows, 1] of a vector and [1, 1] of a number, with `right` beside it in a product alone."""
    config = GloraConfig(r=4, new_bias=True, **FORMS[forms])  # type: ignore[arg-type]
    now = move(attach(biased(), config))
    adapter = replace(adapter_of(now), peft_config={"peft_type": "GRAFTLM"})
    written = {}
    for key, t in adapter_of(now).tensors.items():
        assert "glora_" not in key, "in names of ours"
        old = key.replace(".whole", ".left")
        written[old] = t.reshape(-1, 1) if old != key else t
    before = replace(adapter, tensors=written)
    if any(form in ("vector", "scalar") for form in FORMS[forms].values()):
        assert before.tensors.keys() != adapter_of(now).tensors.keys()
    load_adapter(model := biased(), before.write(tmp_path / "before"))
    assert torch.equal(logits(model), logits(now))


def test_glora_gives_a_layer_without_a_bias_one() -> None:
    model = attach(tiny_model(), GloraConfig(A="none", B="none", C="none", E="scalar"))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(2.0)
    assert torch.equal(merged_state(model)["model.layers.0.mlp.up_proj.bias"], torch.full((48,), 2.0))


# FLoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4])
def test_flora(r: int) -> None:
    def reference(t: Mapping[str, Tensor], W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
        gain = torch.einsum("ok,ki->oi", t["B"], t["A"])
        y = torch.einsum("ti,oi,oi->to", x, W, gain)
        return y if b is None else y + b

    against_reference("flora", reference, r=r, base=biased)


@pytest.mark.parametrize("tokens", [1, 21, 22, 300])
def test_flora_is_the_same_for_few_tokens_and_for_many(tokens: int) -> None:
    model = perturbed("flora", biased())
    host = model.model.layers[0].self_attn.k_proj
    W, b = host.effective()
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))
    close(host(x), x @ W.T + b, "flora")


def test_flora_starts_at_one_and_not_with_equal_parts() -> None:
    delta = Flora(site(12, 8), FloraConfig(r=3))
    assert torch.equal(delta.B @ delta.A, torch.ones(8, 12))
    assert torch.equal(delta.A.abs(), torch.ones(3, 12))
    assert torch.linalg.matrix_rank(delta.A) == 3
