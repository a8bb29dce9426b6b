"""What a run shows in a terminal: what stands in rows and names of files is text, never markup."""

from io import StringIO

from rich.console import Console

from graftlm.display import terminal


def test_the_name_of_a_file_is_no_markup() -> None:
    console = Console(width=80, record=True, file=StringIO())
    tokens = [{"text": "[bold]a[/nothing]", "role": "user", "weight": 0.0}]
    console.print(terminal.tokens({"where": "data/[/x]/[red]rows.jsonl:3", "tokens": tokens}))
    shown = console.export_text()
    assert "data/[/x]/[red]rows.jsonl:3" in shown
    assert "[bold]a[/nothing]" in shown


def test_a_token_s_weight_can_be_seen() -> None:
    console = Console(width=80, record=True, force_terminal=True, color_system="truecolor", file=StringIO())
    tokens = [{"text": text, "role": "assistant", "weight": w} for text, w in (("one", 1), ("half", 0.5), ("two", 2))]
    console.print(terminal.tokens({"where": "f:1", "tokens": tokens}))
    shown = console.export_text(styles=True)
    styles = [
        next(part for part in shown.split("\x1b[") if part.endswith(f"m{text}")) for text in ("one", "half", "two")
    ]
    assert len({style.partition("m")[0] for style in styles}) == 3
    assert "with less weight" in shown
    assert "with more weight" in shown
    console.print(terminal.tokens({"where": "f:1", "tokens": tokens[:1]}))
    assert "with" not in console.export_text()


def shown_answers(samples: list[dict[str, str]], width: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(terminal.side_by_side(samples))
    return console.export_text().splitlines()


def test_short_answers_stand_side_by_side() -> None:
    lines = shown_answers([{"asked": "a?", "wanted": "[b]w[/c]", "base": "x", "tuned": "y"}])
    assert any(all(part in line for part in ("a?", "[b]w[/c]", "x", "y")) for line in lines)


def test_long_texts_stand_under_each_other_at_full_width() -> None:
    long = " ".join(f"word{n}" for n in range(80))
    samples = [
        {"asked": "a?", "wanted": "[b]w[/c]", "base": long, "tuned": "y"},
        {"asked": "b?", "base": "", "tuned": "z"},
    ]
    lines = shown_answers(samples)
    first = next(n for n, line in enumerate(lines) if "word0" in line)
    assert lines[first].startswith("base")
    assert len(lines[first].rstrip()) > 80, "not in a narrow column"
    labels = [line.split()[0] for line in lines if line[:1].isalpha() and line[:7].strip() in terminal.COLUMNS]
    assert labels == ["asked", "wanted", "base", "tuned", "asked", "tuned"]
    assert any("[b]w[/c]" in line for line in lines)
