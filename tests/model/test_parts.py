"""Parts of fused projections as sites: which rows they are, and that a delta changes these and no other."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftlm import DataConfig, LoraConfig, Recipe, TrainConfig, train
from graftlm.adapters.export.export import export
from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import why_not_peft
from graftlm.adapters.save import save_adapter
from graftlm.combine.merge import merge
from graftlm.deltas import METHODS
from graftlm.hub.load import load_base
from graftlm.hub.quantize_base import quantize
from graftlm.model.attach import attach, detach
from graftlm.model.coverage import coverage
from graftlm.model.initialize import needed_statistics
from graftlm.model.modes import activate, by_row, deltas_off
from graftlm.model.registry import attachment, deltas_by_site, hosts, penalty, trainable
from graftlm.model.sites import find_sites
from graftlm.model.state_dict import merged_state
from graftlm.passes.statistics import collect
from graftlm.testing import save_tiny_base, tiny_model
from graftlm.testing.deltas import close, ids, logits, move, tiny_config
from graftlm.training.state import TrainingState
from tests.errors import raises

GPT2 = "transformer.h.0.attn.c_attn"
SMALL = LoraConfig(r=3, alpha=6)


def in_turns(part: int, heads: int = 4, size: int = 8) -> list[int]:
    """The rows of one of q, k, v where those of each head lie behind each other."""
    return [head * 3 * size + part * size + n for head in range(heads) for n in range(size)]


ROWS: dict[tuple[str, str], list[int]] = {
    # a pass of the modeling files by hand: split(), chunk(2), view(heads, 3, size)
    ("gpt2", "c_attn.q"): list(range(32)),
    ("gpt2", "c_attn.k"): list(range(32, 64)),
    ("gpt2", "c_attn.v"): list(range(64, 96)),
    ("gpt_bigcode", "c_attn.q"): list(range(32)),
    ("gpt_bigcode", "c_attn.v"): list(range(40, 48)),
    ("phi3", "qkv_proj.q"): list(range(32)),
    ("phi3", "qkv_proj.k"): list(range(32, 48)),
    ("phi3", "qkv_proj.v"): list(range(48, 64)),
    ("phi3", "gate_up_proj.gate"): list(range(48)),
    ("phi3", "gate_up_proj.up"): list(range(48, 96)),
    ("glm", "gate_up_proj.up"): list(range(48, 96)),
    ("gpt_neox", "query_key_value.q"): in_turns(0),
    ("gpt_neox", "query_key_value.v"): in_turns(2),
    ("deepseek_v3", "kv_b_proj.v"): [head * 12 + n for head in range(4) for n in range(4, 12)],
}

MORE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "first_k_dense_replace": 2,
    }
}


@pytest.mark.parametrize(("kind", "target"), list(ROWS))
def test_the_rows_of_a_part_are_those_that_the_models_code_takes(kind: str, target: str) -> None:
    model = tiny_model(kind, **MORE.get(kind, {}))
    attach(model, SMALL, targets=(target,))
    found = list(deltas_by_site(model))
    assert len(found) == 2, "one for each layer"
    for _, site, delta in found:
        assert site.endswith(target)
        assert delta.site.rows is not None
        assert [n for a, b in delta.site.rows for n in range(a, b)] == ROWS[kind, target]
        assert delta.site.d_out == len(ROWS[kind, target])


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt2", ("c_attn.q", "c_attn.v")),
        ("phi3", ("qkv_proj.q", "qkv_proj.v", "gate_up_proj.up")),
        ("gpt_neox", ("query_key_value.q", "query_key_value.v")),
    ],
)
def test_lora_on_parts_is_the_layer_with_b_a_added_to_those_rows(kind: str, targets: tuple[str, ...]) -> None:
    model = tiny_model(kind)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = logits(model)
    move(attach(model, SMALL, targets=targets))
    wanted = {key: tensor.clone() for key, tensor in before.items()}
    for _, site, delta in deltas_by_site(model):
        layer, _, part = site.rpartition(".")
        weight = wanted[f"{layer}.weight"]
        rows = ROWS[kind, f"{layer.rpartition('.')[2]}.{part}"]
        change = 2 * (delta.B @ delta.A).detach()  # type: ignore[operator]
        if kind == "gpt2":
            weight[:, rows] += change.T
        else:
            weight[rows] += change
    state = merged_state(model)
    assert state.keys() == wanted.keys()
    for key, tensor in wanted.items():
        close(state[key], tensor, key, 1e-6)
    plain = tiny_model(kind, seed=9)
    plain.load_state_dict(wanted)
    close(logits(plain), logits(model), "forward")
    with deltas_off(model):
        assert torch.equal(logits(model), base)
    detach(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), base)


def test_gradients_are_those_of_pefts_lora_on_the_rows() -> None:
    """PEFT's LoRA on the whole of c_attn with a B of zeros elsewhere: its gradient on the rows of q is ours."""
    model = move(attach(tiny_model("gpt2"), SMALL, targets=("c_attn.q",)))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model("gpt2"), config)
    layers = {
        site: theirs.get_submodule(f"base_model.model.{site.removesuffix('.q')}")
        for _, site, _ in deltas_by_site(model)
    }
    for _, site, delta in deltas_by_site(model):
        B = torch.zeros(96, 3)
        B[:32] = delta.B.detach()  # type: ignore[union-attr, operator]
        layers[site].lora_A["default"].weight.data.copy_(delta.A.detach())  # type: ignore[union-attr, operator]
        layers[site].lora_B["default"].weight.data.copy_(B)
    model(ids(), labels=ids()).loss.backward()
    theirs(input_ids=ids(), labels=ids()).loss.backward()
    for _, site, delta in deltas_by_site(model):
        close(delta.A.grad, layers[site].lora_A["default"].weight.grad, "A", 1e-4)  # type: ignore[arg-type, union-attr]
        close(delta.B.grad, layers[site].lora_B["default"].weight.grad[:32], "B", 1e-4)  # type: ignore[arg-type, union-attr]


LINEAR = [n for n, m in METHODS.items() if "linear" in m.delta.kinds and m.mergeable and n != "trainable-tokens"]
"""(Of linear layers, trainable-tokens sits on output heads alone.)"""


@pytest.mark.sampled
@pytest.mark.parametrize("name", LINEAR)
def test_every_mergeable_method_acts_on_its_rows_alone_and_survives_a_folder(name: str, tmp_path: Path) -> None:
    config = tiny_config(name, targets=("c_attn.v", "c_attn.q"))
    model = tiny_model("gpt2")
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    needs = needed_statistics(config)
    statistics = collect(model, config, needs, [lambda: model(ids(), labels=ids()).loss]) if needs else None
    attach(model, config, statistics=statistics)
    move(model)
    changed = merged_state(model)
    sites = attachment(model).sites["default"]
    assert {site.rpartition(".")[2] for site in sites} <= {"q", "v"}
    for layer in {site.rpartition(".")[0] for site in sites}:
        moved = (changed[f"{layer}.weight"] - base[f"{layer}.weight"]).abs().amax(0)
        moved = moved + (changed[f"{layer}.bias"] - base[f"{layer}.bias"]).abs()
        q, k, v = (bool(rows.any()) for rows in moved.split(32))
        assert (q, k, v) == (True, False, True)
    plain = tiny_model("gpt2", seed=9)
    plain.load_state_dict(changed)
    close(logits(plain), logits(model), f"{name}: merged against forward", 1e-4)
    save_adapter(model, tmp_path / "out")
    again = tiny_model("gpt2")
    load_adapter(again, tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "again")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("out", "again")]
    assert files[0] == files[1]


def test_an_init_that_splits_w_splits_the_rows_of_a_part(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    base = logits(model)
    attach(model, LoraConfig(r=3, alpha=6, init="pissa", targets=("c_attn.q",)))
    close(logits(model), base, "a fresh delta")
    move(model)
    plain = tiny_model("gpt2", seed=9)
    plain.load_state_dict(merged_state(model))
    close(logits(plain), logits(model), "merged")
    save_adapter(model, tmp_path / "out")
    again = tiny_model("gpt2")
    load_adapter(again, tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_statistics_of_a_part_are_those_of_its_rows() -> None:
    loss = lambda model: lambda: model(ids(), labels=ids()).loss  # noqa: E731
    needs = ("gradient", "second_moment")
    whole, part = (
        collect(model, LoraConfig(targets=(target,)), needs, [loss(model)])
        for target, model in (("c_attn", tiny_model("gpt2")), ("c_attn.v", tiny_model("gpt2")))
    )
    close(part[f"{GPT2}.v"]["gradient"], whole[GPT2]["gradient"][64:], "gradient")
    close(part[f"{GPT2}.v"]["second_moment"], whole[GPT2]["second_moment"], "second moment")


def test_parts_and_whole_layers_share_a_layer(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    attach(model, SMALL, name="part", targets=("c_attn.q",))
    attach(model, SMALL, name="whole", targets=("c_attn",), seed=2)
    attach(model, tiny_config("dora", targets=("c_attn.v",)), name="third", seed=3)
    move(model)
    for names in (("part", "whole"), ("part", "third"), ("whole", "third", "part")):
        activate(model, *names)
        plain = tiny_model("gpt2", seed=9)
        plain.load_state_dict(merged_state(model))
        close(logits(plain), logits(model), f"{names}")
    rows, batch = [{"part": 0.5, "whole": 2.0}, {}, {"third": 1.0}], ids(rows=3)
    with by_row(model, rows), torch.no_grad():
        together = model(batch).logits
    for number, weights in enumerate(rows):
        plain.load_state_dict(dict(merge(model, weights)))
        with torch.no_grad():
            close(together[number : number + 1], plain(batch[number : number + 1]).logits, f"row {number}")


def test_peft_has_no_name_for_a_part_and_gets_an_exact_lora_with_zero_rows(tmp_path: Path) -> None:
    model = move(attach(tiny_model("gpt2"), SMALL, targets=("c_attn.q", "c_attn.v")))
    assert "part of a layer" in why_not_peft(model)
    save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "GRAFTLM"
    for to in ("peft", "plain-lora"):
        made = export(model, tmp_path / to, to=to)
        assert (made["exact"], made["rank"]) == (True, 6)
        theirs = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / to).eval()
        close(logits(theirs), logits(model), to)
        B = theirs.get_submodule(f"base_model.model.{GPT2}").lora_B["default"].weight
        assert not B[32:64].any()


def test_parts_of_a_quantized_base() -> None:
    model = quantize(tiny_model("phi3"), "nf4")
    plain = tiny_model("phi3", seed=9)
    plain.load_state_dict(merged_state(model))
    for each in (model, plain):
        move(attach(each, SMALL, targets=("qkv_proj.q", "gate_up_proj.gate")))
    close(logits(model), logits(plain), "quantized weights against the numbers that they stand for")


def test_policies_and_penalties_see_each_part() -> None:
    model = move(attach(tiny_model("gpt2"), tiny_config("adalora", targets=("c_attn.q", "c_attn.v"))))
    training = TrainingState(model, attachment(model).configs, torch.optim.SGD([torch.zeros(1)]), total=1, seed=0)
    assert [site for _, site, _ in training.sites()] == list(attachment(model).sites["default"])
    assert len(list(training.sites())) == 4
    parts = [delta.penalty() for _, _, delta in deltas_by_site(model)]
    wanted = torch.stack([part for part in parts if part is not None]).sum()
    found = penalty(model)
    assert found is not None
    close(found, wanted, "the sum over the parts")
    assert len(trainable(model)) == sum(len(list(delta.parameters())) for _, _, delta in deltas_by_site(model))


def test_a_run_on_parts_ends_in_an_adapter_that_loads(tmp_path: Path) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    save_tiny_base(base, model_type="gpt2")
    rows.write_text("".join(json.dumps({"prompt": f"Bin {n}?", "completion": "Blue."}) + "\n" for n in range(4)))
    recipe = Recipe(
        base=str(base),
        data=DataConfig(train=str(rows)),
        delta=LoraConfig(r=2, targets=("c_attn.q", "c_attn.v")),
        train=TrainConfig(steps=2, batch_rows=2),
    )
    done = train(recipe, tmp_path / "out")
    model, _ = load_base(str(base))
    before = logits(model)
    load_adapter(model, tmp_path / "out")
    assert list(attachment(model).sites["default"]) == list(attachment(done.model).sites["default"])  # type: ignore[arg-type]
    assert torch.equal(logits(model), logits(done.model))
    assert not torch.equal(logits(model), before)


def test_the_share_under_deltas_counts_rows() -> None:
    found = coverage(attach(tiny_model("gpt2"), SMALL, targets=("c_attn.q",)))
    assert found.under_deltas == 2 * 32 * 32


# Names -----------------------------------------------------------------------------------------------------------


def test_names_of_parts_by_suffix_and_by_expression() -> None:
    model = tiny_model("gpt2")
    both = [f"transformer.h.{n}.attn.c_attn.{part}" for n in (0, 1) for part in ("q", "v")]
    assert find_sites(model, ("c_attn.v", "c_attn.q")) == both
    assert find_sites(model, r".*c_attn\.(q|v)") == both
    assert find_sites(model, r".*\.0\..*c_attn\.v") == [both[1]]
    assert find_sites(model, r".*attn.*") == find_sites(model, ("c_attn", "attn.c_proj")), "layers, not their parts"
    assert find_sites(model, ("c_attn", "c_attn.q")) == find_sites(model, ("c_attn",)), "a part of what is meant whole"
    assert find_sites(model, r".*\.(c_fc|c_attn\.k)") == [
        f"transformer.h.{n}.{name}" for n in (0, 1) for name in ("attn.c_attn.k", "mlp.c_fc")
    ]


@pytest.mark.parametrize(
    ("kind", "targets", "code", "words"),
    [
        (
            "gpt2",
            ("c_attn.gate",),
            "target/no-such-part",
            ["'transformer.h.0.attn.c_attn.gate'", "its parts are q, k, v"],
        ),
        ("gpt2", ("c_fc.up",), "target/no-such-part", ["no parts of it can be told apart"]),
        ("llama", ("q_proj.q",), "target/no-such-part", ["no parts of it", "'q_proj'"]),
        ("llama", ("gate_proj.gate",), "target/no-such-part", ["no parts of it", "'gate_proj'"]),
        ("gpt2", ("q",), "target/no-layer-matches", ["'q' matches no layer"]),
        ("mpt", ("Wqkv.q",), "target/no-such-part", ["transformers' interface", "'Wqkv'"]),
    ],
)
def test_what_is_no_part_is_refused_with_the_reason(
    kind: str, targets: tuple[str, ...], code: str, words: list[str]
) -> None:
    model = tiny_model(kind)
    before = logits(model)
    with raises(code) as raised:
        attach(model, SMALL, targets=targets)
    for word in words:
        assert word in str(raised.value)
    assert not hosts(model)
    assert torch.equal(logits(model), before)


def test_a_method_that_acts_on_an_output_is_refused_on_a_part() -> None:
    with raises("target/part-not-supported", match=r"c_attn\.q: 'reslora'"):
        attach(tiny_model("gpt2"), tiny_config("reslora", targets=("c_attn.q",)))


def test_patterns_speak_of_parts() -> None:
    config = LoraConfig(r=4, targets=("c_attn.q", "c_attn.v"), patterns={r"c_attn\.v": {"r": 2}})
    model = attach(tiny_model("gpt2"), config)
    ranks = {site.rpartition(".")[2]: delta.config.r for _, site, delta in deltas_by_site(model)}  # type: ignore[attr-defined]
    assert ranks == {"q": 4, "v": 2}
    odd: dict[str, Any] = {r"c_attn\.v": {"dropout": 0.5}}
    with raises("target/parts-differ-in-dropout"):
        attach(tiny_model("gpt2"), LoraConfig(targets=("c_attn.q", "c_attn.v"), patterns=odd))


def test_dropout_acts_on_the_input_of_the_parts() -> None:
    model = move(attach(tiny_model("gpt2"), LoraConfig(r=2, dropout=0.5, targets=("c_attn.q", "c_attn.v"))))
    still = logits(model)
    for host in hosts(model).values():
        host.deltas.train()
    torch.manual_seed(0)
    first: Tensor = logits(model)
    assert not torch.equal(first, still)
