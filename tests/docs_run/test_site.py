"""The site: it builds without a warning, every page is in its menu, and a browser fetches nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs_run.names import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    # Without --quiet, which hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_page_is_built(site: Path) -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "package.md"]
    built = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    wanted = {page.relative_to(ROOT / "docs").with_suffix("").as_posix().replace("README", "index") for page in pages}
    assert wanted <= built
    assert "CONTRIBUTING" in built


def test_the_search_index_has_the_words_of_the_pages(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert all(word in index for word in ("GRPO", "QLoRA", "train.checkpointing", "AdaLoRA"))


def test_a_page_that_fetches_from_elsewhere_would_be_found_out() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import site_hooks
    finally:
        sys.path.pop(0)
    for text in (
        '<script src="https://x.org/a.js">',
        '<link rel="stylesheet" href=//x.org/a.css>',
        "url(https://x.org)",
    ):
        assert site_hooks.FETCHED.search(text)
    for text in ('<a href="https://x.org">', '<link rel="canonical" href="https://x.org/">', '<img src="a.svg">'):
        assert not site_hooks.FETCHED.search(text)


def test_a_broken_link_would_be_found_out(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[broken](nothing.md)\n")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    text = re.sub(r"^nav:.*", "", text, flags=re.M | re.S).replace("docs/site_hooks.py", f"{ROOT}/docs/site_hooks.py")
    (tmp_path / "mkdocs.yml").write_text(text)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "out")
    assert done.returncode != 0
    assert "nothing.md" in done.stderr
