"""What the pages of docs/ are made of: fenced blocks, and names of files and functions."""

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
NAMED = re.compile(r"`(graftlm/[\w/]+)\.py: ([\w.]+)`")


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: (line of the first line inside, text)."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def resolve(path: str, name: str) -> object:
    """What `path: name` means: the module is imported and the dotted name looked up in it."""
    module = import_module(path.replace("/", ".").removesuffix(".__init__"))
    return reduce(getattr, name.split("."), module)
