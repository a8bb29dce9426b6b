"""The clients of OpenAI and Anthropic against a server in a process of its own.

The clients share no environment: $GRAFT_CLIENTS is a folder with one folder for each set of packages, made by
`pip install --no-deps --target FOLDER/openai-3 openai==3.* ...`, with what they need beside ours (anthropic, distro,
jiter, sniffio, docstring-parser, tqdm).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.test_server import running

VERSIONS = ("1", "2", "3")
SESSION = Path(__file__).parent / "client_session.py"


@pytest.mark.long(group="clients")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_clients_get_what_they_ask_for(served_base: Path, library: Path, version: str) -> None:
    place = os.environ.get("GRAFT_CLIENTS")
    if place is None:
        pytest.skip("$GRAFT_CLIENTS is not set")
    packages = Path(place) / f"openai-{version}"
    assert packages.is_dir()
    arguments = ("--base", served_base, "--adapters", library, "--api-key", "k", "--dtype", "float32")
    with running(*arguments) as (_, url):
        environment = os.environ | {"PYTHONPATH": str(packages)}
        done = subprocess.run(
            [sys.executable, str(SESSION), url], env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"openai {version}.")
