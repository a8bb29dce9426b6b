"""The files of the page: complete, small, from this server alone, and of colors that can be read."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from graftlm.serve import page

FOLDER = Path(str(files(page)))
TEXTS = {name: (FOLDER / name).read_text(encoding="utf-8") for name in page.FILES}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    for path, get in page.gets().items():
        app.add_api_route(path, get, methods=["GET"])
    return TestClient(app)


def test_the_list_of_files_is_what_there_is() -> None:
    assert set(page.FILES) == {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "")}
    assert sum(len(text.encode()) for text in TEXTS.values()) < 200 * 1024


def test_every_file_is_answered_with_its_type_and_the_policy(client: TestClient) -> None:
    for path in page.PATHS:
        answer = client.get(path)
        assert answer.status_code == 200, path
        name = path.removeprefix("/page/") if path != "/" else page.INDEX
        assert answer.text == TEXTS[name]
        assert answer.headers["content-type"].partition(";")[0] == page.FILES[name]
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.partition(" ")[::2] for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert policy["trusted-types"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    ["", "__init__.py", "../errors.py", "..%2ferrors.py", "%2e%2e/errors.py", "/etc/passwd", "%2fetc%2fpasswd"]
    + ["page/app.js", "app.js/", "app.js%00", "APP.JS", "..\\errors.py"],
)
def test_what_is_no_file_of_the_page_is_not_found(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text_of_scripts = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.text_of_scripts += data.strip()


def test_the_markup_holds_no_script_and_names_files_of_the_page_alone() -> None:
    elements = Elements(TEXTS[page.INDEX])
    assert not elements.text_of_scripts
    for _tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            assert (attributes.get(name) or "#")[0] == "#" or attributes[name] in page.PATHS


def test_what_has_a_label_is_there() -> None:
    elements = [attributes for _, attributes in Elements(TEXTS[page.INDEX]).found]
    ids = [attributes["id"] for attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in elements:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids
    for script in SCRIPTS.values():  # dom.js defines it
        assert set(re.findall(r'byId\("([\w-]+)"\)', script)) <= {*ids, "run", "data-row"}


def test_scripts_parse_no_html_run_no_text_and_name_no_other_host() -> None:
    unsafe = r"(inner|outer)HTML|AdjacentHTML|DOMParser|document\.write|\beval\b|new Function|srcdoc|ContextualFrag"
    for name, text in TEXTS.items():
        code = re.sub(r"^\s*(//|/?\*).*$", "", text, flags=re.M).replace('"http://www.w3.org/2000/svg"', "")  # a name
        assert not re.search(unsafe, code), name
        assert not re.search(r"https?://\w|[\"'(]//", code), name
        assert not re.search(r"@import|\burl\(", code), name


def test_scripts_import_each_other_and_nothing_else() -> None:
    imported = {name: set(re.findall(r'from "\./([\w.]+)";', text)) for name, text in SCRIPTS.items()}
    reached, left = set(), ["app.js"]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += imported[name]
    assert reached == set(SCRIPTS)
    for text in SCRIPTS.values():
        assert len(re.findall(r"\bfrom\b \"|import\(|importScripts", text)) == text.count('from "./')


# Colors --------------------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """As WCAG 2.2 defines it, from 1 to 21."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_measure_of_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the known grey that just fails AA


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_every_ground(theme: int) -> None:
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", TEXTS["style.css"])
    color = {name: both[theme] for name, *both in pairs}
    assert len(color) == TEXTS["style.css"].count("light-dark(")
    grounds = ("paper", "raised", "sunk")
    for text in ("ink", "soft", "leaf", "alarm"):
        for ground in grounds:
            assert contrast(color[text], color[ground]) >= 4.5, (text, ground)
    for text, ground in [("on-leaf", "leaf"), ("ink", "more"), ("ink", "less"), ("paper", "ink")]:
        assert contrast(color[text], color[ground]) >= 4.5, (text, ground)
    for ground in grounds:  # the edges of controls
        assert contrast(color["edge"], color[ground]) >= 3, ground


# Functions -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_functions_that_need_no_browser() -> None:
    script = Path(__file__).with_name("scripts.test.mjs")
    done = subprocess.run(["node", "--test", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
