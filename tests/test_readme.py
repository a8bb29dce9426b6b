"""README: the tree names files that exist, and figures are those of the benchmarks."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_file_in_the_tree_exists() -> None:
    tree = re.search(r"## The files\n\n```text\n(.*?)```", README, re.S)
    assert tree is not None
    folders: list[tuple[int, Path]] = []
    count = 0
    for line in tree[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else ROOT) / name
        assert path.exists(), f"{path} is in README's tree and not in the repository"
        if name.endswith("/"):
            folders.append((indent, path))
        count += 1
    assert count > 25


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_module_is_in_the_tree_or_its_folder_is_described() -> None:
    for file in (ROOT / "graftlm").glob("*/*.py"):
        folder = file.parent.name
        if file.name != "__init__.py" and folder in ("model", "data"):
            assert f"    {file.name}" in README, f"{file} is not in README's tree"
