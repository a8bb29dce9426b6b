"""Adapter folders of another tool, damaged at random: each is refused by name, or loads to the same numbers.

There is no checksum in such a folder. So what changes a number and leaves all shapes is no damage that could be seen,
and is not tried here: a value inside a tensor, another alpha, the tensors of two layers exchanged.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.adapters.folder import CONFIG, TEMPLATE, WEIGHTS
from graftlm.adapters.load import load_adapter
from graftlm.errors import GraftError
from graftlm.hub.load import load_base
from graftlm.model.attach import detach
from graftlm.model.registry import attachment
from graftlm.testing import tiny_model, tiny_tokenizer
from graftlm.testing.deltas import close, logits
from tests.peers import peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

LM: Any = {"task_type": "CAUSAL_LM"}


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, **settings, **LM)


SOURCES: dict[str, Any] = {
    "lora": lora(target_modules=["q_proj", "v_proj", "down_proj"]),
    "patterns": lora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 9}),
    "dora": lora(target_modules=["q_proj", "up_proj"], use_dora=True),
    "head": lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "tokens": lora(target_modules=["q_proj"], trainable_token_indices=[5, 290, 7]),
    "biases": lora(target_modules=["q_proj", "v_proj"], bias="lora_only", lora_bias=True),
    "embeddings": lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], **LM),
    "ia3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **LM),
    "own tokens": peft.TrainableTokensConfig(token_indices=[5, 290, 7], **LM),
}


class Source(NamedTuple):
    """An adapter that is whole, the model that it belongs to, and what this computes without and with it."""

    folder: Path
    model: Any
    bare: Tensor
    tuned: Tensor


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Each on the same base, with a tokenizer that has two tokens more than the base's."""
    root = tmp_path_factory.mktemp("sources")
    tiny_model("qwen2", vocab_size=320, tie_word_embeddings=False).save_pretrained(root / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(root / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|tool|>"]})
    made = {}
    for name, settings in SOURCES.items():
        model, _ = load_base(root / "base", dtype="float32")
        theirs = peft_adapter(settings, load_base(root / "base", dtype="float32").model, root / name)
        tokenizer.save_pretrained(root / name)
        bare = logits(model)
        load_adapter(model, root / name)
        tuned = logits(model)
        close(tuned, logits(theirs), name)
        detach(model)
        made[name] = Source(root / name, model, bare, tuned)
    return made


# Damages ---------------------------------------------------------------------------------------------------------

SAME: tuple[str, ...] = ()
"""What a damage returns that must not matter; the others return the words of which an error must have one."""


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file({key: tensor.contiguous().clone() for key, tensor in found.items()}, folder / WEIGHTS)


def config(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def some_key(random: Random, folder: Path) -> str:
    return random.choice(sorted(load_file(folder / WEIGHTS)))


def one_lost(random: Random, folder: Path) -> tuple[str, ...]:
    key = some_key(random, folder)
    tensors(folder, lambda found: found.__delitem__(key))
    copied = "base_layer.weight" in key  # of what is frozen: it is not needed
    last = not load_file(folder / WEIGHTS)
    return SAME if copied else (module_of(key), "trainable_token_indices", *([WEIGHTS] if last else []))


def module_of(key: str) -> str:
    for end in (".lora_", ".base_layer", ".token_adapter", ".weight"):
        key = key.partition(end)[0]
    return key


def one_more(random: Random, folder: Path) -> tuple[str, ...]:
    key = some_key(random, folder)
    other = random.choice(
        [
            key.replace(".weight", ".lora_C.weight") if ".weight" in key else f"{key}.more",
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.up_proj.weight",
            "base_model.model.vision_tower.layers.0.fc.lora_B.weight",
            "step",
        ]
    )
    tensors(folder, lambda found: found.update({other: torch.randn(4, 32)}))
    return (other, module_of(other))


def one_renamed(random: Random, folder: Path) -> tuple[str, ...]:
    key = some_key(random, folder)
    place = random.randrange(min(len("base_model.model."), len(key) - 6), len(key))
    other = key[:place] + random.choice("XZ#") + key[place + 1 :]
    tensors(folder, lambda found: found.update({other: found.pop(key)}))
    return (other, key, module_of(key), module_of(other), WEIGHTS)


def all_wrapped(random: Random, folder: Path) -> tuple[str, ...]:
    rename = random.choice(
        [
            lambda key: f"_orig_mod.{key}",
            lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
            lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."),
            lambda key: key.removeprefix("base_model.model."),
            lambda key: key.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight"),
        ]
    )

    def change(found: dict[str, Tensor]) -> None:
        for key in sorted(found):
            found[rename(key)] = found.pop(key)

    tensors(folder, change)
    return SAME


def not_finite(random: Random, folder: Path) -> tuple[str, ...]:
    key, value = some_key(random, folder), random.choice([torch.nan, torch.inf, -torch.inf])

    def change(found: dict[str, Tensor]) -> None:
        found[key].view(-1)[random.randrange(found[key].numel())] = value

    tensors(folder, change)
    return (key,)


def other_shape(random: Random, folder: Path) -> tuple[str, ...]:
    key = some_key(random, folder)

    def change(found: dict[str, Tensor]) -> None:
        t = found[key]
        forms = [t.flatten() if t.dim() > 1 else t[None], torch.cat([t, t]), t[:-1], t[:0], t[None], t.new_zeros(())]
        found[key] = random.choice([*forms, *([t.T] if t.dim() > 1 and t.shape[0] != t.shape[1] else [])])

    tensors(folder, change)
    return (key, module_of(key))


def other_dtype(random: Random, folder: Path) -> tuple[str, ...]:
    key = some_key(random, folder)
    dtype = random.choice([torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8, torch.float64])
    tensors(folder, lambda found: found.update({key: found[key].to(dtype)}))
    return SAME if dtype == torch.float64 else (key, module_of(key))


def factors_exchanged(random: Random, folder: Path) -> tuple[str, ...]:
    names = load_file(folder / WEIGHTS)
    pairs = [("lora_A", "lora_B"), ("hada_w1_a", "hada_w1_b"), ("vera_lambda_b", "vera_lambda_d")]
    keys = [(key, key.replace(*pair)) for pair in pairs for key in sorted(names) if pair[0] in key]
    key, other = random.choice([*keys, ("", "")])
    if not key or names[key].shape == names[other].shape:
        return SAME

    def change(found: dict[str, Tensor]) -> None:
        found[key], found[other] = found[other], found[key]

    tensors(folder, change)
    return (key,)


def cut(random: Random, folder: Path) -> tuple[str, ...]:
    file = folder / random.choice([CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
    whole = file.read_bytes()
    file.write_bytes(whole[: random.randrange(len(whole) - 2)])
    return (str(file), str(folder / "tokenizer.json"))


def gone(random: Random, folder: Path) -> tuple[str, ...]:
    file = folder / random.choice([CONFIG, WEIGHTS, "tokenizer.json"])
    file.unlink()
    return SAME if file.name == "tokenizer.json" else (file.name,)


def other_header(random: Random, folder: Path) -> tuple[str, ...]:
    """One byte of what is in front of the tensors."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    size = int.from_bytes(content[:8], "little")
    place = random.randrange(8 + size)
    content[place] ^= 1 << random.randrange(8)
    (folder / WEIGHTS).write_bytes(content)
    return ("?", WEIGHTS)


def config_is_another(random: Random, folder: Path) -> tuple[str, ...]:
    text = random.choice(["", "[]", "null", '"lora"', "{", "{}", "\x00\xff", '{"peft_type": null}', '{"r": 4, "r": 4}'])
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    return (CONFIG,)


WRONG: dict[str, list[Any]] = {
    "r": [8, 0, -4, 4.5, "4", None, [4], True],
    "lora_alpha": ["6", None, [6], True, 0, -6, {"q_proj": 6}],
    "use_dora": ["yes", 1.5],
    "use_rslora": ["no", 7],
    "bias": ["some", 3],
    "peft_type": ["LOHA", "IA3", "lora", None, 7, "GRAFTLM", "PROMPT_TUNING"],
    "target_modules": [7, ["q_proj", 7], "(q", {"q_proj": 1}],
    "rank_pattern": [{"q_proj": 7}, {"q_proj": "2"}, [4], "q_proj", {"(": 4}, {"q_proj": 0}],
    "alpha_pattern": [{"q_proj": "2"}, 3, {"(": 4}],
    "modules_to_save": [7, ["mlp"], "lm_head"],
    "trainable_token_indices": [[5], [1, 2, 3, 4], "5", [5, 290, 999], [5, 5, 7], {"wte": [5, 290, 7]}],
    "layers_to_transform": ["1", [-1], 0.5],
    "init_lora_weights": ["pissa", "olora", "loftq", 3],
    "lora_bias": ["yes", 2],
    "lora_dropout": ["0.1", 2, -1],
    "layer_replication": [[[0, 2], [1, 2]]],
    "a_key_of_tomorrow": [True, 1, "x", [1]],
    "use_qalora": [True],
    "target_parameters": [["mlp.experts"]],
}


def known_key(random: Random, folder: Path, values: dict[str, list[Any]]) -> str:
    """A key that the config has, or one that nobody knows."""
    known = {*json.loads((folder / CONFIG).read_text()), "a_key_of_tomorrow"}
    return random.choice(sorted(known & values.keys()))


def wrong_value(random: Random, folder: Path) -> tuple[str, ...]:
    key = known_key(random, folder, WRONG)
    before = json.loads((folder / CONFIG).read_text()).get(key)
    value = random.choice(WRONG[key])
    config(folder, **{key: value})
    if value == before and type(value) is type(before):
        return SAME
    ours = {"lora_alpha": "alpha", "use_rslora": "rslora", "lora_dropout": "dropout", "alpha_pattern": "alpha"}
    return (key, ours.get(key, "r: "), WEIGHTS, *([CONFIG] if key == "peft_type" else []))


HARMLESS: dict[str, list[Any]] = {
    "base_model_name_or_path": ["another/name", None],
    "task_type": ["SEQ_CLS", None],
    "target_modules": [None, [], ["q_proj"], ["nothing"], "all-linear-but-not"],
    "exclude_modules": [["down_proj"], "nothing"],
    "layers_to_transform": [None, [], [0, 1]],
    "fan_in_fan_out": [True, False, None],
    "inference_mode": [False],
    "peft_version": ["0.3.0", "99.0"],
    "a_key_of_tomorrow": [None, False, {}, []],
    "init_lora_weights": [True, False, "gaussian", None],
    "revision": ["main"],
    "lora_dropout": [0.5, 0],
    "eva_config": [{"rho": 2.0}],
}


def harmless_value(random: Random, folder: Path) -> tuple[str, ...]:
    key = known_key(random, folder, HARMLESS)
    config(folder, **{key: random.choice(HARMLESS[key])})
    return SAME


def key_lost(random: Random, folder: Path) -> tuple[str, ...]:
    """One whose default says the same, or whose loss shows in the tensors."""
    tree = json.loads((folder / CONFIG).read_text())
    changing = {"lora_alpha", "alpha", "alpha_pattern", "use_rslora"}  # their loss would be another scale
    key = random.choice(sorted(tree.keys() - changing))
    value = tree.pop(key)
    (folder / CONFIG).write_text(json.dumps(tree))
    needed = ["r", "peft_type", "rank_pattern", "use_dora", "modules_to_save", "trainable_token_indices", "lora_bias"]
    needed.append("token_indices")
    shows = key in needed and value or (key == "bias" and value != "none")
    return (key, WEIGHTS, CONFIG) if shows else SAME


def other_ids(random: Random, folder: Path) -> tuple[str, ...]:
    tree = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    one, other = random.sample(sorted(vocabulary)[20:], 2)
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return (str(folder),)


def more_tokens(random: Random, folder: Path) -> tuple[str, ...]:
    """As many as there are embeddings for, or more."""
    count = random.choice([3, 18, 60])
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in range(count)]})
    tokenizer.save_pretrained(folder)
    return SAME if len(tokenizer) <= 320 else (str(folder),)


def other_template(random: Random, folder: Path) -> tuple[str, ...]:
    """It changes no number; one that is no text is refused."""
    text = random.choice([b"{{ messages }}", b"", b"{% endfor %}", b"\xff\xfe\x00"])
    (folder / TEMPLATE).write_bytes(text)
    return (TEMPLATE, "tokenizer.json") if b"\xff" in text else SAME


DAMAGES: list[Callable[[Random, Path], tuple[str, ...]]] = [
    one_lost, one_more, one_renamed, all_wrapped, not_finite, other_shape, other_dtype, factors_exchanged, cut, gone,
    other_header, config_is_another, wrong_value, harmless_value, key_lost, other_ids, more_tokens, other_template,
]  # fmt: skip


def damaged(number: int, sources: dict[str, Source], tmp_path: Path) -> None:
    random = Random(number)
    name = random.choice(sorted(sources))
    damage = DAMAGES[number % len(DAMAGES)]
    source, folder = sources[name], tmp_path / "damaged"
    shutil.copytree(source.folder, folder)
    words = damage(random, folder)
    what = f"{damage.__name__}, number {number}, of {name}"
    refusal = ""
    try:
        load_adapter(source.model, folder)
    except GraftError as error:
        refusal = str(error)
    if refusal:
        assert words != SAME, f"{what} was refused: {refusal}"
        assert any(word in refusal for word in words), f"{what}: none of {words} is in: {refusal}"
        assert torch.equal(logits(source.model), source.bare), what
    else:
        assert torch.equal(logits(source.model), source.tuned), f"{what} changed the numbers"
        assert words == SAME or words[0] == "?", f"{what} was not noticed"
        detach(source.model)
    assert attachment(source.model).configs == {}
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_damaged_adapter_is_refused_by_name_or_loads_to_the_same_numbers(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    for number in range(60):
        damaged(number, sources, tmp_path)


@pytest.mark.long(group="damage")
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_many_damaged_adapters(start: int, sources: dict[str, Source], tmp_path: Path) -> None:
    for number in range(start, start + 100):
        damaged(number, sources, tmp_path)
