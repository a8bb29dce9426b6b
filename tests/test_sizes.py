"""No package, module or function grows beyond what one can keep in view, or it says why."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import graftlm

PACKAGE = Path(graftlm.__file__).parent
LARGE = {"data", "deltas"}
"""Packages that may be larger: many parts of one form, a file each."""
REASON = "# Over 60 lines: "


def modules() -> Iterator[tuple[Path, list[str]]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), path.read_text(encoding="utf-8").splitlines()


def test_packages_have_at_most_4000_lines_and_modules_450() -> None:
    packages: Counter[str] = Counter()
    for path, lines in modules():
        assert len(lines) <= 450, f"{path} has {len(lines)} lines"
        packages[path.parts[0]] += len(lines)
    assert len(packages) > 20
    assert {name for name, lines in packages.items() if lines > 4000} <= LARGE, packages.most_common(5)


def test_a_function_over_60_lines_says_why_at_its_top() -> None:
    long = []
    for path, lines in modules():
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if node.end_lineno - node.lineno >= 60 and text.count(REASON) != 1:
                    long.append(f"{path}:{node.lineno} {node.name}")
    assert not long
