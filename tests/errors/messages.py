"""The places in graftlm that raise errors for users, read off the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from graftlm import errors

ROOT = Path(__file__).parent.parent.parent


class Site(NamedTuple):
    place: str
    kind: str
    """The class."""
    code: str
    """In full; empty where the source gives none, or none that is literal."""
    message: str
    """With `...` for what differs."""


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted((ROOT / "graftlm").rglob("*.py")):
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def sites() -> list[Site]:
    """Every call of an error class."""
    trees = list(modules())
    families = {
        name: kind.family
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.GraftError)
    }
    texts: dict[str, ast.expr] = {}
    texts_of: dict[Path, dict[str, ast.expr]] = {file: {} for file, _ in trees}
    for file, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name not in families:
                for base in map(ast.unparse, node.bases):
                    families |= {node.name: families[base]} if base in families else {}
            elif isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return) and node.body[-1].value:
                texts[node.name] = texts_of[file][node.name] = node.body[-1].value
    found = []
    for file, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (kind := ast.unparse(node.func).rpartition(".")[2]) in families:
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                slug = next((k.value for k in node.keywords if k.arg == "code"), None)
                literal = isinstance(slug, ast.Constant) and isinstance(slug.value, str)
                code = f"{families[kind]}/{slug.value}" if literal else ""  # type: ignore[union-attr]
                found.append(Site(place, kind, code, message(node.args[0], texts | texts_of[file])))
    return found


def message(node: ast.expr, texts: dict[str, ast.expr]) -> str:
    """The text of an expression on one line, `...` for what only a run knows. `texts` has what functions return."""
    return re.sub(r"\s+", " ", _text(node, texts)).strip()


def _text(node: ast.expr, texts: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, texts) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, texts) + _text(node.right, texts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in texts:
        return _text(texts[node.func.id], {})
    return "..."
