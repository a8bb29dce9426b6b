"""What a run shows in a terminal: what stands in rows and names of files is text, never markup."""

from io import StringIO

from rich.console import Console

from graftlm.training import display


def test_the_name_of_a_file_is_no_markup() -> None:
    console = Console(width=80, record=True, file=StringIO())
    tokens = [{"text": "[bold]a[/nothing]", "role": "user", "weight": 0.0}]
    console.print(display.tokens({"where": "data/[/x]/[red]rows.jsonl:3", "tokens": tokens}))
    shown = console.export_text()
    assert "data/[/x]/[red]rows.jsonl:3" in shown
    assert "[bold]a[/nothing]" in shown


def test_a_token_s_weight_can_be_seen() -> None:
    console = Console(width=80, record=True, force_terminal=True, color_system="truecolor", file=StringIO())
    tokens = [{"text": text, "role": "assistant", "weight": w} for text, w in (("one", 1), ("half", 0.5), ("two", 2))]
    console.print(display.tokens({"where": "f:1", "tokens": tokens}))
    shown = console.export_text(styles=True)
    styles = [
        next(part for part in shown.split("\x1b[") if part.endswith(f"m{text}")) for text in ("one", "half", "two")
    ]
    assert len({style.partition("m")[0] for style in styles}) == 3
    assert "with less weight" in shown
    assert "with more weight" in shown
    console.print(display.tokens({"where": "f:1", "tokens": tokens[:1]}))
    assert "with" not in console.export_text()
