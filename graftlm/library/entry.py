"""What an index says of one adapter: an entry, which follows from the adapter's folder alone.

    DIR/NAME/                       the adapter, as `Adapter.read` reads it
    DIR/NAME/about.json             what was said when it was added: description, licence, scores, time, digest of rows
    DIR/NAME/examples.jsonl         example rows, where some were given

A folder without about.json is an adapter of which less is known. What is not known is null.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, Strict
from safetensors import SafetensorError, safe_open

from graftlm.adapters.folder import CONFIG, WEIGHTS, check_folder, read_json, read_record, sha256_of, sha256_of_bytes
from graftlm.adapters.foreign.config import method_of
from graftlm.adapters.peft import OWN_TYPE
from graftlm.adapters.tensors import PREFIX
from graftlm.config.schema import Count, PositiveCount, build, config
from graftlm.deltas import METHODS
from graftlm.errors import AdapterError, RecipeError

ABOUT, EXAMPLES = "about.json", "examples.jsonl"

Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]


@config
class Score:
    """A figure of an adapter, and how many items it is over. A wrong value raises a ValueError."""

    value: Finite
    n: PositiveCount | None = None
    """None where it is not known."""


@config
class About:
    """What somebody said of an adapter; None where nobody did. A wrong value raises a ValueError."""

    description: str | None = None
    licence: str | None = None
    scores: Mapping[str, Score] = Field(default_factory=dict)
    data: str | None = None
    """Digest of the training rows, as the run recorded it: token ids and weights, in their order."""
    created: str | None = None
    """When it was added, in UTC by ISO 8601."""


@config
class Entry(About):
    """What the index says of an adapter. A wrong value raises a ValueError."""

    base: str | None
    """The name of the base, as the folder has it."""
    base_fingerprint: str | None
    """None for an adapter of another tool."""
    method: str
    targets: tuple[str, ...]
    """The layers by the ends of their names, a keyword, or a regular expression; empty where nothing is said."""
    sites: Count | None
    """How many layers it changes; None for a method whose tensors do not say."""
    ranks: tuple[PositiveCount, ...]
    """Each rank that occurs once, the smallest first; empty for a method without rank."""
    bytes: Count
    """Of the tensors' file."""
    examples: Count
    """Example rows in the folder."""
    files: Mapping[str, str]
    """Name of a file in the folder -> its SHA-256."""

    @property
    def digest(self) -> str:
        """One digest of all files."""
        return "sha256:" + sha256_of_bytes(json.dumps(sorted(self.files.items())).encode())


def entry_of(folder: Path) -> Entry:
    """The entry of the adapter in a folder.

    Raises AdapterError for a folder that is no adapter, is damaged (by the checksums of ours), or whose about.json
    cannot be read. The numbers in the tensors are not looked at.
    """
    check_folder(folder)
    record, stored = read_record(folder), read_json(folder / CONFIG)
    shapes = shapes_in(folder / WEIGHTS)
    about = about_of(folder)
    base = (record or {}).get("base", {})
    own = None if record is None else record["config"]
    read = _Contents(folder, stored, own, shapes)
    return Entry(
        description=about.description,
        licence=about.licence,
        scores=about.scores,
        data=about.data,
        created=about.created,
        base=base.get("name") or stored.get("base_model_name_or_path") or None,
        base_fingerprint=base.get("digest"),
        method=read.method(),
        targets=read.targets(),
        sites=read.sites(),
        ranks=read.ranks(),
        bytes=(folder / WEIGHTS).stat().st_size,
        examples=_lines(folder / EXAMPLES),
        files=digests_of(folder),
    )


def digests_of(folder: Path) -> dict[str, str]:
    """The files in a folder, without those in folders inside it: name -> SHA-256."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def about_of(folder: Path) -> About:
    file = folder / ABOUT
    return from_tree(About, read_json(file), file) if file.is_file() else About()


def from_tree(kind: Any, tree: Mapping[str, Any], file: Path) -> Any:
    """A config of a library's file; AdapterError where it is none."""
    try:
        return build(kind, dict(tree), source=str(file))
    except RecipeError as error:
        raise AdapterError(
            f"{error}\n{file} was edited or is of another version of graftlm: restore it, or remove it to have what "
            "follows from the adapters alone",
            code="unreadable-index",
        ) from None


def shapes_in(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a file, by name; the tensors are not read."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a complete safetensors file: {error}", code="damaged-weights") from None


class _Contents(NamedTuple):
    """An adapter's config and the shapes of its tensors."""

    folder: Path
    stored: Mapping[str, Any]
    own: Mapping[str, Any] | None
    """The config in graftlm.json."""
    shapes: Mapping[str, Sequence[int]]

    def method(self) -> str:
        """The name of ours where there is one, else PEFT's type in small letters."""
        if self.own is not None:
            return str(self.own.get("method"))
        try:
            return method_of(self.stored, self.folder / CONFIG)[0]
        except AdapterError:
            return str(self.stored.get("peft_type")).lower()

    def targets(self) -> tuple[str, ...]:
        given = self.stored.get("target_modules") if self.own is None else self.own.get("targets")
        if isinstance(given, str):
            return (given,)
        return tuple(sorted({str(each).rpartition(".")[2] for each in given or ()}))

    def sites(self) -> int | None:
        suffixes = self._suffixes()
        found = {key.removesuffix(end) for key in self.shapes for end in suffixes if key.endswith(end)}
        return len(found) or None

    def ranks(self) -> tuple[int, ...]:
        """Of LoRA and its kin by the shapes of A, of others as their config says."""
        if self.stored.get("peft_type") == "LORA":
            ends = (".lora_A.weight", ".lora_embedding_A")
            return tuple(sorted({int(shape[0]) for key, shape in self.shapes.items() if key.endswith(ends)}))
        r = self.stored.get("r") if self.own is None else self.own.get("r")
        return (r,) if isinstance(r, int) and r > 0 else ()

    def _suffixes(self) -> list[str]:
        """What follows the name of a layer in the keys of tensors; none where that is not known."""
        method = METHODS.get(self.method())
        layout = None if method is None else method.delta.peft
        if layout is None or self.stored.get("peft_type") == OWN_TYPE:
            return []
        if not any(key.startswith(PREFIX) for key in self.shapes):
            return []
        return [f".{suffix}" for suffix in (*layout.tensors.values(), *layout.embedding.values())]


def _lines(file: Path) -> int:
    return sum(1 for line in file.read_text(encoding="utf-8").splitlines() if line) if file.is_file() else 0
