"""Adapters of other tools: what PEFT makes of them, we make of them too; what would have to be ignored is refused."""

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from graftlm.adapters.folder import CONFIG
from graftlm.adapters.load import load_adapter
from graftlm.deltas import METHODS
from graftlm.model.registry import attachment, hosts
from graftlm.model.state_dict import merged_state
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, logits
from tests.adapters.foreign.folders import (
    LM,
    QV,
    edit_config,
    edit_tensors,
    lora,
    refused,
    resized,
    tied,
    untied,
    with_biases,
)
from tests.peers import peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


# Against PEFT ----------------------------------------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[LoraConfig, Callable[[], Any], tuple[str, ...]]] = {
    "names that the model lacks": (lora(target_modules=ALL), lambda: tiny_model("phi3"), ()),
    "a tied head": (lora(target_modules=["lm_head", "q_proj"]), tied, ()),
    "a tied head and embeddings": (lora(target_modules=["lm_head", "embed_tokens", "q_proj"]), tied, ()),
    "embeddings with dropout": (lora(target_modules=["embed_tokens", "q_proj"], lora_dropout=0.1), tied, ()),
    "embeddings alone with dropout": (lora(target_modules=["embed_tokens"], lora_dropout=0.1), untied, ()),
    "one tied delta": (lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), tied, ()),
    "dora on embeddings": (lora(target_modules=["embed_tokens", "q_proj"], use_dora=True), tied, ()),
    "dora on a tied head": (lora(target_modules=["lm_head"], use_dora=True, use_rslora=True), tied, ()),
    "a layer": (lora(layers_to_transform=[1]), tied, ()),
    "a layer by its pattern": (lora(layers_to_transform=0, layers_pattern="layers"), tied, ()),
    "modules left out": (lora(target_modules="all-linear", exclude_modules=["down_proj"]), tied, ()),
    "modules left out by a pattern": (lora(exclude_modules=r".*layers\.1.*v_proj"), tied, ()),
    "patterns": (
        lora(rank_pattern={r"layers\.1\.self_attn\.q_proj": 2}, alpha_pattern={"v_proj": 9}, use_rslora=True),
        tied,
        (),
    ),
    "a head in its place": (lora(modules_to_save=["lm_head"]), untied, ("modules",)),
    "a tied head in its place": (lora(modules_to_save=["lm_head"]), tied, ("modules",)),
    "head and embeddings in their place": (lora(modules_to_save=["lm_head", "embed_tokens"]), untied, ("modules",)),
    "tied embeddings in their place": (lora(modules_to_save=["embed_tokens"]), tied, ("modules",)),
    "both ends in their place": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), tied, ("modules",)),
    "blocks and norms in their place": (lora(modules_to_save=["mlp", "norm"]), tied, ("modules",)),
    "layers with biases in their place": (
        lora(target_modules=["o_proj"], modules_to_save=["q_proj"]),
        with_biases,
        ("modules",),
    ),
    "transposed layers in their place": (
        LoraConfig(r=4, target_modules=["c_fc"], modules_to_save=["c_attn", "ln_1"], fan_in_fan_out=True, **LM),
        lambda: tiny_model("gpt2"),
        ("modules",),
    ),
    "tokens": (lora(trainable_token_indices=[5, 290, 6]), untied, ("tokens",)),
    "tokens of a tied table": (lora(trainable_token_indices=[5, 290, 6]), tied, ("tokens",)),
    "tokens of both ends": (
        lora(trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [7]}),
        untied,
        ("tokens",),
    ),
    "tokens of both tied ends": (
        lora(trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [7, 5, 8]}),
        tied,
        ("tokens",),
    ),
    "tokens, and a head in its place": (
        lora(trainable_token_indices=[5], modules_to_save=["lm_head"]),
        untied,
        ("modules", "tokens"),
    ),
    "biases of the targets": (lora(bias="lora_only"), with_biases, ("biases",)),
    "all biases": (lora(target_modules=["o_proj"], bias="all"), with_biases, ("biases",)),
    "all biases, of norms too": (
        LoraConfig(r=4, target_modules=["c_fc"], bias="all", fan_in_fan_out=True, **LM),
        lambda: tiny_model("gpt2"),
        ("biases",),
    ),
    "a bias of lora": (lora(lora_bias=True, use_rslora=True, alpha_pattern={"v_proj": 9}), with_biases, ("biases",)),
    "dora with biases": (lora(use_dora=True, bias="lora_only"), with_biases, ("biases",)),
}


def scaled() -> Any:
    return tiny_model("gemma3_text")


CASES |= {
    "lora on embeddings with a scale": (lora(target_modules=["embed_tokens", "q_proj"]), scaled, ()),
    "dora on embeddings with a scale": (lora(target_modules=["embed_tokens"], use_dora=True), scaled, ()),
    "embeddings with a scale in their place": (lora(modules_to_save=["embed_tokens"]), scaled, ("modules",)),
    "tokens of embeddings with a scale": (lora(trainable_token_indices=[5, 290]), scaled, ("tokens",)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_computes_and_merges_as_in_peft(case: str, tmp_path: Path) -> None:
    config, base, parts = CASES[case]
    theirs: Any = peft_adapter(config, base(), tmp_path / "a")
    ours = base()
    note = load_adapter(ours, tmp_path / "a")
    assert "another tool" in note
    close(logits(ours), logits(theirs), case)
    assert set(attachment(ours).configs) == {"default", *(f"default-{part}" for part in parts)}
    tuned, merged = logits(theirs), merged_state(ours)
    plain = type(ours)(type(ours.config).from_dict(ours.config.to_dict() | {"tie_word_embeddings": False})).eval()
    plain.load_state_dict(merged)
    close(logits(plain), tuned, f"{case}: merged")
    wanted = theirs.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    ends = (
        {"model.embed_tokens.weight", "lm_head.weight"} if base in (tied, scaled) else set()
    )  # PEFT adds both changes to both
    for key in wanted.keys() - ends:
        close(merged[key], wanted[key], f"{case}: {key} after merging")


@pytest.mark.parametrize("base", [tied, untied])
def test_tokens_of_a_method_of_their_own_move_a_tied_head_too(base: Callable[[], Any], tmp_path: Path) -> None:
    theirs = peft_adapter(peft.TrainableTokensConfig(token_indices=[299, 3], **LM), base(), tmp_path / "a")
    ours = base()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), "trainable tokens")
    assert set(hosts(ours)) == {"model.embed_tokens", "lm_head"} if base is tied else {"model.embed_tokens"}


def test_other_methods_have_modules_in_their_place_and_layers_too(tmp_path: Path) -> None:
    config = peft.LoHaConfig(
        r=4, alpha=6, target_modules=QV, layers_to_transform=[1], modules_to_save=["lm_head"], **LM
    )
    theirs = peft_adapter(config, untied(), tmp_path / "a")
    ours = untied()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), "loha")


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize("base", [tied, untied])
def test_a_resized_vocabulary_is_the_adapters_on_a_base_that_was_resized_otherwise(
    base: Callable[[], Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    peft_adapter(lora(**settings), resized(base, 1), tmp_path / "a", save_embedding_layers=True)
    ours, theirs = resized(base, 2), PeftModel.from_pretrained(resized(base, 2), tmp_path / "a").eval()
    load_adapter(ours, tmp_path / "a")
    new = torch.tensor([[3, 300, 4, 303]])
    with torch.no_grad():
        close(ours(input_ids=new).logits, theirs(input_ids=new).logits, "answers with new tokens")
    message = refused(
        tmp_path / "a",
        "adapter/does-not-fit-model",
        "resized to 304",
        "model.resize_token_embeddings(304)",
        model=base(),
    )
    assert "embed_tokens" in message


def test_tokens_on_a_resized_vocabulary_are_the_adapters_and_so_are_the_other_new_ones(tmp_path: Path) -> None:
    config = lora(trainable_token_indices=[301])
    peft_adapter(config, resized(tied, 1), tmp_path / "a", save_embedding_layers=True)
    ours, theirs = resized(tied, 2), PeftModel.from_pretrained(resized(tied, 2), tmp_path / "a").eval()
    load_adapter(ours, tmp_path / "a")
    new = torch.tensor([[3, 300, 301, 303]])
    with torch.no_grad():
        close(ours(input_ids=new).logits, theirs(input_ids=new).logits, "answers with new tokens")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.delta.peft])
def test_a_key_that_is_left_out_has_pefts_default(name: str) -> None:
    method = METHODS[name]
    layout: Any = method.delta.peft
    theirs = {f.name: f for f in fields(PEFT_TYPE_TO_CONFIG_MAPPING[layout.type])}
    ours = {f.name: f.default for f in fields(method.config)}
    read = {key: layout.defaults.get(key, ours[field]) for field, key in layout.fields.items()}
    read |= {key: layout.defaults.get(key, value) for key, value in layout.constants.items()}
    for key in read.keys() & theirs.keys():
        factory: Any = theirs[key].default_factory
        wanted = theirs[key].default if factory is MISSING else factory()
        # Where PEFT has None, it finds the value by itself or wants one; shapes then say whether ours is the same.
        assert read[key] == (tuple(wanted) if isinstance(wanted, list) else wanted) or wanted is None, key


def test_a_config_by_hand_has_pefts_rank_and_scale(tmp_path: Path) -> None:
    theirs = peft_adapter(LoraConfig(target_modules=QV, **LM), tied(), tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": QV}))
    ours = tied()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), "defaults")


# What the tensors decide -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": ["q_prj"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "v_proj", "gate", "o_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*(mlp.*|k_proj|o_proj)"},
        {"bias": "all"},
        {"bias": None, "modules_to_save": ["score", "classifier"]},
        {"use_dora": None, "use_rslora": None, "lora_bias": None},
        {"fan_in_fan_out": True, "ensure_weight_tying": True, "peft_version": "9.0"},
        {"enable_lora": None, "merge_weights": False, "a_key_of_tomorrow": None, "and_another": {}},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_configs_that_say_the_same_or_nothing_load_the_same(folder: Path, changes: dict[str, Any]) -> None:
    wanted = tied()
    load_adapter(wanted, folder)
    edit_config(folder, **changes)
    ours = tied()
    load_adapter(ours, folder)
    assert torch.equal(logits(ours), logits(wanted))


def test_names_without_tensors_are_said(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj", "v_proj", "qkv_proj", "o_proj"])
    assert "target_modules also names qkv_proj, o_proj, for which it has no tensors" in load_adapter(tied(), folder)


def test_a_layer_without_tensors_among_others_that_have_them_is_damage(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if not k.startswith(Q0)})
    refused(folder, "adapter/does-not-fit-model", f"missing: {Q0}.lora_A.weight", f"missing: {Q0}.lora_B.weight")
    edit_config(folder, exclude_modules=["layers.0.self_attn.q_proj"])
    load_adapter(tied(), folder)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"target_modules": 7}, "recipe/invalid-value", ["target_modules"]),
        ({"target_modules": ["q_proj", 7]}, "recipe/invalid-value", ["target_modules"]),
        ({"target_modules": "(q_proj"}, "adapter/invalid-pattern", ["target_modules", "no regular expression"]),
        ({"exclude_modules": "(q_proj"}, "adapter/invalid-pattern", ["exclude_modules", "no regular expression"]),
        ({"layers_to_transform": ["one"]}, "recipe/invalid-value", ["layers_to_transform"]),
        (
            {"modules_to_save": ["lm_head"]},
            "adapter/does-not-fit-model",
            ["missing: base_model.model.lm_head.weight", "modules_to_save"],
        ),
        (
            {"trainable_token_indices": [3]},
            "adapter/token-rows-mismatch",
            ["trainable_token_indices=(3,)", "0 modules"],
        ),
        ({"lora_bias": True}, "adapter/does-not-fit-model", [f"missing: {Q0}.lora_B.bias"]),
        ({"lora_bias": True, "use_dora": True}, "adapter/unsupported-setting", ["lora_bias=True with use_dora=True"]),
        ({"bias": "some"}, "recipe/invalid-value", ["bias", "'lora_only'"]),
        ({"lora_alpha": None}, "adapter/missing-value", ["lora_alpha is null"]),
        ({"r": None}, "adapter/missing-value", ["r is null"]),
        ({"lora_alpha": "6"}, "recipe/invalid-value", ["alpha", "'6'"]),
        ({"lora_alpha": True}, "recipe/invalid-value", ["alpha"]),
        ({"r": 4.5}, "recipe/invalid-value", ["r: "]),
        ({"rank_pattern": [4]}, "adapter/invalid-pattern", ["rank_pattern must be a mapping"]),
        ({"alpha_pattern": {"(q": 2}}, "adapter/invalid-pattern", ["alpha_pattern", "'(q' is no regular expression"]),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            "adapter/fused-experts",
            ["target_parameters", "merge_and_unload"],
        ),
        ({"alora_invocation_tokens": [1, 2]}, "adapter/unsupported-setting", ["alora_invocation_tokens=[1, 2]"]),
        ({"use_rlsora": True}, "adapter/unknown-key", ["'use_rlsora' is unknown", "'use_rslora'"]),
        (
            {"eva_config": {"rho": 2.0}, "init_lora_weights": "pissa"},
            "adapter/changed-base-weights",
            ["init_lora_weights='pissa'"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_cannot_be_followed_are_refused(
    folder: Path, changes: dict[str, Any], code: str, words: list[str]
) -> None:
    edit_config(folder, **changes)
    refused(folder, code, *words)


def test_biases_that_old_versions_lost_are_the_bases_and_lost_ones_are_damage(tmp_path: Path) -> None:
    peft_adapter(lora(bias="lora_only"), with_biases(), tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda t: {k: v for k, v in t.items() if k != f"{Q0}.base_layer.bias"})
    refused(tmp_path / "a", "adapter/does-not-fit-model", f"missing: {Q0}.bias", model=with_biases())
    edit_tensors(tmp_path / "a", lambda t: {k: v for k, v in t.items() if not k.endswith("bias")})
    ours = with_biases()
    load_adapter(ours, tmp_path / "a")
    assert set(attachment(ours).configs) == {"default"}


def test_weights_that_nothing_names_and_weights_that_cannot_be_replaced_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    up = "base_model.model.model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({up: torch.ones(48, 32)}))
    refused(folder, "adapter/does-not-fit-model", f"unexpected: {up}")
    edit_config(folder, modules_to_save=["layers.0.mlp.up_proj"])
    load_adapter(tied(), folder)

    def moe() -> Any:
        return tiny_model("mixtral", num_local_experts=2, num_experts_per_tok=1)

    peft_adapter(lora(modules_to_save=["mlp"]), moe(), tmp_path / "b")
    refused(
        tmp_path / "b",
        "adapter/does-not-fit-model",
        "gate_up_proj",
        "weights can be replaced in linear layers, embeddings and norms",
        model=moe(),
    )


def test_factors_for_each_expert_of_experts_in_one_parameter_are_refused_with_what_to_do(folder: Path) -> None:
    one = "base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({one: torch.ones(4, 32)}))
    fused = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    refused(folder, "adapter/fused-experts", one, "model.layers.0.mlp.experts", model=fused)
    refused(folder, "adapter/does-not-fit-model", f"unexpected: {one}")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (
            {"trainable_token_indices": [5]},
            "adapter/does-not-fit-model",
            ["trainable_tokens_delta: has shape [2, 32]", "for 1 tokens"],
        ),
        ({"trainable_token_indices": [5, 300]}, "adapter/does-not-fit-model", ["(5, 300) are not 2 of the 300"]),
        ({"trainable_token_indices": [5, 5]}, "adapter/does-not-fit-model", ["(5, 5) are not 2 of the 300"]),
        (
            {"trainable_token_indices": {"wte": [5, 6]}},
            "adapter/does-not-fit-model",
            ["says nothing about model.embed_tokens"],
        ),
        (
            {"trainable_token_indices": None},
            "adapter/token-rows-mismatch",
            ["trainable_token_indices=None, and 1 modules"],
        ),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    change: dict[str, Any], code: str, words: list[str], tmp_path: Path
) -> None:
    peft_adapter(lora(trainable_token_indices=[5, 6]), tied(), tmp_path / "a")
    edit_config(tmp_path / "a", **change)
    refused(tmp_path / "a", code, *words)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_tensors_of_any_float_are_read(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    ours, wide = tied(), tied()
    load_adapter(ours, folder)
    edit_tensors(folder, lambda tensors: {key: t.float() for key, t in tensors.items()})
    load_adapter(wide, folder)
    assert torch.equal(logits(ours), logits(wide))
