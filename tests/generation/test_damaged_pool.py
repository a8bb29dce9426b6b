"""Folders damaged at random: each is refused by an error of ours, or is as good as it was; the pool is as before."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.adapters.folder import CONFIG, RECORD, TEMPLATE, WEIGHTS, sha256_of
from graftlm.errors import GraftError
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.registry import attachment
from graftlm.testing import tiny_tokenizer
from tests.adapters.folders import write_record
from tests.errors import raises
from tests.generation.adapters import alone, base, write_adapter

PROMPT = [5, 9, 200, 31]

Damage = Callable[[Path, Random], Any]


def flip(file: str) -> Damage:
    def damage(folder: Path, random: Random) -> None:
        data = bytearray((folder / file).read_bytes())
        for _ in range(random.choice([1, 1, 2, 8])):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        (folder / file).write_bytes(data)

    return damage


def cut(file: str) -> Damage:
    def damage(folder: Path, random: Random) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: random.randrange(len(data))])

    return damage


def header_length(folder: Path, random: Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = random.choice([0, 1, 7, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])


def header(folder: Path, random: Random) -> None:
    """Offsets, shapes or dtypes of two tensors exchanged, or one of them nonsense."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    tree = json.loads(data[8 : 8 + length])
    one, other = random.sample([key for key in tree if key != "__metadata__"], 2)
    key = random.choice(["data_offsets", "shape", "dtype", "all"])
    if key == "all":
        tree[one], tree[other] = tree[other], tree[one]
    else:
        nonsense = random.choice([[-1, 5], [0, 2**62], [2**40, 2**41], [], None, "F64", "X", {}, [1.5, 2]])
        tree[one][key], tree[other][key] = random.choice(
            [(tree[other][key], tree[one][key]), (nonsense, tree[one][key])]
        )
    text = json.dumps(tree).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def tensors(folder: Path, random: Random) -> None:
    found = load_file(folder / WEIGHTS)
    key = random.choice(sorted(found))
    tensor = found[key].clone()
    kind = random.choice(
        ["nan", "inf", "shape", "rank", "missing", "extra", "integers", "renamed", "empty", "transposed"]
    )
    if kind in ("nan", "inf"):
        tensor.view(-1)[random.randrange(tensor.numel())] = float(kind)
    changed = {
        "shape": tensor[:-1].contiguous(), "rank": torch.cat([tensor, tensor], dim=random.randrange(2)),
        "integers": tensor.long(), "empty": tensor[:0].clone(), "transposed": tensor.T.contiguous(),
    }  # fmt: skip
    found[key] = changed.get(kind, tensor)
    if kind in ("missing", "renamed"):
        del found[key]
    if kind in ("extra", "renamed"):
        found[key.replace("layers.0", "layers.9").replace("layers.1", "layers.9") + "x"] = tensor.clone()
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def tree(file: str) -> Damage:
    """A value of a JSON file replaced by nonsense, a key removed, or the whole file something else."""

    def damage(folder: Path, random: Random) -> None:
        kinds = ["[" * 100_000, "", "null", "[]", "{}", '{"a": ' * 5000, "\x00", "NaN", json.dumps({"sha256": 5})]
        if random.random() < 0.2:
            (folder / file).write_text(random.choice(kinds))
            return
        whole = json.loads((folder / file).read_text())
        inner = whole
        while True:
            key = random.choice(sorted(inner))
            if isinstance(inner[key], dict) and inner[key] and random.random() < 0.7:
                inner = inner[key]
                continue
            break
        if random.random() < 0.3 and key != RECORD:  # without its checksum of itself it is one of before
            del inner[key]
        else:
            nonsense = [None, -1, 0, 2**70, 1e400, "x", "../x", [], {}, [[]], {"a": None}, True, "\x00"]
            inner[key] = random.choice([each for each in nonsense if repr(each) != repr(inner[key])])
        (folder / file).write_text(json.dumps(whole))

    return damage


def link(folder: Path, random: Random) -> None:
    file = folder / random.choice([CONFIG, WEIGHTS, TEMPLATE, "tokenizer.json"])
    outside = folder.parent / f"outside-{file.name}"
    shutil.copy(file, outside)
    file.unlink()
    file.symlink_to(random.choice([outside, Path("..") / outside.name]))


def something_else(folder: Path, random: Random) -> None:
    """A folder, a pipe, a link to itself or nothing in the place of a file."""
    file = folder / random.choice([CONFIG, WEIGHTS])
    file.unlink()
    kind = random.randrange(4)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        os.mkfifo(file)
    elif kind == 2:
        file.symlink_to(file.name)


def foreign(damage: Damage) -> Damage:
    """The same damage where no checksum shows it."""

    def without(folder: Path, random: Random) -> None:
        (folder / RECORD).unlink()
        damage(folder, random)

    return without


def signed(damage: Damage) -> Damage:
    """The same damage with a record that agrees with it."""

    def again(folder: Path, random: Random) -> None:
        damage(folder, random)
        record = json.loads((folder / RECORD).read_text())
        record["sha256"] = {file: sha256_of(folder / file) for file in (CONFIG, WEIGHTS)}
        write_record(folder, record)

    return again


DAMAGE: dict[str, Damage] = {
    "bits of weights": flip(WEIGHTS), "bits of config": flip(CONFIG), "cut weights": cut(WEIGHTS),
    "cut config": cut(CONFIG), "cut record": cut(RECORD), "header length": header_length, "header": header,
    "tensors": tensors, "config": tree(CONFIG), "link": link, "something else": something_else,
    "signed header length": signed(header_length), "signed tensors": signed(tensors),
    "signed cut": signed(cut(WEIGHTS)), "foreign cut": foreign(cut(WEIGHTS)),
    "foreign tensors": foreign(tensors), "foreign header length": foreign(header_length),
    "record": tree(RECORD), "bits of record": flip(RECORD),
}  # fmt: skip
"""What must be refused, each time that it changed a file."""

UNSEEN: dict[str, Damage] = {
    "signed header": signed(header), "foreign header": foreign(header), "tokenizer": flip("tokenizer.json"),
    "bits of a template": flip(TEMPLATE),
    "signed config": signed(tree(CONFIG)), "signed bits": signed(flip(WEIGHTS)),
    "foreign config": foreign(tree(CONFIG)), "foreign bits": foreign(flip(WEIGHTS)),
}  # fmt: skip
"""What may be another adapter that is whole: no checksum covers it. It is never more than an error."""


class Case:
    """A pool with one good adapter, beside which damaged ones are registered, and its answer."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.good = write_adapter(place / "good", 1, tokenizer=tiny_tokenizer())
        self.pool = AdapterPool(base(), slots=2)
        self.pool.register("good", self.good)
        self.engine = Engine(self.pool.model, prepack=False)
        self.expected = alone(self.good, [PROMPT])[0]
        self.check()

    def check(self) -> None:
        with self.pool.acquire("good", timeout=60) as lease:
            found = self.engine.wait(self.engine.submit(Request(PROMPT, 6, adapters=lease.adapters)))
        assert found.ids == self.expected

    def state(self) -> Any:
        record = attachment(self.pool.model)
        return list(record.configs), list(record.factors), record.version, self.pool.registered(), self.pool.counts()

    def try_one(self, damage: Damage, seed: int) -> bool:
        """Whether the damaged folder was refused."""
        folder = shutil.copytree(self.good, self.place / "damaged")
        try:
            damage(folder, Random(seed))
            before = self.state()
            refused = False
            try:
                self.pool.register("damaged", folder)
            except GraftError:
                refused = True
            if refused:
                assert self.state() == before
                return True
            try:
                self.pool.acquire("damaged", timeout=60).release()
            finally:
                self.pool.unregister("damaged")
            return False
        finally:
            shutil.rmtree(folder)
            for file in self.place.glob("outside-*"):
                file.unlink()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("damaged"))


def same(folder: Path, other: Path) -> bool:
    return all(
        (folder / f.name).is_file() and (folder / f.name).read_bytes() == f.read_bytes() for f in other.iterdir()
    )


def noted(damage: Damage, good: Path, changed: list[bool]) -> Damage:
    """The same damage; appends whether it changed anything."""

    def noting(folder: Path, random: Random) -> None:
        damage(folder, random)
        changed.append(any(file.is_symlink() for file in folder.iterdir()) or not same(folder, good))

    return noting


def passes(case: Case, kind: str, seeds: range) -> None:
    refused = 0
    for seed in seeds:
        if kind in UNSEEN:
            refused += case.try_one(UNSEEN[kind], seed)
            continue
        changed = list[bool]()
        was = case.try_one(noted(DAMAGE[kind], case.good, changed), seed)
        refused += was
        assert was or not changed[0], f"{kind} {seed}: loaded in spite of its damage"
    case.check()
    assert refused or kind in UNSEEN


@pytest.mark.parametrize("kind", [*DAMAGE, *UNSEEN])
def test_damage_is_refused_or_harmless(case: Case, kind: str) -> None:
    passes(case, kind, range(8))


@pytest.mark.long(group="pool")
@pytest.mark.parametrize("kind", [*DAMAGE, *UNSEEN])
def test_damage_is_refused_or_harmless_in_ten_thousand_cases(case: Case, kind: str) -> None:
    passes(case, kind, range(1000, 1380))


def test_a_link_out_of_the_folder_is_refused(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.good, tmp_path / "a")
    (folder / TEMPLATE).unlink()
    (folder / TEMPLATE).symlink_to(case.good / TEMPLATE)
    with raises("adapter/link-out-of-folder"):
        case.pool.register("linked", folder)
    (folder / TEMPLATE).unlink()
    (folder / "other.jinja").write_bytes((case.good / TEMPLATE).read_bytes())
    (folder / TEMPLATE).symlink_to("other.jinja")
    (tmp_path / "whole").symlink_to(folder)
    case.pool.register("linked", tmp_path / "whole")
    case.pool.unregister("linked")
