"""A judge is asked directly or not at all, and its grade is the one that it gives."""

from collections.abc import Iterator

import pytest

from graftlm.judges.endpoint import ask, check, grade, is_local
from graftlm.rl.rewards.judge import JudgeScorerConfig
from tests.errors import raises
from tests.judges.endpoint_server import Endpoint, running_endpoint


@pytest.fixture
def other() -> Iterator[Endpoint]:
    """Another host: a proxy, or where a redirect leads."""
    with running_endpoint() as made:
        yield made


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("3", 3), ("4.5", 4.5), ("4,5", 4.5), (" 5\n", 5), ("3.", 3), ("**4**", 4), ("[[2]]", 2), ("4/5", 4),
        ("3.5 / 5", 3.5), ("4 out of 5", 4), ("Grade: 2", 2), ("Score = 4", 4), ("the rating is **3**.", 3),
        ("1 to 5: I give 3", 3), ("1-5: 2", 2), ("On a scale from 1 (useless) to 5 (could not be better): 4", 4),
        ("On a scale of 1 to 5, I would rate this answer a 4.", 4), ("between 1 and 5 I give it a 2", 2),
        ("3: one of 4 facts is missing", 3), ("2 of 3 facts are right. Grade: 4", 4), ("5 - could not be better", 5),
        ("The answer names 2 dates and 7 places.\n\n4", 4), ("Correctness score: 3\nOverall grade: 4", 4),
        ("<think>5 would be too much, 2 too little</think>3", 3), ("so 5 is too much\n</think>\n\n2", 2),
        ("評分：4", 4), ("4分", 4), ("Оценка: 4", 4), ("Note : 3,5", 3.5),
        ("5.9", None), ("-2", None), ("−2", None), ("0", None), ("6", None), ("10", None), ("45", None),
        ("8/10", None), ("3/10", None), ("Grade: 7, for 3 reasons", None), ("3 or 4", None), ("3-4", None),
        ("a scale of 1 to 5", None), ("version 2.0.1", None), ("100%", None), ("B2", None), ("", None), ("no", None),
        ("<think>3, or rather", None),
    ],
)  # fmt: skip
def test_the_grade_is_the_one_that_the_reply_gives(reply: str, wanted: float | None) -> None:
    assert grade(reply) == wanted


@pytest.mark.parametrize("proxy", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_a_judge_on_this_machine_is_asked_through_no_proxy_and_gets_no_key_unasked(
    proxy: str, endpoint: Endpoint, other: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proxy, f"http://127.0.0.1:{other.server.server_port}")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for config, key in (
        (JudgeScorerConfig(url=endpoint.url), None),
        (JudgeScorerConfig(url=endpoint.url, key_from="OPENAI_API_KEY"), "Bearer secret"),
    ):
        endpoint.keys.clear()
        assert list(ask(config, check(config, network=False), ["good?"])) == ["3"]
        assert endpoint.keys == [key]
    assert other.requests == []


def test_a_proxy_is_used_for_other_machines(other: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{other.server.server_port}")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    config = JudgeScorerConfig(url="http://judge.invalid/v1")
    assert list(ask(config, check(config, network=True), ["good?"])) == ["3"]
    assert other.requests[0]["path"] == "http://judge.invalid/v1/chat/completions"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, endpoint: Endpoint, other: Endpoint) -> None:
    endpoint.reply, endpoint.location = (lambda prompt: status), f"{other.url}/chat/completions"
    config = JudgeScorerConfig(url=endpoint.url)
    with raises("data/endpoint-redirects") as raised:
        list(ask(config, None, ["good?"]))
    assert other.url in str(raised.value)
    assert other.requests == []
    assert len(endpoint.requests) == 1


def test_a_key_that_is_asked_for_must_be_there(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with raises("data/missing-api-key", match="MY_KEY"):
        check(JudgeScorerConfig(url=endpoint.url, key_from="MY_KEY"), network=False)


@pytest.mark.parametrize(
    "url", ["http://localhost:1/v1", "http://127.0.0.2/v1", "https://[::1]:8/v1", "http://LOCALHOST."]
)
def test_what_this_machine_is_called(url: str) -> None:
    assert is_local(url)


@pytest.mark.parametrize(
    "url",
    ["http://localhost@judge.invalid/v1", "http://localhost.judge.invalid", "http://10.0.0.1/v1", "http://0.0.0.0/"],
)
def test_what_is_another_machine(url: str) -> None:
    assert not is_local(url)
    with raises("data/network-not-allowed"):
        check(JudgeScorerConfig(url=url), network=False)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000/v1", "", "ftp://localhost/v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with raises("data/invalid-url"):
        check(JudgeScorerConfig(url=url), network=True)


def test_a_reply_may_be_as_long_as_the_config_says(endpoint: Endpoint) -> None:
    config = JudgeScorerConfig(url=endpoint.url, max_tokens=77)
    assert list(ask(config, None, ["good?"])) == ["3"]
    assert endpoint.requests[0]["max_tokens"] == 77
