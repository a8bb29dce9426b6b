"""Recipes that come with graftlm: `graft init` lists and writes them. A recipe is a .yaml file in this folder."""

from pathlib import Path

FOLDER = Path(__file__).parent


def recipes() -> dict[str, Path]:
    """Name -> file."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def title(file: Path) -> str:
    """What a recipe is for: its first line, a comment."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
