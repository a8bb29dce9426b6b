"""The tokenizer of a base, and those that adapters bring: all of the base's tokens, and more."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from graftlm.config.template_variables import checked_with_variables
from graftlm.errors import AdapterError, BaseModelError, first_lines, numbered
from graftlm.hub.config import BaseConfig, base_config
from graftlm.hub.fingerprint import base_record
from graftlm.hub.locate import hub_hint, locate


def load_tokenizer(base: str | Path | BaseConfig, *, network: bool = False) -> Any:
    """The tokenizer of a base alone, with its chat template; raises BaseModelError."""
    base = base_config(base)
    return tokenizer_at(base, locate(base, network=network), network=network)


def tokenizer_at(base: BaseConfig, where: str, *, network: bool) -> Any:
    """The tokenizer in the folder, or under the hub id, `where`; raises BaseModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where,
            revision=base.revision,
            local_files_only=not network,
            trust_remote_code=base.run_code_shipped_with_the_model,
        )
    except Exception as error:
        hint = hub_hint(base, network)
        raise BaseModelError(
            f"{base.name}: its tokenizer cannot be loaded: {first_lines(error)}{hint}", code="unloadable-tokenizer"
        ) from None
    if base.template is not None:
        try:
            tokenizer.chat_template = Path(base.template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BaseModelError(
                f"base.template: {base.template} cannot be read: {error}", code="unreadable-template"
            ) from None
    if base.template_variables:
        try:
            tokenizer.chat_template = checked_with_variables(plain_template(tokenizer), base.template_variables)
        except ValueError as error:
            raise BaseModelError(f"base.template_variables: {error}", code="invalid-template-variables") from None
    return tokenizer


def plain_template(tokenizer: Any) -> str:
    """The chat template of a tokenizer, of several the one called `default`; empty where there is none."""
    own = tokenizer.chat_template
    return (own.get("default") if isinstance(own, dict) else own) or ""


def read_tokenizer(model: Any, files: Mapping[str, bytes], folder: Path) -> Any:
    """The tokenizer in an adapter's files, or None where there is none; AdapterError where it does not fit the model.

    `folder` is what messages call the adapter. Of a base that was loaded from a folder, the tokenizer there is compared
    at once (`with_more_tokens`).
    """
    if "tokenizer.json" not in files:
        return None
    try:
        with TemporaryDirectory() as place:
            for name, contents in files.items():
                Path(place, name).write_bytes(contents)
            own = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        own.name_or_path = str(folder)
    except Exception as error:
        raise AdapterError(
            f"{folder / 'tokenizer.json'}: the adapter's tokenizer cannot be loaded: {first_lines(error)}. Restore it, "
            "or remove the file to use the base's",
            code="unloadable-tokenizer",
        ) from None
    rows, base = embedding_rows(model), base_record(model).folder
    if base is not None and (there := Path(base) / "tokenizer.json").is_file():
        _check_tokens(_vocabulary(there), own.get_vocab(), rows, str(folder))
    elif highest := [(i, token) for token, i in own.get_vocab().items() if i >= rows]:
        raise AdapterError(_too_many(str(folder), dict(highest), rows), code="tokens-without-embeddings")
    return own


@lru_cache(maxsize=8)
def with_more_tokens(tokenizer: Any, other: Any, rows: int, name: str) -> Any:
    """The one of two tokenizers that has all tokens of the other under the same ids, and more; the second of equals.

    `name` is the adapter that the second one came with, `rows` how many tokens the model has embeddings for. Raises
    AdapterError, naming tokens, where neither has all tokens of the other, and where there are no embeddings for one.
    """
    if tokenizer is other:
        return tokenizer
    here, there = tokenizer.get_vocab(), other.get_vocab()
    if there.items() < here.items():
        return tokenizer
    _check_tokens(here, there, rows, name)
    return other


def embedding_rows(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    layer = model.get_input_embeddings()
    return int(getattr(layer, "base", layer).weight.shape[0])


def _vocabulary(file: Path) -> dict[str, int]:
    """Token -> id, of a tokenizer.json."""
    try:
        found: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the library raises this very class
        raise BaseModelError(f"{file}: cannot be read: {first_lines(error)}", code="unloadable-tokenizer") from None
    return found


def _check_tokens(base: Mapping[str, int], own: Mapping[str, int], rows: int, name: str) -> None:
    """Raise AdapterError where an adapter's vocabulary is not the base's with tokens added that have embeddings."""
    odd = sorted((token for token in base if own.get(token) != base[token]), key=lambda token: base[token])
    if odd:
        differences = [f"{token!r}: {base[token]} here, {own.get(token, 'none')} in the adapter's" for token in odd]
        raise AdapterError(
            f"{name}: the adapter's tokenizer is not the one that is used here with tokens added: {len(odd):,} of "
            f"{len(base):,} tokens have another id in it, such as:\n{numbered(differences, 3)}\nIs this its base? If "
            "its tokenizer files are another model's, remove them to use the base's",
            code="tokenizer-mismatch",
        )
    if above := {i: token for token, i in own.items() if token not in base and i >= rows}:
        raise AdapterError(_too_many(name, above, rows), code="tokens-without-embeddings")


def _too_many(name: str, above: Mapping[int, str], rows: int) -> str:
    tokens = [f"{above[i]!r}: {i}" for i in sorted(above)]
    return (
        f"{name}: the adapter's tokenizer has {len(above):,} tokens for which the base has no embeddings (it has "
        f"{rows:,} rows), such as:\n{numbered(tokens, 3)}\nResize the base to {max(above) + 1:,} rows "
        "(model.resize_token_embeddings in transformers), save it with this tokenizer and use that as the base"
    )
