"""What answering is estimated to take is what an engine holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from graftlm.adapters.save import save_adapter
from graftlm.cli import app
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.generation.sampling import Sampling
from graftlm.hub.config import BaseConfig
from graftlm.hub.load import load_base
from graftlm.hub.sketch import Sketch, sketch
from graftlm.kernels.prepacked import PANEL, _panels_serve, can_prepack
from graftlm.model.attach import attach
from graftlm.model.registry import hosts
from graftlm.planning.generation import Load, adapter_bytes, estimate_generation, generation_bytes, why_not_counted
from graftlm.planning.layers import some_layers
from graftlm.testing import save_tiny_base
from graftlm.testing.deltas import tiny_config
from tests.errors import raises

PROMPT, NEW, REQUESTS, LAYERS = 40, 6, 3, 6

BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_positions": 512},
    "gemma2": {"sliding_window": 16},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sizes are multiples of 64, so that oneDNN fills nothing up."""
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    sizes["num_hidden_layers"] = LAYERS
    return {
        name: save_tiny_base(folder / name, **({"model_type": name} | sizes | changes))
        for name, changes in BASES.items()
    }


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def sketched(base: BaseConfig, *methods: str) -> tuple[Sketch, list[list[int]]]:
    def make(real: Any) -> Sketch:
        made = sketch(base, real)
        for method in methods:
            attach(made.model, tiny_config(method), name=method, start=False)
        return made

    return some_layers(make)


def running(base: BaseConfig, *methods: str) -> Engine:
    """An engine in the middle of the answers to REQUESTS prompts."""
    model = load_base(base).model
    for method in methods:
        attach(model, tiny_config(method), name=method)
    engine = Engine(model)
    for number in range(REQUESTS):
        engine.submit(Request([5 + number] * PROMPT, NEW))
    engine._step()
    assert len(engine._running) == REQUESTS
    return engine


def cache_bytes(engine: Engine) -> int:
    return sum(t.nbytes for one in engine._running for layer in one.cache.layers for t in layer)


def bytes_of(packed: torch.Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes(packed)) if packed.is_mkldnn else packed.nbytes


def rows(count: int) -> int:
    """Of a packed weight: panels are whole."""
    return -(-count // PANEL) * PANEL if _panels_serve(torch.float32) else count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BASES)
def test_cache_and_prepacked_weights_are_those_of_an_engine(name: str, dtype: Any, bases: dict[str, Path]) -> None:
    base = BaseConfig(name=str(bases[name]), dtype=dtype)
    found = generation_bytes(*sketched(base), Load(REQUESTS, PROMPT, NEW))
    engine = running(base)
    assert found.cache == cache_bytes(engine)
    assert found.cache == found.cache_per_token * REQUESTS * (PROMPT + NEW - 1)
    assert engine.products is not None
    packed = [bytes_of(product.layout.weight) for product in engine.products.values()]
    assert found.prepacked_weights == sum(packed)
    assert bool(packed) == can_prepack(engine.model.get_output_embeddings())


def test_llama_has_keys_and_values_of_its_shared_heads(bases: dict[str, Path]) -> None:
    base = BaseConfig(name=str(bases["llama"]), dtype="float32")
    found = generation_bytes(*sketched(base), Load(1, PROMPT, NEW))
    assert found.cache_per_token == LAYERS * 2 * 2 * 32 * 4, "layers, keys and values, heads, size, float32"
    sites = 2 * 128 * rows(128) + 2 * 128 * rows(64) + 2 * 128 * rows(192) + 192 * rows(128)
    assert found.prepacked_weights == 4 * (LAYERS * sites + rows(320) * 128), "linear layers, and the tied head"


def test_gpt2_has_one_linear_layer_alone(bases: dict[str, Path]) -> None:
    base = BaseConfig(name=str(bases["gpt2"]), dtype="float32")
    found = generation_bytes(*sketched(base), Load(1, PROMPT, NEW))
    assert found.prepacked_weights == 4 * rows(320) * 128, "the head: the others are Conv1D"
    assert generation_bytes(*sketched(base), Load(1, PROMPT, NEW, prepack=False)).prepacked_weights == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_weights_are_those_of_an_engine(name: str, bases: dict[str, Path]) -> None:
    base = BaseConfig(name=str(bases[name]), dtype="float32")
    found = generation_bytes(*sketched(base, "lora"), Load(REQUESTS, PROMPT, NEW, merge=True))
    model = load_base(base).model
    attach(model, tiny_config("lora"), name="lora")
    engine = Engine(model, merge_after=1)
    engine.wait(engine.submit(Request([5] * PROMPT, 3)))
    copied = engine._inference_copy().model
    merged = [host.merged[1] for host in copied.modules() if getattr(host, "merged", None) is not None]
    assert found.merged_weights == sum(bytes_of(product.layout.weight) for product in merged)
    assert bool(merged) == (name == "llama"), "GPT-2's layers are Conv1D, which are not prepacked"
    assert generation_bytes(*sketched(base, "lora"), Load(REQUESTS, PROMPT, NEW)).merged_weights == 0
    assert (
        found.total
        == generation_bytes(*sketched(base, "lora"), Load(REQUESTS, PROMPT, NEW)).total + found.merged_weights
    )


@pytest.mark.parametrize("method", ["lora", "vera", "houlsby", "prefix", "prompt"])
def test_adapters_and_their_prefixes_are_counted(method: str, bases: dict[str, Path]) -> None:
    base = BaseConfig(name=str(bases["llama"]), dtype="bfloat16")
    made, groups = sketched(base, method)
    found, engine = generation_bytes(made, groups, Load(REQUESTS, PROMPT, NEW)), running(base, method)
    assert found.cache == cache_bytes(engine)
    before = [one.cache.before for one in engine._running]
    assert found.prefixes == sum(tensor.nbytes for tensor in before if tensor is not None)
    assert bool(found.prefixes) == (method in ("prefix", "prompt"))
    assert engine.products is not None
    packed = sum(bytes_of(product.layout.weight) for product in engine.products.values())
    assert found.prepacked_weights == packed
    tensors = dict[int, int]()
    for key, tensor in [*engine.model.named_parameters(), *engine.model.named_buffers()]:
        if ".deltas." in key or key.startswith("graft_shared"):
            tensors[id(tensor)] = tensor.nbytes
    assert adapter_bytes(made.model) == sum(tensors.values()) > 0


def test_logits_and_their_sums_are_counted_for_each_request(bases: dict[str, Path]) -> None:
    base = BaseConfig(name=str(bases["llama"]), dtype="float32")
    made, groups = sketched(base)
    greedy, sampled = (
        generation_bytes(made, groups, Load(REQUESTS, PROMPT, NEW, sampling=sampling)).logits
        for sampling in (Sampling(), Sampling(temperature=1.0))
    )
    assert REQUESTS * 320 * 4 <= greedy < 1.1 * REQUESTS * 320 * 4, "logits in float32"
    wanted = REQUESTS * 320 * (4 + 4 + 8)
    assert wanted <= sampled < 1.1 * wanted, "logits, probabilities, and their sums in float64"


def test_activations_grow_with_the_prompts_of_a_step(bases: dict[str, Path]) -> None:
    made, groups = sketched(BaseConfig(name=str(bases["llama"]), dtype="float32"))
    one, several, more = (
        generation_bytes(made, groups, Load(requests, 64, NEW)).activations for requests in (1, 4, 100)
    )
    assert 64 * 192 * 4 < one < several < more, "an MLP's hidden values"
    assert more == generation_bytes(made, groups, Load(1000, 64, NEW)).activations, "a step takes no more"


def test_a_model_that_transformers_answers_for_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"state_size": 4, "conv_kernel": 2, "expand": 2, "time_step_rank": 4}
    base = BaseConfig(name=str(save_tiny_base(tmp_path / "base", model_type="mamba", **sizes)), dtype="float32")
    assert why_not_counted(*sketched(base))
    with raises("base/unknown-cache-size"):
        estimate_generation(base, [], Load(1, PROMPT, NEW))


def test_adapters_of_folders_are_in_memory(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(bases["llama"]), dtype="float32").model
    attach(model, tiny_config("lora"))
    save_adapter(model, tmp_path / "adapter")
    tensors = [t for host in hosts(model).values() for t in host.deltas.parameters()]
    base = BaseConfig(name=str(bases["llama"]), dtype="float32")
    found = estimate_generation(base, [tmp_path / "adapter"] * 2, Load(REQUESTS, PROMPT, NEW))
    memory = found["parts"]["memory_gib"]
    assert memory["adapters"] == round(2 * sum(t.nbytes for t in tensors) / 2**30, 3)
    assert found["peak_gib"] >= memory["process"] + memory["base"]
    with raises("adapter/does-not-fit-model"):
        estimate_generation(str(bases["gpt2"]), [tmp_path / "adapter"], Load(1, PROMPT, NEW))


def test_positions_of_a_table_end(bases: dict[str, Path]) -> None:
    load = Load(1, 510, 3)
    estimate_generation(str(bases["llama"]), [], load)
    with raises("base/too-few-positions", match="512"):
        estimate_generation(str(bases["gpt2"]), [], load)


def test_the_command_prints_text_and_json(bases: dict[str, Path]) -> None:
    options = ["estimate", "--base", str(bases["llama"]), "--requests", "8", "--dtype", "float32"]
    text = CliRunner().invoke(app, options)
    assert text.exit_code == 0, text.output
    for word in ("peak memory", "prepacked weights", "cache", f"{LAYERS * 2 * 2 * 32 * 4:,} bytes for each token"):
        assert word in text.stdout
    assert "a step" not in text.stdout
    shown = json.loads(CliRunner().invoke(app, [*options, "--prompt-tokens", "100000", "--json"]).stdout)
    assert shown["parts"]["memory_gib"]["cache"] == round(8 * (100000 + 127) * LAYERS * 512 / 2**30, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["recipe.yaml", "--base", "smollm2"],
        ["recipe.yaml", "--requests", "4"],
        ["recipe.yaml", "--adapter", "adapter"],
        ["recipe.yaml", "--dtype", "bfloat16"],
        ["--base", "smollm2", "--requests", "0"],
    ],
)
def test_a_recipe_and_a_base_do_not_go_together(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["estimate", *arguments]).exit_code == 2
