"""/openapi.json describes the routes that there are; what it allows never makes the server fail."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftlm.serve.openapi import BODIES
from tests.serve.conftest import Served
from tests.serve.test_refusals import check_shape
from tests.serve.test_server import running

EXAMPLES = 300
"""For each route."""


def described(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = served.client.get("/openapi.json").json()
    return found


def properties(tree: dict[str, Any], path: str) -> dict[str, Any]:
    schema = tree["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].removeprefix("#/components/schemas/")
    found: dict[str, Any] = tree["components"]["schemas"][name]
    assert found["additionalProperties"] is False
    return found


def test_every_route_is_described(served: Served, limited: Any) -> None:
    for each in (served, limited()):
        found = {(m.upper(), path) for path, methods in described(each)["paths"].items() for m in methods}
        there = {(m, route.path.replace(":path", "")) for route in each.app.routes for m in route.methods}
        assert found == there
    assert ("POST", "/v1/load_lora_adapter") not in there


@pytest.mark.parametrize("path", BODIES)
def test_the_fields_are_those_that_are_read(served: Served, path: str) -> None:
    """A field that is described is known, and no other is; what is needed is needed."""
    schema = properties(described(served), path)
    assert len(schema["properties"]) > 0
    for name in schema["properties"]:
        answer = served.client.post(path, json={name: {"nobody": []}})
        assert answer.status_code == 400
        assert f"unknown field '{name}'" not in answer.text
    assert "unknown field 'nobody'" in served.client.post(path, json={"nobody": 1}).json()["error"]["message"]
    needed = served.client.post(path, json={}).json()["error"]["message"]
    assert any(f"field {name!r} is needed" == needed for name in schema["required"])


def test_with_keys_the_description_needs_one_and_says_so(limited: Any) -> None:
    served = limited(keys=["k"])
    check_shape(served.client.get("/openapi.json"), 401)
    tree = served.client.get("/openapi.json", headers={"x-api-key": "k"}).json()
    assert tree["security"] == [{"bearer": []}, {"header": []}]
    assert tree["paths"]["/health"]["get"]["security"] == []
    assert "security" not in tree["paths"]["/v1/models"]["get"]
    assert "security" not in described(limited())


@pytest.mark.long(group="schemathesis")
@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
def test_no_request_makes_the_server_fail(served_base: Path, library: Path, tmp_path: Path, phase: str) -> None:
    """Requests that schemathesis makes from the description, right ones and wrong ones: no answer from 500 on, every
    refusal has the shape of its protocol, and the server answers afterwards."""
    place = os.environ.get("GRAFT_SCHEMATHESIS")
    if place is None:
        pytest.skip("$GRAFT_SCHEMATHESIS is not set: pip install --target FOLDER schemathesis")
    arguments = ("--base", served_base, "--adapters", library, "--allow-adapter-changes", "--dtype", "float32")
    with running(*arguments) as (process, url):
        paths = [place, str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        hooks = {"PYTHONPATH": os.pathsep.join(paths), "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PHASE": phase}
        examples = os.environ.get("GRAFT_SCHEMATHESIS_EXAMPLES", str(EXAMPLES))
        checks = "not_a_server_error,errors_have_the_shape_of_their_protocol"
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", checks]
        command += ["--max-examples", examples, "--seed", "0", "--phases", phase, "--warnings", "off"]
        command += ["--suppress-health-check", "all", "--continue-on-failure", "--request-timeout", "60"]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert process.poll() is None
        body = {"model": "plain", "prompt": "a", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
