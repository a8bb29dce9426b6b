"""The process and the machine: what graftlm changes, what it puts back, and where it runs."""

import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graftlm
from graftlm import cli, system
from graftlm.config.schema import build
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import TrainingError
from graftlm.generation.answer import answer
from graftlm.generation.generate import generate
from graftlm.model.attach import attach
from graftlm.planning.bench import bench
from graftlm.planning.estimate import estimate
from graftlm.planning.lr_range import lr_range_test
from graftlm.prepare import prepare_data, select_rows
from graftlm.recipe import Recipe
from graftlm.run import train
from tests.errors import raises

State = tuple[Any, ...]


def global_state() -> State:
    """What a caller of ours may have set, as values that compare."""
    _, keys, position, *rest = np.random.get_state()
    numbers = (random.getstate(), keys.tobytes(), position, *rest)  # type: ignore[union-attr]
    return (torch.get_rng_state().numpy().tobytes(), torch.get_num_threads(), dict(os.environ), *numbers)


@pytest.fixture
def set_state() -> Any:
    """A state that no call of ours would leave by accident."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(3)
    torch.manual_seed(123456789)
    torch.rand(5)
    random.seed(5)
    np.random.seed(6)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture
def recipe(base_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) + "\n" for n in range(16))
    )

    def make(**changes: Any) -> Recipe:
        tree = {
            "base": {"name": str(base_folder), "dtype": "float32"},
            "data": {"train": str(rows), "held_out": 2},
            "delta": {"method": "lora", "r": 2, "dropout": 0.1},
            "train": {"steps": 3, "batch_rows": 2, "threads": 1, "seed": 7},
            "report": {"max_new_tokens": 3},
        }
        return build(Recipe, tree | changes, source="test")

    return make


def test_training_leaves_the_global_state_alone(recipe: Any, tmp_path: Path, set_state: None) -> None:
    before = global_state()
    train(recipe(), tmp_path / "out")
    assert global_state() == before
    train(recipe(report={"trackers": ["tensorboard"], "answers": 0}), tmp_path / "tracked")
    assert global_state() == before


def test_training_that_raises_leaves_the_global_state_alone(
    recipe: Any, tmp_path: Path, set_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = global_state()
    seen: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        seen.append(torch.get_num_threads())
        torch.rand(3)
        raise TrainingError("in mid-run", code="in-mid-run")

    monkeypatch.setattr("graftlm.run.attach_deltas", fail)
    with raises("training/in-mid-run"):
        train(recipe(), tmp_path / "out")
    assert seen == [1], "the recipe's threads were in use"
    assert global_state() == before


@pytest.mark.slow
def test_planning_probing_measuring_and_choosing_leave_the_global_state_alone(
    recipe: Any, base_folder: Path, set_state: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = global_state()
    estimate(recipe())
    assert global_state() == before
    lr_range_test(recipe(), count=4)
    assert global_state() == before
    monkeypatch.setattr("graftlm.planning.bench.SQUARE", 64)
    bench(str(base_folder), threads=1)
    assert global_state() == before
    rows = str(recipe().data.sources()[0].path)
    chosen = recipe(select=[{"by": "less", "keep": 0.5, "target": rows}])
    data = prepare_data(recipe(), tokenizer)
    assert len(select_rows(chosen, data.rows, tokenizer)[0]) == 7
    assert global_state() == before


def test_answers_leave_the_global_state_alone_between_them_too(model: Any, tokenizer: Any, set_state: None) -> None:
    attach(model, LoraConfig(r=2))
    before = global_state()
    answer(model, tokenizer, "a question", max_new_tokens=3, temperature=1.0)
    assert global_state() == before
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9]]
    for _ in generate(model, prompts, stop_ids=[2], max_new_tokens=3, temperature=1.0):
        assert global_state() == before
    with pytest.raises(TypeError):
        next(generate(model, prompts, stop_ids=[2], max_new_tokens="three", temperature=1.0))  # type: ignore[arg-type]
    assert global_state() == before


def test_sampling_depends_on_the_seed_alone(model: Any) -> None:
    def sampled(seed: int) -> list[tuple[int, list[int]]]:
        return list(generate(model, [[5, 6], [7, 8]], stop_ids=[2], max_new_tokens=8, temperature=1.0, seed=seed))

    torch.manual_seed(1)
    first = sampled(3)
    torch.manual_seed(2)
    assert sampled(3) == first
    assert sampled(4) != first


IMPORT_EVERYTHING = """
import importlib, os, pkgutil
before = dict(os.environ)
import graftlm
names = [module.name for module in pkgutil.walk_packages(graftlm.__path__, "graftlm.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
changed = {key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)}
print(len(names), sorted(changed - THEIRS))
"""


@pytest.mark.slow
def test_importing_every_module_changes_no_environment_variable() -> None:
    """Those that a library sets by itself do not count."""
    libraries = "import torch, transformers, datasets, huggingface_hub, matplotlib, peft, tensorboard"
    theirs = (
        f"import os; before = dict(os.environ); {libraries}; THEIRS = set(os.environ.items()) - set(before.items())"
    )
    script = f"{theirs}; THEIRS = {{key for key, _ in THEIRS}}; os.environ.clear(); os.environ.update(before)"
    environment = {key: value for key, value in os.environ.items() if key not in system.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", script + IMPORT_EVERYTHING], env=environment, capture_output=True, text=True, check=True
    )
    count, _, changed = done.stdout.strip().partition(" ")
    assert int(count) > 150
    assert changed == "[]"


def test_this_module_does_not_import_torch() -> None:
    script = "import sys, graftlm.system, graftlm.recipes; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_tuning_sets_what_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in system.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert system.kernel_cache_capacity() == system.UNTUNED_KERNEL_CACHE
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "300")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    called: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, option: int, size: int) -> None:
            called.append((option, size))

    monkeypatch.setattr("ctypes.CDLL", lambda name: Libc())
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    system.tune_process()
    assert os.environ["LRU_CACHE_CAPACITY"] == "300"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    assert system.kernel_cache_capacity() == 300
    assert called == [system.MALLOC["MALLOC_MMAP_THRESHOLD_"]], "the user's own threshold stands"


def test_the_command_line_tunes_its_process() -> None:
    """What `main` sets is there when a command runs, and the Hugging Face hub reads it."""
    script = (
        "import os, sys; from graftlm import cli; sys.argv = ['graft', '--version']\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules\n"
        "from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY\n"
        "assert os.environ['LRU_CACHE_CAPACITY'] == '64'"
    )
    environment = {key: value for key, value in os.environ.items() if key not in system.ENVIRONMENT}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize(
    ("name", "machine", "level"),
    [
        ("Linux", "x86_64", "supported"),
        ("Linux", "aarch64", "untested"),
        ("Darwin", "arm64", "untested"),
        ("FreeBSD", "amd64", "untested"),
        ("Windows", "AMD64", "refused"),
    ],
)
def test_support_of_a_platform(name: str, machine: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: name)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    support = system.platform_support()
    assert support.level == level
    assert bool(support.limits) == (level != "supported"), "what is not supported says what does not work"


def test_windows_gets_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(cli, "app", lambda: pytest.fail("no command runs"))
    monkeypatch.setattr(cli, "tune_process", lambda: pytest.fail("nothing is set"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = capsys.readouterr().err.strip()
    assert end.value.code == 1
    assert message.startswith("error[platform/unsupported-system]: Windows ")
    assert "WSL" in message
    assert "\n" not in message
    with raises("platform/unsupported-system"):
        _ = graftlm.train
    assert graftlm.__version__


CPUINFO = {
    "x86": "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16 avx512_bf16x\n",
    "arm": "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve bf16\n",
}


@pytest.mark.parametrize(
    ("kind", "name", "flags"),
    [
        ("x86", "Some Xeon", ("avx2", "avx512f", "amx_tile", "amx_bf16")),
        ("arm", "aarch64", ("asimd", "bf16", "sve")),
    ],
)
def test_the_processor_is_read_from_the_system(
    kind: str, name: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_read", lambda file: CPUINFO[kind])
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    found = system.processor()
    assert (found.name, found.flags) == (name, flags)
    assert found.cores == os.cpu_count()
    assert 1 <= found.usable_cores <= found.cores


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               65536.
Pages active:                            400000.
Pages inactive:                           65536.
Pages speculative:                            0.
Pages wired down:                        100000.
"""


def test_free_memory_of_linux_of_a_container_and_of_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   1048576 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(system, "_read", lambda file: files.get(file, ""))
    assert system.memory().free_gib == 1
    assert system.memory().total_gib == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    files |= {"/sys/fs/cgroup/memory.max": f"{2**29}\n", "/sys/fs/cgroup/memory.current": f"{2**28}\n"}
    assert system.memory() == (0.5, 0.25)
    files.clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(system, "output", lambda *command: VM_STAT)
    assert system.memory().free_gib == 2


def test_generators_of_gpus_are_restored_where_they_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    states, restored = [torch.arange(4), torch.arange(5)], []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with system.preserve_global_state():
        pass
    assert restored == [], "a GPU that nobody uses is left alone"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(KeyError), system.preserve_global_state():
        raise KeyError
    assert [state.tolist() for state in restored[0]] == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


AUDITED = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args[1:])) if event in WATCHED else None)
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
from graftlm import cli
if PLANT:
    import socket
    try: socket.create_connection(("192.0.2.1", 9), timeout=0.01)
    except OSError: pass
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
print("sockets", len(seen), seen)
"""


@pytest.mark.slow
@pytest.mark.parametrize("plant", [False, True])
def test_a_run_opens_no_connection(plant: bool, base_folder: Path, tmp_path: Path) -> None:
    """Train and answer, with the hub's offline switch not set; a planted connection would be seen."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p {n}", "completion": f"c {n}"}) + "\n" for n in range(8)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {base_folder}\ndata: {{train: {rows}, held_out: 2}}\ndelta: {{method: lora, r: 2}}\n"
        "train: {steps: 1, batch_rows: 2}\nreport: {max_new_tokens: 2}\n"
    )
    environment = os.environ | {"GRAFT_CACHE": str(tmp_path / "cache")}
    unset = {"HF_HUB_OFFLINE", *(["GRAFT_TEST_SOCKETS"] if plant else [])}  # the latter: the guard of this very suite
    environment = {name: value for name, value in environment.items() if name not in unset}
    out = str(tmp_path / "out")
    for words in (
        ["train", str(recipe), "--out", out],
        ["generate", "--base", str(base_folder), "--adapter", out, "--prompt", "p", "--max-new-tokens", "2"],
    )[: 1 if plant else 2]:
        script = f"PLANT = {plant}\nimport sys; sys.argv = {['graft', *words]!r}\n{AUDITED}"
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("sockets 0 " not in done.stdout) == plant, done.stdout[-500:]
