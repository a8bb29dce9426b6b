"""Rows of labels and columns put into words."""

from pathlib import Path

import pytest

from graftlm.data.sources.load import load_rows
from graftlm.data.sources.messages import RowError
from graftlm.data.sources.prompt_templates import PromptTemplate, ask
from graftlm.data.sources.source import SourceConfig


def prompt_and_completion(templates: list[PromptTemplate], row: dict[str, object]) -> tuple[str, str]:
    fields, _ = ask(templates, row)
    return fields["prompt"][0]["content"], fields["completion"]


ROW = {"premise": "It rains.", "hypothesis": "it is wet", "label": 0}
ONE = PromptTemplate(prompt="{premise} So {hypothesis}?", completion="{label}", words={"label": ("yes", "maybe", "no")})


def test_fields_are_filled_in_and_labels_get_their_words() -> None:
    assert prompt_and_completion([ONE], ROW) == ("It rains. So it is wet?", "yes")
    assert prompt_and_completion([ONE], ROW | {"label": "2"})[1] == "no"
    with_words = PromptTemplate(prompt="{{{premise}}}", completion="{label}", words={"label": {"0": "ja"}})
    assert prompt_and_completion([with_words], ROW) == ("{It rains.}", "ja")


def test_the_name_of_a_field_may_have_any_characters() -> None:
    way = PromptTemplate(prompt="{sentence 1} / {text-b} / {{label}}", completion="{Is it?}")
    assert prompt_and_completion([way], {"sentence 1": "a", "text-b": "b", "Is it?": "c"}) == ("a / b / {label}", "c")


def test_words_for_a_field_that_no_text_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="words: 'lable' stands in neither prompt nor completion. Did you mean 'label'"
    ):
        PromptTemplate(prompt="{premise}", completion="{label}", words={"lable": ("yes", "no")})


def test_braces_in_a_field_are_not_filled_again() -> None:
    assert prompt_and_completion([ONE], ROW | {"premise": "{label}"})[0] == "{label} So it is wet?"


def test_every_template_is_used_and_the_same_row_is_always_asked_the_same_way() -> None:
    ways = [PromptTemplate(prompt=f"{n} {{label}}", completion="a") for n in range(3)]
    prompts = [prompt_and_completion(ways, {"label": n})[0].split()[0] for n in range(60)]
    assert set(prompts) == {"0", "1", "2"}
    assert prompts == [prompt_and_completion(ways, {"label": n})[0].split()[0] for n in range(60)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"premise": "p", "label": 0}, "field 'hypothesis' is needed, found"),
        (ROW | {"label": 3}, "field 'label' is 3, and `words` has 3 words"),
        (ROW | {"premise": ["p"]}, "field 'premise' must be text or a number, this is a list"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        ask([ONE], row)


def test_a_brace_that_was_not_meant_is_not_passed_over() -> None:
    with pytest.raises(RowError, match=r"""field '"a": 1' is needed.*written twice: \{\{"""):
        ask([PromptTemplate(prompt='like {"a": 1}', completion="{label}")], ROW)


def test_a_source_with_templates_gives_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("premise,hypothesis,label\nIt rains.,it is wet,0\n")
    rows, name = load_rows(SourceConfig(path=str(file), templates=(ONE,)))
    assert [m.content for m in rows[0].messages] == ["It rains. So it is wet?", "yes"]
    assert name == "prompt-completion"
