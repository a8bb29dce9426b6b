"""Hooks of MkDocs: a page may link to any file of the repository.

A link that leaves docs/ (`../benchmarks/crash/result.json`) leads to a copy of that file under `repository/` of the
site. A folder is its README.md, else its result.json. CONTRIBUTING.md of the root is a page. A built page that makes
the browser fetch something from another server stops the build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*?\bsrc=[\"']?(?:https?:)?//[^\"' >]+"
    r"|<link\b(?![^>]*\brel=[\"']?(?:canonical|prev|next|alternate))[^>]*?\bhref=[\"']?(?:https?:)?//[^\"' >]+"
    r"|(?:url\(|@import )[\"']?(?:https?:)?//[^\"')]+"
)
PLACES = {"CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Page of the site -> its file, where that is not in docs/."""


def on_files(files: Files, config: Any) -> Files:
    for page, source in PLACES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            if (copy := _copied(path)) and copy not in files.src_uris:
                files.append(File.generated(config, copy, abs_src_path=str(_file(path))))
    return files


def on_post_build(config: Any) -> None:
    for file in sorted(Path(config.site_dir).rglob("*")):
        if file.suffix in (".html", ".css") and (found := FETCHED.search(file.read_text(encoding="utf-8"))):
            raise PluginError(f"{file}: fetched from another server: {found[0]}")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return LINK.sub(lambda found: _link(page.file.src_uri, found[1]), markdown)


def _link(page: str, target: str) -> str:
    path = _in_repository(page, target)
    to = _copied(path) or next((name for name, source in PLACES.items() if source == path), None)
    if to is None:
        to = path.removeprefix("docs/")
    return posixpath.relpath(to, posixpath.dirname(page) or ".")


def _in_repository(page: str, target: str) -> str:
    """The path from the root of the repository of what a page links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(PLACES.get(page, f"docs/{page}")), target))


def _copied(path: str) -> str | None:
    """Where the site has a copy of a file outside of docs/."""
    if path.startswith("docs/") or path in PLACES.values() or not (ROOT / path).exists():
        return None
    return f"repository/{_file(path).relative_to(ROOT).as_posix()}".removesuffix(".md")


def _file(path: str) -> Path:
    file = ROOT / path
    if file.is_dir():
        file = next(file / name for name in ("README.md", "result.json", "__init__.py") if (file / name).is_file())
    return file
