"""A plan loads no weight, counts what a run will count, and says which knob to turn."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graftlm.planning.estimate as estimate_module
from graftlm.cli import app
from graftlm.config.schema import build, to_yaml
from graftlm.data.batches.pack import Pack
from graftlm.deltas import METHODS
from graftlm.generation.sampling import Sampling
from graftlm.hub.load import load_base
from graftlm.hub.sketch import kinds_of_layer, only, sketch
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.kernels.backend import TORCH, Backend
from graftlm.kernels.cpu import unavailable
from graftlm.model.attach import attach
from graftlm.model.coverage import coverage
from graftlm.model.registry import hosts, parameters_of, trainable
from graftlm.planning import layers, step_time
from graftlm.planning.estimate import estimate
from graftlm.planning.generation import Load, held_out_load, rollouts_load
from graftlm.planning.memory import GIB, HEAP, HEAP_CHECKPOINTED, LiveBytes, kernel_count, live_bytes
from graftlm.planning.packs import shape_of
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.system import kernel_cache_capacity
from graftlm.testing import save_tiny_base
from graftlm.testing.deltas import tiny_config
from graftlm.training.passes import Passes
from graftlm.training.phases import attach_deltas
from tests.errors import raises

pytestmark = pytest.mark.usefixtures("without_pictures")

LAYERS = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("deep") / "base", num_hidden_layers=LAYERS)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"question {n} " * (1 + n % 5), "completion": f"the answer {n}"} for n in range(24)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks how long anything takes."""
    monkeypatch.setattr(step_time, "TRIES", 1)


def recipe(base_: Path, rows: Path, /, **sections: Any) -> Recipe:
    tree: dict[str, Any] = {"base": {"name": str(base_), "dtype": "float32"}, "data": {"train": str(rows)}}
    tree |= {"delta": {"method": "lora", "r": 4}, "train": {"steps": 3, "batch_rows": 6, "pack_tokens": 200}}
    for key, value in sections.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) and key != "delta" else value
    return build(Recipe, tree, source="test")


def loaded(made: Recipe) -> tuple[Any, Pack]:
    """The real model of a recipe with its deltas, and the largest pack."""
    data = prepare_data(made, load_tokenizer(made.base))
    model = load_base(made.base).model
    attach_deltas(made.setup(), model, data.examples, [[0]])
    for host in hosts(model).values():
        host.deltas.train()
    return model, shape_of(made, data.examples).largest


DELTAS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4},
    "dora": {"method": "dora", "r": 4},
    "vera": {"method": "vera", "r": 8},
    "bitfit": {"method": "bitfit"},
    "houlsby": {"method": "houlsby", "r": 4},
    "prompt": {"method": "prompt", "p": 5},
    "prefix": {"method": "prefix", "p": 5},
    "reslora": {"method": "reslora", "r": 4},
    "some layers": {"method": "lora", "r": 4, "targets": [f"layers.{n}.mlp.up_proj" for n in (3, 5, 6)]},
    "patterns": {"method": "lora", "r": 4, "patterns": {r"layers\.[24]\..*": {"r": 9}}},
}


@pytest.mark.sampled
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", DELTAS)
def test_activations_are_those_of_the_whole_model(name: str, checkpointing: bool, base: Path, rows: Path) -> None:
    made = recipe(base, rows, delta=DELTAS[name], train={"checkpointing": checkpointing})
    model, largest = loaded(made)
    counted = live_bytes(made, model, largest)
    # Where layers are run again, the layer in which most is in use may be another one than in the sketch.
    assert exact_activations(made) == pytest.approx(counted, rel=0.05 if checkpointing else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_tells_of_these_activations(checkpointing: bool, base: Path, rows: Path) -> None:
    made = recipe(base, rows, train={"checkpointing": checkpointing})
    planned = estimate(made)["parts"]["memory_gib"]["activations"]
    heap = HEAP_CHECKPOINTED if checkpointing else HEAP
    assert planned * GIB / heap == pytest.approx(exact_activations(made), abs=0.001 * GIB), "rounded"


def exact_activations(made: Recipe) -> float:
    """In bytes: what `plan` rounds."""
    data = prepare_data(made, load_tokenizer(made.base))
    largest = shape_of(made, data.examples).largest
    sketched, groups = layers.with_deltas(made)
    layers.with_teacher(made, sketched)
    return layers.over_layers(sketched, groups, lambda model: live_bytes(made, model, largest))


@pytest.mark.slow
def test_a_teacher_that_is_another_base_is_counted(base: Path, rows: Path, tmp_path: Path) -> None:
    larger = save_tiny_base(tmp_path / "larger", seed=5, hidden_size=64, num_hidden_layers=LAYERS + 2)
    loss = {"name": "distillation", "teacher": str(larger), "teacher_dtype": "float32"}
    made = recipe(base, rows, loss=loss)
    model, largest = loaded(made)
    assert exact_activations(made) == pytest.approx(live_bytes(made, model, largest), rel=0.02)
    teacher = layers.with_teacher(made, layers.with_deltas(made)[0])
    real = load_base(str(larger), dtype="float32").model
    assert teacher is not None
    assert teacher.sketch.base_bytes == sum(4 * t.numel() for t in (*real.parameters(), *real.buffers()))
    found = estimate(made)
    assert "teacher" in found["parts"]["memory_gib"]
    assert found["parts"]["time_s"]["other layers of the teacher"] >= 0
    alone = estimate(recipe(base, rows))["parts"]
    assert "teacher" not in alone["memory_gib"]
    assert "other layers of the teacher" not in alone["time_s"]


def test_kernels_are_counted_for_every_length_of_a_pack_and_of_a_segment(base: Path, rows: Path) -> None:
    made = recipe(base, rows, base={"dtype": "bfloat16"})
    products: set[Any] = set()
    model, largest = loaded(made)
    live_bytes(made, model, largest, products)
    tokens, segments = largest.ids.numel(), set(largest.lengths)
    assert len(segments) > 1
    of_pack = {shapes for _, shapes in products if any(tokens in size for size in shapes)}
    assert ((tokens, 32), (32, 48)) in of_pack, "up_proj"
    of_segments = {shapes for name, shapes in products if "bmm" in name} - of_pack
    assert len(of_segments) >= 2 * len(segments), "queries on keys, and probabilities on values"
    shape = shape_of(made, prepare_data(made, load_tokenizer(made.base)).examples)
    once = replace(shape, lengths=(1, len(segments)))
    assert kernel_count(products, once) == len(products)
    assert kernel_count(products, replace(shape, lengths=(10**6, 0))) == kernel_cache_capacity()
    assert kernel_count(products, replace(shape, lengths=(1, 0))) < len(products)
    assert kernel_count(set(), shape) == 0, "float32 products go elsewhere"


def test_live_bytes_are_those_in_use_at_one_time() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1  # 8,000 bytes
        del a
        c = b.view(10, 100)[:5]  # the memory of b
        del b
        d = torch.zeros(500)
    assert live.peak == 8000
    assert live.now == 6000
    del c, d
    assert live.now == 0


@pytest.mark.sampled
@pytest.mark.parametrize("name", METHODS)
def test_trainable_parameters_are_those_of_a_run_whatever_the_method(name: str, base: Path) -> None:
    config = tiny_config(name)
    made = sketch(str(base), [0])
    attach(made.model, config, start=False)
    sketched = [(key, p.shape) for key, p in trainable(made.model).items()]
    model = load_base(str(base), dtype="float32").model
    attach(model, config, start=False)
    assert sketched == [(key, p.shape) for key, p in trainable(model).items()]
    assert sum(shape.numel() for _, shape in sketched) == sum(p.numel() for p in parameters_of(model, "default"))


def test_a_plan_loads_no_weights_and_has_these_keys(base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors
    import transformers

    def loads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a plan must not load weights")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", loads)
    monkeypatch.setattr(safetensors, "safe_open", loads)
    monkeypatch.setattr("graftlm.hub.load.load_base", loads)
    found = estimate(recipe(base, rows))
    assert found.keys() >= {"peak_gib", "step_s", "tokens_per_s", "parts", "advice"}
    memory = found["parts"]["memory_gib"]
    assert memory.keys() == {
        "process", "base", "deltas", "gradients_and_optimizer", "activations", "kernels", "loading"
    }  # fmt: skip
    assert found["parts"]["time_s"].keys() == {
        "matrix products", "attention", "head and loss", "element-wise", "rest", "optimizer"
    }  # fmt: skip
    assert found["peak_gib"] >= memory["process"] + memory["base"]
    assert found["tokens_per_s"] > 0
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_passes_are_computed_by_the_backend_of_a_run(
    kernels: Any, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Backend] = []

    through = Passes.through

    def spied(self: Passes, model: Any) -> Any:
        seen.append(self.backend)
        return through(self, model)

    made = recipe(base, rows, base={"dtype": "bfloat16"})
    monkeypatch.setattr(Passes, "through", spied)
    estimate(replace(made, train=replace(made.train, kernels=kernels)))
    assert len(seen) > 2
    assert len(set(map(id, seen))) == 1
    ours = kernels == "auto" and not unavailable(torch.device("cpu"), torch.bfloat16)
    assert (seen[0] is TORCH) is not ours


def test_a_backend_that_cannot_compute_is_refused(base: Path, rows: Path) -> None:
    made = recipe(base, rows)
    with raises("training/kernels-unavailable", match=r"float32 on cpu"):
        estimate(replace(made, train=replace(made.train, kernels="ours")))


def test_base_and_deltas_are_counted_by_shape(base: Path, rows: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = load_base(str(base), dtype=dtype).model
        made = sketch(recipe(base, rows, base={"dtype": dtype}).base, [0])
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        assert made.base_bytes == weights + buffers
        assert made.file_bytes == (base / "model.safetensors").stat().st_size
    sites = 7 * LAYERS
    found = estimate(recipe(base, rows))
    assert found["trainable_parameters"] == sum(
        p.numel() for p in trainable(layers.with_deltas(recipe(base, rows))[0].model).values()
    )
    assert found["trainable_parameters"] == LAYERS * 4 * sum(
        d_in + d_out for d_in, d_out in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    )
    assert sites == 49


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_quantized_is_counted_in_its_dtype(base: Path, rows: Path, dtype: str) -> None:
    made = recipe(base, rows, base={"dtype": dtype, "quantization": "nf4"}).base
    model = load_base(made).model
    tensors = (*model.parameters(), *model.buffers())
    assert sketch(made, [0]).base_bytes == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=1e-3)


@pytest.mark.slow
def test_a_quantized_base_in_float32_is_not_told_to_take_half(base: Path, rows: Path) -> None:
    found = estimate(recipe(base, rows, base={"dtype": "float32", "quantization": "nf4"}))
    assert not [text for text in found["advice"] if "base.dtype" in text]


def test_layers_are_of_one_kind_where_they_need_the_same(base: Path, rows: Path) -> None:
    def kinds(delta: dict[str, Any]) -> list[list[int]]:
        made = sketch(str(base), [0])
        layers._attach_all(recipe(base, rows, delta=delta), made)
        return kinds_of_layer(made)

    assert kinds(DELTAS["lora"]) == [[0], [1, 2, 3, 4, 5, 6]]  # the lowest passes no gradient on
    assert kinds(DELTAS["some layers"]) == [[0, 1, 2], [3], [4], [5, 6]]
    assert kinds(DELTAS["patterns"]) == [[0], [1, 3, 5, 6], [2, 4]]
    assert kinds(DELTAS["prompt"]) == [[0, 1, 2, 3, 4, 5, 6]]


def test_the_whole_sketch_is_there_again_afterwards(base: Path) -> None:
    made = sketch(str(base), [2])
    with only(made, [2]) as model:
        assert len(model.model.layers) == 1
    assert list(made.model.model.layers) == made.layers
    assert [p.device.type for p in made.layers[3].parameters()] == ["meta"] * 9


def test_where_memory_is_short_the_knobs_are_named(base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "free_gib", lambda device: 0.0)
    monkeypatch.setattr(estimate_module, "LIBRARIES_GIB", 5.0)
    text = " ".join(estimate(recipe(base, rows))["advice"])
    for knob in ("train.pack_tokens=100", "train.checkpointing=true", "base.dtype=bfloat16"):
        assert knob in text


@pytest.mark.slow
def test_where_memory_is_ample_waste_is_named(base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "free_gib", lambda device: 1000.0)
    text = " ".join(estimate(recipe(base, rows, train={"checkpointing": True, "pack_tokens": 60}))["advice"])
    assert "train.checkpointing=false" in text
    assert "train.pack_tokens: a pack has" in text


@pytest.mark.parametrize(
    "kind", ["phi3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "mixtral"))]
)
def test_a_plan_says_what_the_deltas_and_the_quantization_of_the_whole_base_reach(
    kind: str, rows: Path, tmp_path: Path
) -> None:
    targets = {"gpt2": ["c_attn.q"], "phi3": ["qkv_proj.q", "gate_up_proj.up"], "mixtral": "all-linear"}
    more: dict[str, Any] = {"num_local_experts": 4} if kind == "mixtral" else {}
    folder = save_tiny_base(tmp_path / "base", model_type=kind, num_hidden_layers=LAYERS, **more)
    delta = {"method": "lora", "r": 2, "targets": targets[kind]}
    made = recipe(folder, rows, base={"name": str(folder), "quantization": "nf4"}, delta=delta)
    found = estimate(made)
    model = load_base(made.base).model
    attach(model, made.all_deltas()["default"])
    assert found["coverage"] == coverage(model).to_json()
    assert found["reach"] == coverage(model).lines()
    assert found["trainable_parameters"] == sum(p.numel() for p in trainable(model).values())
    assert bool(found["coverage"]["fused_experts"]) == (kind == "mixtral")


ONLINE: dict[str, Any] = {"samples": 4, "max_new_tokens": 6, "at_once": 5, "scorer": {"by": "exact"}}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["policy-gradient", "dpo", "kto", "supervised"])
def test_a_recipe_with_rl_holds_a_second_copy_and_trains_on_the_longest_answers(
    loss: str, base: Path, rows: Path
) -> None:
    made = recipe(base, rows, loss=loss, rl=ONLINE)
    found = estimate(made)
    memory = found["parts"]["memory_gib"]
    assert memory.keys() >= {"prepacked_weights", "generating"}
    assert "held_out_answers" not in memory
    assert found["peak_gib"] >= memory["generating"] >= memory["process"] + memory["base"]
    prompts = prepare_data(made, load_tokenizer(made.base)).examples
    answers = {"policy-gradient": 4, "dpo": 2, "kto": 4, "supervised": 1}[loss]
    assert found["largest_pack"]["supervised"] % (answers * ONLINE["max_new_tokens"]) == 0
    longest = max(len(prompt.answers[0]) for prompt in prompts)
    assert longest + answers * ONLINE["max_new_tokens"] <= found["largest_pack"]["tokens"] <= 200


def test_an_engine_of_rl_answers_as_many_at_a_time_as_a_step_has(base: Path, rows: Path) -> None:
    made = recipe(base, rows, loss="policy-gradient", rl=ONLINE)
    data = prepare_data(made, load_tokenizer(made.base))
    longest = max(len(prompt.answers[0]) for prompt in data.examples)
    sampling = Sampling(temperature=1.0)
    assert rollouts_load(made, data) == Load(5, longest, 6, sampling=sampling)
    many = replace(made, rl=replace(made.rl, at_once=100))  # type: ignore[type-var]
    assert rollouts_load(many, data) == Load(6 * 4, longest, 6, sampling=sampling)


@pytest.mark.slow
def test_held_out_answers_are_a_part_of_the_peak(base: Path, rows: Path) -> None:
    made = recipe(base, rows, data={"held_out": 8}, report={"answers": 5, "max_new_tokens": 9})
    data = prepare_data(made, load_tokenizer(made.base))
    load = held_out_load(made, data)
    prompts = [data.renderer.prompt(row.messages[:-1]) for row in data.held_out_rows[:5]]
    assert load == Load(5, max(map(len, prompts)), 9, prepack=False), "a call of its own holds no second copy"
    many = replace(made, report=replace(made.report, max_new_tokens=8000))
    longer = held_out_load(many, data)
    assert longer is not None
    assert longer.requests == 2, "an engine holds 16,384 tokens"
    found = estimate(made)
    assert found["peak_gib"] >= found["parts"]["memory_gib"]["held_out_answers"]
    none = estimate(recipe(base, rows, data={"held_out": 8}, report={"answers": 0}))
    assert "held_out_answers" not in none["parts"]["memory_gib"]


@pytest.mark.slow
def test_where_the_cache_is_not_known_it_is_said(rows: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"state_size": 4, "conv_kernel": 2, "expand": 2, "time_step_rank": 4}
    folder = save_tiny_base(tmp_path / "base", model_type="mamba", **sizes)
    delta = {"method": "lora", "r": 2, "targets": "all-linear"}
    found = estimate(recipe(folder, rows, delta=delta, data={"held_out": 4, "pack": False}))
    assert any("memory of answers is not counted" in line for line in found["advice"])
    assert "held_out_answers" not in found["parts"]["memory_gib"]


def test_the_command_prints_json_and_text(base: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(base, rows)))
    shown = CliRunner().invoke(app, ["estimate", str(file), "train.pack_tokens=100", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["largest_pack"]["tokens"] <= 100
    text = CliRunner().invoke(app, ["estimate", str(file)]).stdout
    assert "peak memory" in text
    assert "deltas sit on 100% of the decoder's weights" in text
    assert "tokens/s" in text


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)
