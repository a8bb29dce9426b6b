"""The guards and the tiers of the tests themselves: sessions in which a mistake is planted must fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graftlm.files import cache_folder
from tests.guards import session_folder
from tests.guards.sitecustomize import is_loopback
from tests.tiers import SAMPLE, sample

ROOT = Path(__file__).parent.parent
ELSEWHERE = "192.0.2.1"  # reserved for documentation, and so nobody's: RFC 5737

CONNECTS = f"""
import socket
with socket.socket() as s:
    s.settimeout(0.1)
    try:
        s.connect(("{ELSEWHERE}", 80))
    except OSError:
        pass  # as code that works without a network does
"""


def environment() -> dict[str, str]:
    """That of a session of its own, which takes itself for the first process and not for a worker of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def session(folder: Path, test: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A session with the guards of this one and a single test."""
    (folder / "test_planted.py").write_text(f"import subprocess, sys\n\n\ndef test_planted():\n{test}\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.guards", "-p", "no:cacheprovider", *options]
    command += ["--rootdir", str(folder), "-c", os.devnull, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.strip().splitlines())


# Guards ----------------------------------------------------------------------------------------------------------


def test_this_session_keeps_its_cache_and_its_home_to_itself() -> None:
    assert cache_folder().is_relative_to(session_folder()), "or a test has left its own GRAFT_CACHE behind"
    assert Path.home().is_relative_to(session_folder())


def test_a_session_that_uses_nothing_passes(tmp_path: Path) -> None:
    done = session(tmp_path, "    pass")
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert "sockets: 0 connections, 0 addresses used, 0 outside of loopback" in done.stdout


def test_loopback_is_counted_and_allowed(tmp_path: Path) -> None:
    code = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
    pass
"""
    done = session(tmp_path, indented(code))
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert ", 0 outside of loopback" in done.stdout
    assert "sockets: 0 connections" not in done.stdout


@pytest.mark.parametrize(
    ("host", "stays"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), (None, True), (b"127.0.0.1", True),
     ("10.0.0.1", False), ("2001:db8::1", False), ("fe80::1%eth0", False), ("127.0.0.1.example.com", False),
     ("0.0.0.0", False), ("localhost.example.com", False)],
)  # fmt: skip
def test_what_is_loopback(host: str | bytes | None, stays: bool) -> None:
    assert is_loopback(host) is stays


@pytest.mark.parametrize("workers", [0, 1])
def test_a_connection_that_leaves_the_machine_fails_the_session(workers: int, tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CONNECTS!r}], check=True)"
    code = f"{CONNECTS}\n{child}\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = session(tmp_path, indented(code), *(["-n", str(workers)] if workers else []))
    assert "1 passed" in done.stdout, "the test itself does not notice"
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    used = [line for line in done.stdout.splitlines() if f"outside socket.connect '{ELSEWHERE}'" in line]
    assert len(used) == 3, "in the test, in its child, in a child of that"
    assert len({line.rpartition(" ")[2] for line in used}) == 3


def test_other_ways_out_are_closed_too(tmp_path: Path) -> None:
    code = f"""
import socket
from contextlib import suppress
packets = socket.socket(type=socket.SOCK_DGRAM)
with suppress(OSError): socket.getaddrinfo("example.com", 80)
with suppress(OSError): socket.gethostbyname("example.com")
with suppress(OSError): packets.connect_ex(("{ELSEWHERE}", 9))
with suppress(OSError): packets.sendto(b"", ("{ELSEWHERE}", 9))
with suppress(OSError): packets.sendmsg([b""], [], 0, ("{ELSEWHERE}", 9))
"""
    done = session(tmp_path, indented(code))
    assert "1 passed" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "5 addresses used, 5 outside of loopback" in done.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_in_the_users_home_fails_the_session(workers: int, tmp_path: Path) -> None:
    code = """
from pathlib import Path
cache = Path.home() / ".cache" / "graftlm"
cache.mkdir(parents=True)
(cache / "file").write_text("")
"""
    done = session(tmp_path, indented(code), *(["-n", str(workers)] if workers else []))
    assert "1 passed" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "written into the user's home: ~/.cache/graftlm/file" in done.stdout


# Tiers -----------------------------------------------------------------------------------------------------------


def ci(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """.ci/run up to its tests, on a checkout that has this single one, with checks that all pass."""
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    script, tests, _ = (ROOT / ".ci" / "run").read_text().partition("make test-all\n")
    assert tests
    (folder / ".ci").mkdir()
    (folder / ".ci" / "run").write_text(script + tests)
    (folder / ".ci" / "run").chmod(0o755)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_one.py").write_text(f"import pytest\n\n\n{test}\n")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("ruff", "mypy", "lint-imports", "mkdocs"):
        (programs / name).symlink_to(shutil.which("true") or "/bin/true")
    python = programs / "python"
    python.write_text(f'#!/bin/sh\ncase "$1" in -m) exec {sys.executable} "$@";; esac\n')  # not docs/generate.py
    python.chmod(0o755)
    for target in (".python", ".run", ".dev"):
        (folder / ".venv" / target).touch()
    return subprocess.run([str(folder / ".ci" / "run")], env=environment(), capture_output=True, text=True, check=False)


def test_a_sample_meets_every_value_of_two_parameters() -> None:
    methods, clauses = list("abcdefghijk"), list(range(8))
    cases = [{"method": method, "clause": clause} for clause in clauses for method in methods]
    chosen = [case for case, stays in zip(cases, sample(cases), strict=True) if stays]
    assert len(chosen) == sum((a + b) % SAMPLE == 0 for a in range(11) for b in range(8))
    assert {case["method"] for case in chosen} == set(methods)
    assert {case["clause"] for case in chosen} == set(clauses)


@pytest.mark.parametrize("count", range(1, 10))
def test_a_sample_of_parameters_that_change_together_is_its_share_and_never_empty(count: int) -> None:
    cases = [{"value": f"{n}", "right": n + 0.5} for n in range(count)]
    chosen = [n for n, stays in enumerate(sample(cases)) if stays]
    assert chosen == list(range(0, count, SAMPLE))


@pytest.mark.parametrize(("tier", "ran"), [("not slow and not long", 2), ("not long", 8)])
def test_cases_outside_of_the_sample_are_slow(tier: str, ran: int, tmp_path: Path) -> None:
    body = "@pytest.mark.sampled\n@pytest.mark.parametrize('n', range(8))\ndef test_eight(n):\n    pass\n"
    (tmp_path / "test_eight.py").write_text(f"import pytest\n\n\n{body}")
    config = shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "tests.tiers", "-p", "no:cacheprovider", "-m", tier]
    command += ["--rootdir", str(tmp_path), "-c", str(config), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert f"{ran} passed" in done.stdout, done.stdout + done.stderr


def test_ci_passes_where_a_test_passes_and_a_slow_one_is_among_them(tmp_path: Path) -> None:
    done = ci(tmp_path, "@pytest.mark.slow\ndef test_slow():\n    pass")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ("", "no tests ran"),
        ("@pytest.mark.long(group='x')\ndef test_long():\n    pass", "no tests ran"),
        ("def test_fails():\n    assert False", "1 failed"),
        ("@pytest.mark.sloow\ndef test_slow():\n    pass", "'sloow' not found in `markers`"),
    ],
    ids=["no test", "only a long one", "one that fails", "a marker that is not known"],
)
def test_ci_fails(test: str, says: str, tmp_path: Path) -> None:
    done = ci(tmp_path, test)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
