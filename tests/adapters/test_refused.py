"""Adapters of another base and damaged ones are refused, and the model is left as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.adapters.folder import CONFIG, RECORD, WEIGHTS
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.hub.load import load_base
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from tests.adapters.folders import edit_config, edit_tensors, ours, refused, write_record
from tests.peers import factors_of_ours, peft_model

pytestmark = pytest.mark.versions


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_an_adapter_of_another_base_is_refused_with_both_names(tmp_path: Path, base_folder: Path) -> None:
    model = load_base(str(base_folder), dtype="float32").model
    folder = save_adapter(perturbed("lora", model), tmp_path / "a")
    other = tiny_model(seed=1)
    message = refused(folder, "base/other-base", base_folder.name, "LlamaForCausalLM", "weights differ", model=other)
    assert message.count("sha256:") == 2


def test_one_changed_weight_is_another_base_and_is_named(adapter: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    refused(adapter, "base/other-base", "1 of", "model.layers.1.mlp.up_proj.weight", model=model)


def test_the_same_weights_used_otherwise_are_another_base(adapter: Path) -> None:
    refused(
        adapter,
        "base/other-base",
        "the weights are the same",
        "rms_norm_eps is 0.1",
        model=tiny_model(rms_norm_eps=0.1),
    )


def test_another_base_loads_where_it_is_trusted(adapter: Path) -> None:
    model = tiny_model(seed=1)
    load_adapter(model, adapter, trust_base=True)
    wanted = factors_of_ours(ours())
    assert all(torch.equal(p, wanted[key]) for key, p in factors_of_ours(model).items())


def test_a_base_in_bf16_is_the_base_that_it_is_in_fp32(base_folder: Path, tmp_path: Path) -> None:
    from graftlm.hub.fingerprint import fingerprint

    wide, narrow = (load_base(str(base_folder), dtype=d).model for d in ("float32", "bfloat16"))
    assert fingerprint(wide) == fingerprint(narrow)
    folder = save_adapter(perturbed("lora", wide), tmp_path / "a")
    assert "fingerprint match" in load_adapter(narrow, folder)


def test_a_missing_folder_names_the_nearest(adapter: Path) -> None:
    refused(adapter.parent / "adaptor", "adapter/no-such-folder", "Did you mean", str(adapter))


def test_an_empty_folder_is_no_adapter(tmp_path: Path) -> None:
    refused(tmp_path, "adapter/no-adapter-config", f"no {CONFIG}")


def test_a_folder_whose_adapter_is_in_a_folder_of_it_says_so(adapter: Path) -> None:
    refused(adapter.parent, "adapter/no-adapter-config", f"no {CONFIG}", "adapters in its folders ['adapter']")


def test_a_folder_without_weights_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    refused(adapter, "adapter/no-weights", f"no {WEIGHTS}")


def test_pickled_weights_are_refused_unread(foreign: Path) -> None:
    (foreign / WEIGHTS).unlink()
    (foreign / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(foreign, "adapter/pickled-weights")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "adapter/unreadable-file"),
        ("{", "adapter/unreadable-file"),
        ("[]", "adapter/not-a-mapping"),
        ('"text"', "adapter/not-a-mapping"),
        ("\ud800", "adapter/unreadable-file"),
    ],
    ids=["empty", "cut", "list", "text", "bytes"],
)
def test_a_config_that_is_no_mapping_is_refused(foreign: Path, content: str, code: str) -> None:
    (foreign / CONFIG).write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(foreign, code, str(foreign / CONFIG))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(foreign: Path, share: float) -> None:
    whole = (foreign / WEIGHTS).read_bytes()
    (foreign / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    refused(foreign, "adapter/damaged-weights", str(foreign / WEIGHTS))


def test_a_file_that_is_not_safetensors_is_refused(foreign: Path) -> None:
    (foreign / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(1000))
    refused(foreign, "adapter/damaged-weights")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_one_flipped_byte_is_found_by_the_checksum(adapter: Path, file: str) -> None:
    content = bytearray((adapter / file).read_bytes())
    content[-9] ^= 1
    (adapter / file).write_bytes(content)
    refused(adapter, "adapter/checksum-mismatch", str(adapter / file), f"delete {RECORD}")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{}", "adapter/incomplete-record"),
        ("[]", "adapter/not-a-mapping"),
        ("{", "adapter/unreadable-file"),
        ('{"base": {}, "config": {}, "sha256": {}}', "adapter/incomplete-record"),
        ('{"base": [], "config": {}, "sha256": {}}', "adapter/incomplete-record"),
        (
            '{"base": {"name": "a", "digest": "", "config": {}, "tensors": {}}, "config": {}, "sha256": {}}',
            "adapter/incomplete-record",
        ),
    ],
)
def test_a_record_that_is_incomplete_is_refused_not_skipped(adapter: Path, content: str, code: str) -> None:
    (adapter / RECORD).write_text(content)
    refused(adapter, code, str(adapter / RECORD))


def test_a_record_whose_config_was_edited_is_refused(adapter: Path) -> None:
    tree = json.loads((adapter / RECORD).read_text())
    tree["config"]["alhpa"] = 3
    (adapter / RECORD).write_text(json.dumps(tree))
    refused(adapter, "adapter/checksum-mismatch", str(adapter / RECORD), "delete it")
    write_record(adapter, tree)
    refused(adapter, "recipe/unknown-key", str(adapter / RECORD), "alhpa", "'alpha'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(foreign: Path, value: float) -> None:
    edit_tensors(foreign, lambda tensors: tensors[f"{Q0}.lora_A.weight"].fill_(value))
    refused(foreign, "adapter/not-weights", f"{Q0}.lora_A.weight")


def test_weights_of_an_integer_dtype_are_refused_by_name(foreign: Path) -> None:
    edit_tensors(foreign, lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}))
    refused(foreign, "adapter/not-weights", f"{Q0}.lora_A.weight", "dtype torch.int8")


def test_a_missing_an_extra_and_a_mis_shaped_tensor_are_told_at_once_with_the_nearest_names(foreign: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.lora_a.weight"] = tensors.pop(f"{Q0}.lora_A.weight")
        tensors[f"{Q0}.lora_B.weight"] = tensors[f"{Q0}.lora_B.weight"].T.contiguous()

    edit_tensors(foreign, change)
    message = refused(foreign, "adapter/does-not-fit-model", str(foreign / WEIGHTS))
    missing, unexpected = (next(x for x in message.splitlines() if w in x) for w in ("missing:", "unexpected:"))
    assert f"missing: {Q0}.lora_A.weight. Did you mean" in missing
    assert f"'{Q0}.lora_a.weight'" in missing
    assert f"unexpected: {Q0}.lora_a.weight. Did you mean" in unexpected
    assert f"'{Q0}.lora_A.weight'" in unexpected
    assert f"{Q0}.lora_B.weight: has shape [4, 32], this model needs [32, 4]" in message


def test_an_adapter_of_a_wider_model_is_refused(tmp_path: Path) -> None:
    peft_model(tiny_model(intermediate_size=64), r=4).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", "adapter/does-not-fit-model", "up_proj.lora_B.weight", "[64, 4]", "[48, 4]")


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    peft_model(tiny_model("gpt2"), r=4).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", "adapter/does-not-fit-model", "none of its tensors", "transformer.h.0", "There is: ")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"use_dora": True}, "adapter/does-not-fit-model", ["missing: ", "lora_magnitude_vector"]),
        ({"use_rlsora": True}, "adapter/unknown-key", ["'use_rlsora' is unknown"]),
        (
            {"init_lora_weights": "pissa"},
            "adapter/changed-base-weights",
            ["init_lora_weights='pissa'", "path_initial_model_for_weight_conversion"],
        ),
        ({"init_lora_weights": "olora"}, "adapter/changed-base-weights", ["init_lora_weights='olora'"]),
        ({"peft_type": "NOHA"}, "adapter/unknown-peft-type", ["peft_type 'NOHA'"]),
        ({"peft_type": None}, "adapter/unknown-peft-type", ["peft_type None"]),
        ({"r": 0}, "recipe/invalid-value", ["r: ", "greater than 0"]),
        ({"r": "four"}, "recipe/invalid-value", ["r: ", "'four'"]),
        ({"rank_pattern": {"q_proj": 0}}, "recipe/invalid-value", ["greater than 0"]),
        ({"rank_pattern": {"q_proj": 2}}, "adapter/does-not-fit-model", ["q_proj.lora_A.weight", "needs [2, 32]"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_a_config_of_another_tool_that_would_have_to_be_ignored_is_refused(
    foreign: Path, changes: dict[str, Any], code: str, words: list[str]
) -> None:
    edit_config(foreign, **changes)
    refused(foreign, code, *words)


def test_a_refusal_leaves_the_deltas_that_were_there(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"))
    refused(foreign, "adapter/does-not-fit-model", "missing", model=ours(name="old"))
