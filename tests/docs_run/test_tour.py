"""Every file and function that a page names exists, and the tour leads past all parts of the house."""

from pathlib import Path

import pytest

from tests.docs_run.names import NAMED, PAGES, ROOT, resolve, title

TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
STAGES = [
    "data/sources/formats", "data/sources/load", "data/chat/render", "data/chat/masks", "data/quality/preflight",
    "data/batches/pack", "hub/load", "model/attach", "passes/forward", "kernels/linear",
    "losses/__init__", "training/loop", "run", "adapters/save", "generation/generate",
]  # fmt: skip
NAMES = sorted({(title(page), *named) for page in PAGES for named in NAMED.findall(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize(("page", "path", "name"), NAMES, ids=[f"{page}:{p}:{n}" for page, p, n in NAMES])
def test_a_name_in_the_docs_exists_in_the_file_that_is_named(page: str, path: str, name: str) -> None:
    assert (ROOT / f"{path}.py").is_file()
    assert resolve(path, name) is not None


def test_the_tour_passes_every_part() -> None:
    visited = [path.removeprefix("graftlm/") for path, _ in NAMED.findall(TOUR)]
    missed = [stage for stage in STAGES if stage not in visited]
    assert not missed, f"the tour does not pass {missed}"


def test_the_tour_goes_in_the_direction_of_the_data() -> None:
    first = {path.removeprefix("graftlm/"): n for n, (path, _) in reversed(list(enumerate(NAMED.findall(TOUR))))}
    way = ["data/sources/load", "data/sources/formats", "data/chat/render", "data/chat/masks",
           "data/quality/preflight", "data/batches/pack", "model/attach", "training/loop", "kernels/linear",
           "losses/__init__", "adapters/save", "generation/generate"]  # fmt: skip
    assert [first[stage] for stage in way] == sorted(first[stage] for stage in way)


def test_a_name_that_does_not_exist_would_be_found_out() -> None:
    with pytest.raises(AttributeError):
        resolve("graftlm/data/sources/load", "no_such_function")
    with pytest.raises(AttributeError):
        resolve("graftlm/data/chat/render", "Renderer.no_such_method")


def test_the_tokens_on_the_tour_are_those_of_smollm2(smollm2: str) -> None:
    from graftlm.data.chat.masks import weights
    from graftlm.data.chat.render import Renderer
    from graftlm.data.chat.roles import Role
    from graftlm.data.sources.formats import Message
    from graftlm.hub.tokenizer import load_tokenizer

    renderer = Renderer(load_tokenizer(smollm2))
    row = renderer.conversation([Message("user", "Where is my parcel?"), Message("assistant", "On its way.")])
    parts = zip(row.ids, renderer.token_texts(row.ids.tolist()), row.roles, weights(row, "response"), strict=True)
    lines = [
        f"| {n} | {i} | `{text!r}` | {Role(role).name.lower().replace('_', '-')} | {weight:g} |"
        for n, (i, text, role, weight) in enumerate(parts)
    ]
    shown = [line.replace("\\|", "|") for line in TOUR.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert shown == lines[21:]
    assert len(lines) == 41
    assert len(renderer.prompt([Message("user", "Where is my parcel?")])) == 35


def test_every_link_of_the_docs_leads_somewhere() -> None:
    import re

    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), f"{title(page)} links to {target}"
            assert not anchor or anchor in _anchors(linked), f"{title(page)} links to {target}"


def _anchors(page: Path) -> set[str]:
    import re

    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_file_that_contributing_names_exists() -> None:
    import re

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:graftlm|tests|docs|benchmarks)/[\w/.-]+)`", text):
        path = re.sub(r"(NAME|GROUP|NNN).*", "", name)
        assert (ROOT / path).exists(), name
