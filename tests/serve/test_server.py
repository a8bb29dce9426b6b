"""The command: what it refuses to start with, what it prints, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from graftlm.cli import app
from graftlm.cli.serve import read_keys
from graftlm.errors import AdapterError, TargetError
from graftlm.serve import server


def start(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@pytest.fixture
def not_served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Servers are made and not run; returns what each was run with."""
    runs: list[Any] = []

    def run(service: Any, options: Any, listening: Any, on_ready: Any) -> None:
        on_ready()
        runs.append((service, options))
        service.close()

    monkeypatch.setattr(server, "run", run)
    return runs


def test_what_is_served_is_printed(served_base: Path, library: Path, not_served: list[Any]) -> None:
    found = start("--base", served_base, "--adapters", library, "--port", 0, "--slots", 2, "--max-requests", 3)
    assert found.exit_code == 0, found.output
    first, second = found.stdout.splitlines()
    assert first == "base tiny, adapters bot, hermes, peft, plain"
    assert second.startswith("ready on http://127.0.0.1:")
    ((service, options),) = not_served
    assert (service.catalog.pool.slots, service.worker.engine.max_requests) == (2, 3)
    assert not options.keys
    assert service.catalog.resolve(str(served_base)) is None, "the base answers to what the user called it, too"
    assert "warning" not in found.stderr


def test_merging_is_asked_for(served_base: Path, library: Path, not_served: list[Any]) -> None:
    asked = ("--base", served_base, "--adapters", library, "--port", 0, "--merge-after", 50, "--dtype")
    assert start(*asked, "float32").exit_code == 0
    ((service, _),) = not_served
    assert service.worker.engine.merging.after == 50
    refused = start(*asked, "bfloat16")
    assert isinstance(refused.exception, TargetError)
    assert refused.exception.code == "target/merge-not-possible"


def test_one_adapter_has_the_name_of_its_folder(served_base: Path, library: Path, not_served: list[Any]) -> None:
    found = start("--base", served_base, "--adapters", library / "plain", "--port", 0)
    assert found.stdout.startswith("base tiny, adapters plain\n")
    changes = start("--base", served_base, "--adapters", library / "plain", "--port", 0, "--allow-adapter-changes")
    assert changes.exit_code == 2
    assert start("--base", served_base, "--allow-adapter-changes").exit_code == 2
    assert len(not_served) == 1


def test_an_adapter_that_cannot_be_served_is_named(
    served_base: Path, library: Path, tmp_path: Path, not_served: list[Any]
) -> None:
    for name in ("plain", "bot"):
        (tmp_path / name).mkdir()
        for file in (library / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "bot" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    found = start("--base", served_base, "--adapters", tmp_path, "--port", 0)
    assert isinstance(found.exception, AdapterError)
    assert found.exception.code == "adapter/checksum-mismatch"
    assert "/bot/" in str(found.exception)
    assert not not_served


def test_another_host_without_a_key_is_warned_of(served_base: Path, not_served: list[Any]) -> None:
    found = start("--base", served_base, "--port", 0, "--host", "0.0.0.0")
    assert "--api-key" in found.stderr
    found = start("--base", served_base, "--port", 0, "--host", "0.0.0.0", "--api-key", "k")
    assert "warning" not in found.stderr
    assert not_served[1][1].keys == ["k"]


def test_a_port_that_is_taken_is_known_before_anything_is_read(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = start("--base", tmp_path / "nothing", "--port", taken.getsockname()[1])
    assert found.exit_code == 2
    assert "Choose another port" in " ".join(found.stderr.split())


def test_keys_come_from_options_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.delenv("GRAFT_API_KEY", raising=False)
    assert read_keys(None) == []
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert read_keys(["zero", f"@{tmp_path / 'keys'}"]) == ["zero", "one", "two"]
    monkeypatch.setenv("GRAFT_API_KEY", "e")
    assert read_keys(None) == ["e"]
    assert read_keys(["zero"]) == ["zero"]
    (tmp_path / "empty").write_text("\n")
    for given in ([""], [" "], [f"@{tmp_path / 'empty'}"], [f"@{tmp_path / 'none'}"]):
        with pytest.raises(typer.BadParameter):
            read_keys(given)
    monkeypatch.setenv("GRAFT_API_KEY", "")
    with pytest.raises(typer.BadParameter):
        read_keys(None)


@contextmanager
def running(*arguments: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "graftlm", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1].startswith("ready on "), lines
        yield process, lines[1].removeprefix("ready on ").split(",")[0].removesuffix("/v1")
    finally:
        process.kill()
        process.communicate()


LONG = {"model": "plain", "messages": [{"role": "user", "content": "a"}], "max_tokens": 400, "temperature": 0, "n": 8}


@pytest.mark.slow
@pytest.mark.parametrize("drain", [60, 0])
def test_a_signal_lets_running_answers_end_and_refuses_new_ones(served_base: Path, library: Path, drain: int) -> None:
    arguments = ("--base", served_base, "--adapters", library, "--drain-seconds", drain)
    with running(*arguments) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        body = {**LONG, "stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(line for line in lines if '"content":' in line)
            process.send_signal(signal.SIGTERM)
            if drain:
                while True:  # until the signal has come
                    new = httpx.post(f"{url}/v1/chat/completions", json=LONG | {"max_tokens": 1, "n": 1})
                    if new.status_code != 200:
                        break
                assert new.status_code == 503
                assert new.json()["error"]["code"] == "shutting_down"
            *_, before, last = lines
        if drain:
            assert last == "data: [DONE]"
            assert json.loads(before.removeprefix("data: "))["usage"]["completion_tokens"] > 0
        else:
            assert '"code":"shutting_down"' in last
        assert process.wait(30) == 0
