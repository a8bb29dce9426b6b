"""A delta on disk: the same bits back, PEFT's in and out, and nothing that does not fit gets in or is lost."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graftlm.adapters import store
from graftlm.adapters.foreign import HARMLESS, NEUTRAL, NEUTRAL_ANYWHERE
from graftlm.adapters.store import CONFIG, RECORD, WEIGHTS, load_adapter, save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import AdapterError, BaseModelError, GraftError, OutputError
from graftlm.model.hub.load import load_base
from graftlm.model.layers.attach import activate, attach, attachment, hosts, merged_state, trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import logits, perturbed
from tests.peers import LAYERS, factors_of_ours, factors_of_peft, peft_model, relative_error

pytestmark = pytest.mark.versions

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def ours(config: LoraConfig | None = None, *, kind: str = "llama", name: str = "default", **changes: Any) -> Any:
    """A tiny model with our LoRA on it, away from its start."""
    model = tiny_model(kind, **changes)
    attach(model, config or LoraConfig(r=4, alpha=6), name=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(ours(), tmp_path / "adapter")


@pytest.fixture
def foreign(adapter: Path) -> Path:
    """The same as another tool would have left it: without our record."""
    (adapter / RECORD).unlink()
    return adapter


def refused(folder: Path, *words: str, model: Any = None, error: type[GraftError] = AdapterError) -> str:
    """Loading must raise with all of these words, and leave the model as it was; the message."""
    model = tiny_model() if model is None else model
    modules, before = dict(model.named_modules()), logits(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    deltas = dict(attachment(model).configs)
    with pytest.raises(error) as raised:
        load_adapter(model, folder, name="new")
    for word in words:
        assert word in str(raised.value)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[key] is modules[key] for key in modules)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning
    assert attachment(model).configs == deltas
    assert torch.equal(logits(model), before)
    return str(raised.value)


def edit_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(tree | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# There and back --------------------------------------------------------------------------------------------------


def test_a_loaded_adapter_computes_the_same_bits_and_says_what_was_checked(tmp_path: Path) -> None:
    model = ours(LoraConfig(r=4, alpha=6, rslora=True, patterns={"q_proj": {"r": 2}, "up_proj": {"alpha": 9}}))
    folder = save_adapter(model, tmp_path / "a")
    other = tiny_model()
    said = load_adapter(other, folder)
    assert torch.equal(logits(other), logits(model))
    assert "28 tensors" in said  # A and B on seven layers of two blocks
    assert "fingerprint match" in said
    assert attachment(other).configs == attachment(model).configs


def test_an_adapter_trained_with_dropout_answers_without(tmp_path: Path) -> None:
    folder = save_adapter(ours(LoraConfig(r=4, dropout=0.5)), tmp_path / "a")
    model = tiny_model()
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(ours(LoraConfig(r=4))))


def test_two_saves_give_the_same_bytes_in_every_file(tmp_path: Path) -> None:
    first, second = (save_adapter(ours(), tmp_path / name) for name in "ab")
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted([CONFIG, WEIGHTS, RECORD, "README.md"])
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_one_of_two_deltas_is_saved_by_its_name_and_loads_under_another(tmp_path: Path) -> None:
    model = ours(name="one")
    attach(model, LoraConfig(r=2), name="two", targets=("q_proj",), seed=5)
    with torch.no_grad():
        for key, parameter in factors_of_ours(model, "two").items():
            parameter.add_(0.1 if key.endswith("B") else 0)
    activate(model, "two")
    folder = save_adapter(model, tmp_path / "a", name="two")
    other = ours(name="one")
    load_adapter(other, folder, name="three")
    activate(other, "three")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(AdapterError, match="no delta 'tow'.*'two'"):
        save_adapter(model, tmp_path / "b", name="tow")
    assert not (tmp_path / "b").exists()


def test_the_tokenizer_and_the_exact_chat_template_are_written(tmp_path: Path, tokenizer: Any) -> None:
    folder = save_adapter(ours(), tmp_path / "a", tokenizer=tokenizer)
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.chat_template
    assert (folder / "tokenizer.json").is_file()


def test_the_model_card_is_filled_in(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: LlamaForCausalLM\n")
    record = json.loads((adapter / RECORD).read_text())
    assert record["base"]["digest"] in card
    assert "More Information" not in card


# PEFT, both ways -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama", {"r": 4, "alpha": 6}, {"r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"r": 4, "alpha": 6, "rslora": True}, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "some layers": (
        "llama",
        {"r": 4, "targets": ("q_proj", "v_proj")},
        {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    ),
    "one layer": (
        "llama",
        {"r": 4, "targets": r".*layers\.1\.mlp\.up_proj"},
        {"r": 4, "lora_alpha": 32, "target_modules": r".*layers\.1\.mlp\.up_proj"},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "alpha": 6,
            "rslora": True,
            "patterns": {r"0\.self_attn\.q_proj": {"r": 2, "alpha": 3}, "down_proj": {"alpha": 9}},
        },
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {r"0\.self_attn\.q_proj": 2},
            "alpha_pattern": {r"0\.self_attn\.q_proj": 3, "down_proj": 9},
        },
    ),
    "transposed layers": (
        "gpt2",
        {"r": 4, "alpha": 6, "patterns": {"c_fc": {"r": 5}}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"c_fc": 5}},
    ),
    "untied head": (
        "llama",
        {"r": 4, "targets": ("q_proj", "lm_head")},
        {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "lm_head"]},
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_peft_loads_ours_and_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, config, _ = SETTINGS[case]
    changes = {"tie_word_embeddings": False} if case == "untied head" else {}
    model = ours(LoraConfig(**config), kind=kind, **changes)
    folder = save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny_model(kind, **changes), folder).eval()
    mine = factors_of_ours(model)
    found = factors_of_peft(theirs)
    assert found.keys() == mine.keys()
    assert all(torch.equal(found[key], mine[key]) for key in mine)
    assert float((logits(theirs) - logits(model)).abs().max()) <= 1e-5


@pytest.mark.parametrize("case", SETTINGS)
def test_ours_loads_what_peft_wrote_and_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, _, settings = SETTINGS[case]
    changes = {"tie_word_embeddings": False} if case == "untied head" else {}
    theirs = peft_model(tiny_model(kind, **changes), **settings)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    model = tiny_model(kind, **changes)
    said = load_adapter(model, tmp_path / "a")
    assert "another tool" in said
    assert "that the base is the right one was not" in said
    assert float((logits(theirs) - logits(model)).abs().max()) <= 1e-5


def test_what_peft_wrote_and_we_wrote_again_is_still_the_same_in_peft(tmp_path: Path) -> None:
    theirs = peft_model(tiny_model(), **SETTINGS["patterns"][2])
    theirs.save_pretrained(tmp_path / "a")
    model = tiny_model()
    load_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "b").eval()
    assert torch.equal(logits(again), logits(theirs))


def test_our_merge_is_pefts_merge() -> None:
    theirs = peft_model(tiny_model(), r=4, lora_alpha=6)
    model = attach(tiny_model(), LoraConfig(r=4, alpha=6))
    source = factors_of_peft(theirs)
    with torch.no_grad():
        for key, parameter in factors_of_ours(model).items():
            parameter.copy_(source[key])
    wanted = theirs.merge_and_unload().state_dict()
    found = merged_state(model)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert relative_error(found[key], wanted[key]) <= 1e-6, key


def test_the_names_in_the_file_are_pefts(adapter: Path) -> None:
    with safe_open(adapter / WEIGHTS, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        names = set(handle.keys())
    assert {f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"} <= names
    stored = json.loads((adapter / CONFIG).read_text())
    assert sorted(stored["target_modules"]) == sorted(LAYERS["llama"])
    assert (stored["peft_type"], stored["r"], stored["lora_alpha"], stored["use_rslora"]) == ("LORA", 4, 6, False)


def test_every_key_that_peft_writes_is_known_here(tmp_path: Path) -> None:
    peft_model(tiny_model(), r=4).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    layout = store.METHODS["lora"].delta.peft
    assert layout is not None
    known = {*layout.fields.values(), *layout.patterns.values(), *layout.constants}
    assert stored.keys() <= NEUTRAL.keys() | NEUTRAL_ANYWHERE.keys() | HARMLESS | known


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", False])
def test_starts_that_leave_the_base_alone_are_loaded(foreign: Path, start: Any) -> None:
    edit_config(foreign, init_lora_weights=start)
    model = tiny_model()
    load_adapter(model, foreign)
    assert torch.equal(logits(model), logits(ours()))


def test_a_bf16_adapter_of_another_tool_is_loaded_in_float32(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    model = tiny_model()
    load_adapter(model, foreign)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    wanted = load_file(foreign / WEIGHTS)[f"{Q0}.lora_B.weight"].float()
    assert torch.equal(factors_of_ours(model)["model.layers.0.self_attn.q_proj.B"], wanted)


# Another base ----------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_with_both_names(tmp_path: Path, base_folder: Path) -> None:
    model = load_base(str(base_folder), dtype="float32").model
    folder = save_adapter(perturbed("lora", model), tmp_path / "a")
    other = tiny_model(seed=1)
    message = refused(folder, base_folder.name, "LlamaForCausalLM", "weights differ", model=other, error=BaseModelError)
    assert message.count("sha256:") == 2


def test_one_changed_weight_is_another_base_and_is_named(adapter: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    refused(adapter, "1 of", "model.layers.1.mlp.up_proj.weight", model=model, error=BaseModelError)


def test_the_same_weights_used_otherwise_are_another_base(adapter: Path) -> None:
    refused(
        adapter,
        "the weights are the same",
        "rms_norm_eps is 0.1",
        model=tiny_model(rms_norm_eps=0.1),
        error=BaseModelError,
    )


def test_another_base_loads_where_it_is_trusted(adapter: Path) -> None:
    model = tiny_model(seed=1)
    load_adapter(model, adapter, trust_base=True)
    wanted = factors_of_ours(ours())
    assert all(torch.equal(p, wanted[key]) for key, p in factors_of_ours(model).items())


def test_a_base_in_bf16_is_the_base_that_it_is_in_fp32(base_folder: Path, tmp_path: Path) -> None:
    from graftlm.model.hub.fingerprint import fingerprint

    wide, narrow = (load_base(str(base_folder), dtype=d).model for d in ("float32", "bfloat16"))
    assert fingerprint(wide) == fingerprint(narrow)
    folder = save_adapter(perturbed("lora", wide), tmp_path / "a")
    assert "fingerprint match" in load_adapter(narrow, folder)


# Damage ----------------------------------------------------------------------------------------------------------


def test_a_missing_folder_names_the_nearest(adapter: Path) -> None:
    refused(adapter.parent / "adaptor", "no such adapter folder", "Did you mean", str(adapter))


def test_an_empty_folder_is_no_adapter(tmp_path: Path) -> None:
    refused(tmp_path, f"no {CONFIG}")


def test_a_folder_whose_adapter_is_in_a_folder_of_it_says_so(adapter: Path) -> None:
    refused(adapter.parent, f"no {CONFIG}", "adapters in its folders ['adapter']")


def test_a_folder_without_weights_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    refused(adapter, f"no {WEIGHTS}")


def test_pickled_weights_are_refused_unread(foreign: Path) -> None:
    (foreign / WEIGHTS).unlink()
    (foreign / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(foreign, "pickled (adapter_model.bin)", "safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\ud800"], ids=["empty", "cut", "list", "text", "bytes"])
def test_a_config_that_is_no_mapping_is_refused(foreign: Path, content: str) -> None:
    (foreign / CONFIG).write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(foreign, str(foreign / CONFIG))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(foreign: Path, share: float) -> None:
    whole = (foreign / WEIGHTS).read_bytes()
    (foreign / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    refused(foreign, str(foreign / WEIGHTS), "not a complete safetensors file")


def test_a_file_that_is_not_safetensors_is_refused(foreign: Path) -> None:
    (foreign / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(1000))
    refused(foreign, "not a complete safetensors file")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_one_flipped_byte_is_found_by_the_checksum(adapter: Path, file: str) -> None:
    content = bytearray((adapter / file).read_bytes())
    content[-9] ^= 1
    (adapter / file).write_bytes(content)
    refused(adapter, str(adapter / file), "checksum", f"delete {RECORD}")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "{",
        '{"base": {}, "config": {}, "sha256": {}}',
        '{"base": [], "config": {}, "sha256": {}}',
        '{"base": {"name": "a", "digest": "", "config": {}, "tensors": {}}, "config": {}, "sha256": {}}',
    ],
)
def test_a_record_that_is_incomplete_is_refused_not_skipped(adapter: Path, content: str) -> None:
    (adapter / RECORD).write_text(content)
    refused(adapter, str(adapter / RECORD))


def test_a_record_whose_config_was_edited_is_refused(adapter: Path) -> None:
    tree = json.loads((adapter / RECORD).read_text())
    tree["config"]["alhpa"] = 3
    (adapter / RECORD).write_text(json.dumps(tree))
    refused(adapter, str(adapter / RECORD), "alhpa", "'alpha'", error=GraftError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(foreign: Path, value: float) -> None:
    edit_tensors(foreign, lambda tensors: tensors[f"{Q0}.lora_A.weight"].fill_(value))
    refused(foreign, f"{Q0}.lora_A.weight", "NaN or infinity")


def test_weights_of_an_integer_dtype_are_refused_by_name(foreign: Path) -> None:
    edit_tensors(foreign, lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}))
    refused(foreign, f"{Q0}.lora_A.weight", "dtype torch.int8")


def test_a_missing_an_extra_and_a_mis_shaped_tensor_are_told_at_once_with_the_nearest_names(foreign: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.lora_a.weight"] = tensors.pop(f"{Q0}.lora_A.weight")
        tensors[f"{Q0}.lora_B.weight"] = tensors[f"{Q0}.lora_B.weight"].T.contiguous()

    edit_tensors(foreign, change)
    message = refused(foreign, str(foreign / WEIGHTS))
    missing, unexpected = (next(x for x in message.splitlines() if w in x) for w in ("missing:", "unexpected:"))
    assert f"missing: {Q0}.lora_A.weight. Did you mean" in missing
    assert f"'{Q0}.lora_a.weight'" in missing
    assert f"unexpected: {Q0}.lora_a.weight. Did you mean" in unexpected
    assert f"'{Q0}.lora_A.weight'" in unexpected
    assert f"{Q0}.lora_B.weight: has shape [4, 32], this model needs [32, 4]" in message


def test_an_adapter_of_a_wider_model_is_refused(tmp_path: Path) -> None:
    peft_model(tiny_model(intermediate_size=64), r=4).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", "up_proj.lora_B.weight", "[64, 4]", "[48, 4]")


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    peft_model(tiny_model("gpt2"), r=4).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", "does not fit this model", "none of its tensors", "transformer.h.0", "There is: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ["missing: ", "lora_magnitude_vector"]),
        ({"use_rlsora": True}, ["'use_rlsora' is unknown"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights='olora'"]),
        ({"peft_type": "NOHA"}, ["peft_type 'NOHA'"]),
        ({"peft_type": None}, ["peft_type None"]),
        ({"r": 0}, ["r: ", "greater than 0"]),
        ({"r": "four"}, ["r: ", "'four'"]),
        ({"rank_pattern": {"q_proj": 0}}, ["greater than 0"]),
        ({"rank_pattern": {"q_proj": 2}}, ["q_proj.lora_A.weight", "needs [2, 32]"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_a_config_of_another_tool_that_would_have_to_be_ignored_is_refused(
    foreign: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_config(foreign, **changes)
    refused(foreign, *words, error=GraftError)


def test_a_refusal_leaves_the_deltas_that_were_there(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"))
    refused(foreign, "missing", model=ours(name="old"))


# Writing ---------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_existing_folder_is_not_overwritten_unless_told(adapter: Path) -> None:
    before = files(adapter)
    with pytest.raises(OutputError, match="exists and would be lost.*--overwrite"):
        save_adapter(ours(LoraConfig(r=2)), adapter)
    assert files(adapter) == before
    (adapter / "extra").write_text("x")
    save_adapter(ours(LoraConfig(r=2)), adapter, overwrite=True)
    assert json.loads((adapter / CONFIG).read_text())["r"] == 2
    assert not (adapter / "extra").exists(), "what was in the old folder must not mix with the new"
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "text", "sync"])
def test_no_room_on_the_disk_is_said_and_what_was_there_stays(
    adapter: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(adapter)
    if where == "weights":
        monkeypatch.setattr(store, "save_file", full_disk)
    elif where == "text":
        monkeypatch.setattr(Path, "write_text", full_disk)
    else:
        monkeypatch.setattr(store.os, "fsync", full_disk)
    with pytest.raises(OutputError, match="no room on the disk") as raised:
        save_adapter(ours(LoraConfig(r=2)), adapter, overwrite=True)
    monkeypatch.undo()
    assert str(adapter) in str(raised.value)
    assert files(adapter) == before
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"], "nothing half-written may be left behind"


def test_no_room_as_safetensors_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise store.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", fails)
    with pytest.raises(OutputError, match="no room on the disk"):
        save_adapter(ours(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_any_other_failure_leaves_what_was_there_and_nothing_else(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(adapter)
    monkeypatch.setattr(store, "save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(ours(), adapter, overwrite=True)
    assert files(adapter) == before
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_a_failing_last_rename_puts_the_old_folder_back(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(adapter)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Any:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        save_adapter(ours(), adapter, overwrite=True)
    assert files(adapter) == before
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.os, "getpid", lambda: 7)
    (tmp_path / ".a.partial-7").mkdir()
    (tmp_path / ".a.partial-7" / "old").write_text("x")
    folder = save_adapter(ours(), tmp_path / "a")
    assert not (folder / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        save_adapter(ours(), tmp_path / "file" / "a")
    with pytest.raises(OutputError, match="exists and would be lost"):
        save_adapter(ours(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_folders_above_are_made(tmp_path: Path) -> None:
    assert (save_adapter(ours(), tmp_path / "x" / "y" / "a") / WEIGHTS).is_file()


def test_a_moved_adapter_still_loads(adapter: Path, tmp_path: Path) -> None:
    shutil.move(adapter, tmp_path / "elsewhere")
    model = tiny_model()
    load_adapter(model, tmp_path / "elsewhere")
    assert len(hosts(model)) == 14


def test_the_only_delta_needs_no_name_to_be_saved(tmp_path: Path) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=2), name="mine")
    save_adapter(model, tmp_path / "a")
    attach(model, LoraConfig(r=2), name="yours")
    with pytest.raises(AdapterError, match="no delta 'default'"):
        save_adapter(model, tmp_path / "b")
    save_adapter(model, tmp_path / "b", name="yours")
