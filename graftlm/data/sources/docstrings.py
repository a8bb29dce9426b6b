"""The built-in data set: functions of the running Python's own standard library -> first sentence of their docstring.

Real text and nothing to download. The group of a row is its module, so that a held-out function has no sibling in
training. Rows differ a little between Python versions, as the library does.
"""

import ast
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
LINES = range(3, 41)
SENTENCE_CHARACTERS = range(15, 161)
CODE_CHARACTERS = range(60, 801)


def rows() -> list[dict[str, str]]:
    """{prompt: source without docstring, completion: first sentence, group: module}, in the order of the modules."""
    root = _root()
    found: dict[str, dict[str, str]] = {}
    for file in files():
        module = file.relative_to(root).as_posix()
        for code, sentence in _functions(file):
            found.setdefault(code, {"prompt": code, "completion": sentence, "group": module})
    return list(found.values())


def files() -> list[Path]:
    """The files that the rows are made from."""
    found: list[Path] = []
    for folder, inside, names in os.walk(_root()):
        inside[:] = set(inside) - SKIPPED  # what is installed there may be far more than the library
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _functions(file: Path) -> Iterator[tuple[str, str]]:
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return  # the standard library ships a few files that are broken on purpose
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            code = _without_docstring(source, node)
            sentence = first_sentence(docstring or "")
            if code and len(sentence) in SENTENCE_CHARACTERS and len(code) in CODE_CHARACTERS:
                yield code, sentence


def first_sentence(docstring: str) -> str:
    """The first paragraph on one line, up to the first full stop that ends a sentence."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)[.!?](?= [A-Z]|$)", paragraph)
    return paragraph[: end.end()] if end else paragraph


def _without_docstring(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The function's source, dedented, with its docstring cut out; empty where nothing but a docstring is in it."""
    docstring, lines = node.body[0], source.split("\n")  # a form feed, too, would end a line of `splitlines`
    assert node.end_lineno is not None
    assert docstring.end_lineno is not None
    if len(node.body) == 1 or node.end_lineno - node.lineno not in LINES or docstring.lineno == node.lineno:
        return ""
    other_lines = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(_outdented(line, node.col_offset).rstrip() for line in other_lines if line.strip())


def _outdented(line: str, indent: int) -> str:
    """The line without its indent; a line of a string may have less of it."""
    return line[min(indent, len(line) - len(line.lstrip())) :]
