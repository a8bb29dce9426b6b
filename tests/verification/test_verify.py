"""A server that serves an adapter is never accused, and each fault is called by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import OpenerDirector

import pytest
from typer.testing import CliRunner

import graftlm.judges.endpoint as endpoint
import graftlm.verification.client as client
from graftlm.cli import app
from graftlm.verification.prompts import PROMPTS
from graftlm.verification.verify import Verification, verify
from tests.errors import raises
from tests.verification.conftest import OTHER_TEMPLATE, AdapterMaker
from tests.verification.verify_server import Served, running

FEW = PROMPTS[::6]
"""Prompts enough for tiny models."""

CHAT, COMPLETIONS = ("chat/completions",), ("completions",)
TEXT: dict[str, Any] = {"takes_ids": False, "routes": COMPLETIONS}

Ask = Callable[..., Verification]


@pytest.fixture
def ask(spread_base: Path) -> Ask:
    """What `graft verify` finds of a server of this adapter: ask(adapter, others=..., **how it is served)."""

    def asked(adapter: Path, *, more: dict[str, Any] | None = None, **serving: Any) -> Verification:
        served = Served(spread_base, serving.pop("adapters", {"parcels": adapter}), **serving)
        with running(served) as url:
            given = {"model": "parcels", "base": str(spread_base), "dtype": "float32", "prompts": FEW}
            return verify(url, adapter, **(given | (more or {})))

    return asked


RIGHT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "both routes": ("lora", {}, {}),
    "both routes, bfloat16": ("lora", {}, {"dtype": "bfloat16"}),
    "both routes, int8": ("lora", {}, {"quantization": "int8"}),
    "five log-probabilities": ("lora", {}, {"most": 5, "routes": CHAT}),
    "prompts as text": ("lora", {}, TEXT),
    "prompts as text, five, bfloat16": ("lora", {}, TEXT | {"most": 5, "dtype": "bfloat16"}),
    "tokens by id": ("lora", {}, {"by_id": True, "routes": COMPLETIONS}),
    "content in completions": ("lora", {}, {"logprobs": "content", "routes": COMPLETIONS}),
    "unknown fields refused": ("lora", {}, {"strict": True, "routes": CHAT}),
    "tokens are not counted": ("lora", {}, {"counts": False, "lists_models": False, "routes": COMPLETIONS}),
    "rsLoRA": ("lora", {"rslora": True}, {"routes": CHAT}),
    "rsLoRA, bfloat16": ("lora", {"rslora": True}, {"dtype": "bfloat16", "routes": COMPLETIONS}),
    "DoRA": ("dora", {}, {"routes": CHAT}),
    "DoRA, int8": ("dora", {}, {"quantization": "int8", "routes": CHAT}),
    "IA3": ("ia3", {}, {"routes": CHAT}),
    "LoHa": ("loha", {}, {"dtype": "bfloat16", "routes": COMPLETIONS}),
    "full": ("full", {"scale": 0.05}, {"routes": CHAT}),
    "Houlsby": ("houlsby", {}, {"routes": COMPLETIONS}),
    "prefix": ("prefix", {"scale": 0.5}, {"routes": CHAT}),
    "own template": ("lora", {"template": OTHER_TEMPLATE}, {"template": OTHER_TEMPLATE}),
    "no template": ("lora", {"template": None}, {"routes": CHAT}),
    "greedy answers": ("lora", {}, {"logprobs": None, "routes": CHAT}),
    "greedy answers, text, bfloat16": ("lora", {"rslora": True}, TEXT | {"logprobs": None, "dtype": "bfloat16"}),
}  # fmt: skip
"""Name -> (method, its config, how the adapter is served): all of them serve it."""


@pytest.mark.sampled
@pytest.mark.parametrize("name", RIGHT)
def test_a_server_that_applies_the_adapter_is_not_accused(name: str, adapter_of: AdapterMaker, ask: Ask) -> None:
    method, config, serving = RIGHT[name]
    found = ask(adapter_of(method, **config), **serving)
    assert found.verdict == "applied", found
    assert found.exit_code == 0
    assert [route.verdict for route in found.routes] == ["applied"] * len(serving.get("routes", "ab"))
    for route in found.routes:
        assert route.prompts == len(FEW)
        assert route.evidence == ("greedy answers" if "greedy" in name else "log-probabilities")
        assert route.prompts_by == (
            "messages" if route.route in CHAT else "ids" if serving.get("takes_ids", True) else "text"
        )
        if method == "prefix":
            assert route.factor is None
        else:
            assert route.factor == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("logprobs", ["top", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_missing_adapter_is_named(
    logprobs: str | None, route: tuple[str], adapter_of: AdapterMaker, ask: Ask
) -> None:
    found = ask(adapter_of("lora"), applied={"parcels": ("", 1)}, logprobs=logprobs, routes=route, dtype="bfloat16")
    assert (found.verdict, found.exit_code) == ("base", 3)
    assert "ignores the name" in found.notes[-1]
    assert found.factor == pytest.approx(0, abs=0.05)


@pytest.mark.sampled
@pytest.mark.parametrize("serving", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"most": 5}])
@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
def test_a_wrong_scale_is_named_with_its_factor(
    factor: float, serving: dict[str, Any], adapter_of: AdapterMaker, ask: Ask
) -> None:
    found = ask(adapter_of("lora"), applied={"parcels": ("parcels", factor)}, routes=COMPLETIONS, **serving)
    assert (found.verdict, found.exit_code) == ("wrong scale", 3), found
    assert found.factor == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rslora_at_alpha_over_r_is_named_as_such(
    dtype: str, adapter_of: AdapterMaker, ask: Ask, spread_base: Path
) -> None:
    adapter = adapter_of("lora", rslora=True, r=16)
    found = ask(adapter, applied={"parcels": ("parcels", 0.25)}, routes=CHAT, dtype=dtype)
    assert found.verdict == "wrong scale"
    assert found.factor == pytest.approx(16**-0.5, rel=0.1)
    assert "rsLoRA is ignored" in found.why


@pytest.mark.parametrize("logprobs", ["top", pytest.param(None, marks=pytest.mark.slow)])
def test_another_adapter_is_named_or_at_least_not_taken_for_ours(
    logprobs: str | None, adapter_of: AdapterMaker, ask: Ask
) -> None:
    ours, other = adapter_of("lora"), adapter_of("lora", seed=7)
    serving: dict[str, Any] = {"adapters": {"parcels": other}, "routes": COMPLETIONS, "logprobs": logprobs}
    found = ask(ours, more={"others": [other]}, **serving)
    assert (found.verdict, found.exit_code) == ("another adapter", 3)
    assert found.routes[0].other == f"the adapter {other.name}"
    assert ask(ours, **serving).verdict == "undecided"


@pytest.mark.parametrize("logprobs", ["top", pytest.param(None, marks=pytest.mark.slow)])
def test_another_template_is_named_and_the_weights_are_not_accused(
    logprobs: str | None, adapter_of: AdapterMaker, ask: Ask
) -> None:
    found = ask(adapter_of("lora", template=OTHER_TEMPLATE), logprobs=logprobs)
    assert (found.verdict, found.exit_code) == ("another template", 3)
    assert {route.route: route.verdict for route in found.routes} == {
        "chat/completions": "another template",
        "completions": "applied",
    }
    assert found.routes[0].other == "the base's"
    assert "chat_template.jinja" in found.notes[-1]


def test_a_route_that_serves_the_base_is_found_though_the_other_serves_the_adapter(
    adapter_of: AdapterMaker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Served.answer
    monkeypatch.setattr(
        Served,
        "answer",
        lambda self, path, body: answer(self, path, body | ({"model": "base"} if "prompt" in body else {})),
    )
    found = ask(adapter_of("lora"))
    assert [route.verdict for route in found.routes] == ["applied", "base"]
    assert (found.verdict, found.exit_code) == ("base", 3)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-5, "float32"), (2e-3, "bfloat16")])
def test_a_tiny_effect_is_undecided_whatever_is_served(
    scale: float, dtype: str, adapter_of: AdapterMaker, ask: Ask
) -> None:
    adapter = adapter_of("lora", scale=scale)
    for applied in ({}, {"parcels": ("", 1)}):
        found = ask(adapter, applied=applied, dtype=dtype, routes=COMPLETIONS)
        assert (found.verdict, found.exit_code) == ("undecided", 4), found


def test_a_server_that_reads_other_tokens_than_it_is_sent_is_not_compared(
    adapter_of: AdapterMaker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Served.prompt
    monkeypatch.setattr(Served, "prompt", lambda self, path, body: [1, *prompt(self, path, body)])
    with raises("data/endpoint-refuses", match="tokens in a prompt of"):
        ask(adapter_of("lora"), routes=COMPLETIONS)
    assert ask(adapter_of("lora"), routes=CHAT).verdict != "wrong scale"


# Servers that err -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ((401, {"error": "no key"}), "data/endpoint-refuses", "--key-from"),
        ((500, {"error": "out of memory"}), "data/endpoint-refuses", "out of memory"),
        ((200, b"<html>"), "data/endpoint-incompatible", "JSON|Expecting"),
        ((200, []), "data/endpoint-incompatible", "list"),
        ((200, {"choices": []}), "data/endpoint-incompatible", "IndexError"),
        ((200, {"object": "error"}), "data/endpoint-incompatible", "choices"),
    ],
)
def test_a_server_that_errs_is_an_error_and_no_verdict(
    error: Any, code: str, words: str, adapter_of: AdapterMaker, ask: Ask
) -> None:
    with raises(code, match=words):
        ask(adapter_of("lora"), error=error)


def test_a_server_that_is_busy_is_asked_again(adapter_of: AdapterMaker, ask: Ask) -> None:
    found = ask(
        adapter_of("lora"), routes=CHAT, error=lambda number: (503, {"error": "busy"}) if number % 3 == 1 else None
    )
    assert found.verdict == "applied"


def test_a_server_that_fails_in_the_middle_is_an_error(adapter_of: AdapterMaker, ask: Ask) -> None:
    with raises("data/endpoint-refuses", match="refuses another"):
        ask(adapter_of("lora"), routes=CHAT, error=lambda number: (400, {"error": "no"}) if number > 8 else None)


def test_an_unknown_model_is_an_error_that_lists_what_there_is(adapter_of: AdapterMaker, ask: Ask) -> None:
    with raises("data/endpoint-refuses", match=r"parcel7.*lists the models base, parcels"):
        ask(adapter_of("lora"), more={"model": "parcel7"})


def test_the_only_adapter_of_a_server_is_asked(adapter_of: AdapterMaker, ask: Ask) -> None:
    assert ask(adapter_of("lora"), routes=CHAT, more={"model": None}).model == "parcels"


def test_nobody_at_the_address_is_an_error(adapter_of: AdapterMaker, spread_base: Path) -> None:
    with raises("data/endpoint-unreachable", match="Start the server"):
        verify("http://127.0.0.1:9/v1", adapter_of("lora"), base=str(spread_base))


def test_a_server_that_does_not_answer_in_time_is_an_error(
    adapter_of: AdapterMaker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise TimeoutError("timed out")

    server = client.Server("http://127.0.0.1:9/v1", None, timeout=1)
    monkeypatch.setattr(OpenerDirector, "open", late)
    with raises("data/endpoint-unreachable", match="--timeout"):
        server.reply("completions", {})


# The command ----------------------------------------------------------------------------------------------------------


def graft(*words: str) -> Any:
    return CliRunner().invoke(app, ["verify", *words], catch_exceptions=False)


def test_the_command_prints_a_verdict_and_exits_with_its_code(
    adapter_of: AdapterMaker, spread_base: Path, tmp_path: Path
) -> None:
    adapter = adapter_of("lora")
    (tmp_path / "questions.txt").write_text("\n".join(FEW))
    served = Served(spread_base, {adapter.name: adapter}, routes=CHAT)
    options = ["--adapter", str(adapter), "--base", str(spread_base), "--prompts", str(tmp_path / "questions.txt")]
    with running(served) as url:
        right = graft(url, *options)
        served.applied = {adapter.name: (adapter.name, 0.5)}
        wrong = graft(url, *options, "--json")
        other = graft(url, *options, "--model", "base")
    assert right.exit_code == 0
    assert f"applied: {adapter.name} at {url}" in right.stdout
    assert "the base with the adapter's template" in right.stdout
    assert wrong.exit_code == 3
    tree = json.loads(wrong.stdout)
    assert (tree["verdict"], tree["exit_code"]) == ("wrong scale", 3)
    assert tree["factor"] == pytest.approx(0.5, rel=0.1)
    assert {each["name"] for each in tree["routes"][0]["hypotheses"]} >= {"the base with the adapter's template"}
    assert "half" in tree["why"]
    assert other.exit_code == 3
    assert "base: base at" in other.stdout
    assert all(key is None for key in served.keys)


def test_questions_that_are_not_there_are_an_error(adapter_of: AdapterMaker, spread_base: Path, tmp_path: Path) -> None:
    with raises("data/unreadable-file", match=r"nothing\.txt"):
        graft("http://127.0.0.1:9/v1", "--adapter", str(tmp_path), "--prompts", str(tmp_path / "nothing.txt"))
    with running(Served(spread_base, {"a": adapter_of("lora")})) as url, raises("data/no-prompts"):
        verify(url, adapter_of("lora"), base=str(spread_base), model="a", prompts=["", " "])
