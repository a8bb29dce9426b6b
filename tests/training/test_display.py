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
