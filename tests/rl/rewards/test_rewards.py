"""What gives answers their rewards: each scorer by itself, and what it says where it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.rl.rewards import SCORERS, Completion, make_scorer
from graftlm.rl.rewards.exact import ExactConfig
from graftlm.rl.rewards.judge import JudgeScorerConfig
from graftlm.rl.rewards.pattern import PatternConfig
from graftlm.rl.rewards.python import PythonConfig
from graftlm.rl.rewards.reward_model import RewardModelConfig
from graftlm.rl.rewards.rouge import RougeConfig
from graftlm.testing.tiny import TINY, tiny_tokenizer
from tests.errors import raises
from tests.judges.endpoint_server import Endpoint


def completion(answer: str, reference: str | None = None, question: str = "what?", where: str = "f:1") -> Completion:
    return Completion([Message("user", question)], answer, reference, cut=False, where=where)


def rewards(config: Any, *answers: Completion, network: bool = False) -> list[float | None]:
    return list(make_scorer(config, network=network)(answers))


def test_every_scorer_is_known_by_its_name() -> None:
    for name, row in SCORERS.items():
        assert row.config.by == name  # type: ignore[comparison-overlap]


def test_exact() -> None:
    assert rewards(ExactConfig(), completion("a b", " a b\n"), completion("A b", "a b"), completion("", "a")) == [
        1.0,
        0.0,
        0.0,
    ]
    assert rewards(ExactConfig(ignore_case=True), completion("A b", "a B")) == [1.0]
    numbers = ExactConfig(take=r"#### (-?\d+)")
    answers = [completion(text, "so it is\n#### 12") for text in ("#### 12", "#### 3\nno: #### 12", "12", "#### 120")]
    assert rewards(numbers, *answers) == [1.0, 1.0, 0.0, 0.0]
    assert rewards(ExactConfig(take=r"\d+"), completion("it is 7.", "7")) == [1.0]
    with raises("data/no-reference-answer", match="f:9: .*'exact'"):
        rewards(ExactConfig(), completion("a", None, where="f:9"))
    with raises("data/nothing-to-compare"):
        rewards(numbers, completion("#### 1", "no number"))
    with pytest.raises(ValueError, match="no regular expression"):
        ExactConfig(take="(")


def test_pattern() -> None:
    one_sentence = PatternConfig(pattern=r"^[^.\n]+\.$")
    assert rewards(one_sentence, completion("One."), completion("One. Two."), completion("none"), completion("")) == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]
    with pytest.raises(ValueError, match="no regular expression"):
        PatternConfig(pattern="[")


def test_rouge() -> None:
    found = rewards(RougeConfig(), completion("a b c", "a b c"), completion("a x", "a b"), completion("", "a"))
    assert found == pytest.approx([1.0, 0.5, 0.0])
    with raises("data/no-reference-answer", match="rouge-l"):
        rewards(RougeConfig(), completion("a"))


def python(folder: Path, source: str, name: str = "score") -> PythonConfig:
    (folder / "rewards.py").write_text(source)
    return PythonConfig(function=f"{folder / 'rewards.py'}:{name}")


def test_a_function_of_the_users(tmp_path: Path) -> None:
    source = """
def score(completion):
    if not completion.answer:
        return None
    length = len(completion.answer) + 10 * len(completion.question)
    return length + 100 * (completion.reference == "r") + 1000 * completion.cut
"""
    found = rewards(python(tmp_path, source), completion("ab", "r", "xyz"), completion(""))
    assert found == [132.0, None]


def test_a_function_that_fails_is_named_with_its_line_and_the_row(tmp_path: Path) -> None:
    config = python(tmp_path, "def score(completion):\n    x = 1\n    return completion.answr\n")
    with raises(
        "training/reward-function-failed", match=r"rewards.py:score .* f:7: line 3: AttributeError: .*answr[\s\S]*'ab'"
    ):
        rewards(config, completion("ab", where="f:7"))
    with raises("training/reward-function-failed"):
        rewards(python(tmp_path, "def score(completion):\n    return 'good'\n"), completion("ab"))


def test_a_file_or_a_function_that_is_not_there(tmp_path: Path) -> None:
    config = python(tmp_path, "def score(completion):\n    return 0\n", "scor")
    with raises("recipe/no-such-function", match=r"'scor'. Did you mean 'score'"):
        make_scorer(config, network=False)
    with raises("recipe/no-such-file", match=r"reward.py: .*Did you mean .*rewards.py"):
        make_scorer(PythonConfig(function=f"{tmp_path / 'reward.py'}:score"), network=False)
    with raises("recipe/broken-reward-file", match=r"line 2: ZeroDivisionError"):
        make_scorer(python(tmp_path, "\n1 / 0\n"), network=False)
    with pytest.raises(ValueError, match=r"write FILE.py:NAME"):
        PythonConfig(function="rewards.score")


def test_a_judge_behind_an_endpoint(endpoint: Endpoint) -> None:
    answers = [completion("good"), completion("bad"), completion("odd")]
    grade = {"good": "5", "bad": "Grade: 1.5", "odd": "no idea"}
    endpoint.reply = lambda prompt: next(text for answer, text in grade.items() if prompt.endswith(answer))
    assert rewards(JudgeScorerConfig(url=endpoint.url, model="m"), *answers) == [5.0, 1.5, None]
    assert all(body["model"] == "m" and "what?" in body["messages"][0]["content"] for body in endpoint.requests)
    with raises("data/ungraded-replies", match="1 of 1 replies"):
        rewards(JudgeScorerConfig(url=endpoint.url), completion("odd"))
    endpoint.reply = lambda prompt: "4" if prompt == "is a like r?" else "1"
    against = JudgeScorerConfig(url=endpoint.url, prompt="is {answer} like {reference}?")
    assert rewards(against, completion("a", "r")) == [4.0]
    endpoint.reply = lambda prompt: "4" if prompt == "is {answer} what {reference}? asks?" else "1"
    asking = JudgeScorerConfig(url=endpoint.url, prompt="is {answer} what {question} asks?")
    assert rewards(asking, completion("{answer}", question="{reference}?")) == [4.0], "braces of a text are its own"


def test_nothing_is_sent_elsewhere_without_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = JudgeScorerConfig(url="https://judge.invalid/v1")
    with raises("data/network-not-allowed"):
        make_scorer(config, network=False)
    with raises("data/missing-api-key", match="OPENAI_API_KEY"):
        make_scorer(config, network=True)


def saved(folder: Path, labels: int = 1, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(TINY | changes), num_labels=labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("padding", [0, 2, None], ids=["", "padded with what ends a turn", "without padding"])
def test_a_reward_model_says_of_many_what_it_says_of_one(tmp_path: Path, padding: int | None) -> None:
    folder = saved(tmp_path / "reward", pad_token_id=padding)
    answers = [
        completion("ab"),
        completion("a longer answer of more tokens"),
        completion(""),
        completion("the user asks", question="why so?"),
    ]
    alone = [rewards(RewardModelConfig(model=str(folder), dtype="float32"), one)[0] for one in answers]
    together = rewards(RewardModelConfig(model=str(folder), dtype="float32", at_once=3), *answers)
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-7)
    assert len({round(float(reward or 0), 7) for reward in alone}) == 4
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    messages = [Message("user", "what?"), Message("assistant", "ab")]
    ids = torch.from_numpy(Renderer(tiny_tokenizer()).conversation(messages).ids.astype("int64"))
    with torch.no_grad():
        assert alone[0] == pytest.approx(float(model(ids[None]).logits[0, 0]), rel=1e-5)


def test_what_is_no_reward_model_is_refused(base_folder: Path, tmp_path: Path) -> None:
    with raises("base/not-a-reward-model", match="no trained head"):
        make_scorer(RewardModelConfig(model=str(base_folder)), network=False)
    with raises("base/not-a-reward-model", match="3 outputs"):
        make_scorer(RewardModelConfig(model=str(saved(tmp_path / "three", labels=3))), network=False)
    with raises("base/no-such-base"):
        make_scorer(RewardModelConfig(model=str(tmp_path / "nowhere")), network=False)
