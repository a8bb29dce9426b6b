"""The models that requests name: a base, and the adapters of a pool over it."""

import datetime
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from graftlm.data.chat.render import Renderer
from graftlm.errors import AdapterError, GraftError, nearest
from graftlm.generation.adapter_pool import AdapterPool, Lease
from graftlm.generation.checked_adapter import NAME
from graftlm.generation.grammar import CompiledGrammar, Grammar, GrammarCompiler
from graftlm.generation.pool_parts import Registered
from graftlm.generation.requests import Ids
from graftlm.hub.fingerprint import fingerprint, public_name
from graftlm.hub.stopping import all_stop_ids
from graftlm.routing.routing import Routing
from graftlm.serve.dialect import Dialect
from graftlm.serve.errors import ApiError, from_graft, invalid
from graftlm.serve.logprobs import TokenTexts
from graftlm.serve.security import header_text

T = TypeVar("T")

AUTO = "auto"
"""The model whose adapters the router of the server chooses."""

RENDERINGS = 32
"""Renderings that are kept, each with a process that runs its chat template: adapters of one recipe share theirs."""


class Rendering:
    """What follows from a tokenizer and a chat template, made once for all requests that have both."""

    def __init__(self, model: Any, renderer: Renderer) -> None:
        self.renderer = renderer
        self.dialect = Dialect.of(renderer)
        self.texts = TokenTexts(renderer.tokenizer)
        self.stop_ids = all_stop_ids(model, renderer.stop_ids)
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar for this tokenizer. RequestError for one that cannot be."""
        with self._lock:
            self._compiler = self._compiler or GrammarCompiler(self.renderer.tokenizer, self.stop_ids)
        return self._compiler.compile(grammar)


@dataclass
class Opened:
    """A model for one request: adapters that stay until `lease` is released, and what renders its prompts."""

    lease: Lease
    rendering: Rendering
    tag: str
    """`name@fingerprint`: which weights answer."""
    vocabulary: int
    """Ids that the model has embeddings for."""

    @property
    def renderer(self) -> Renderer:
        return self.rendering.renderer

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.lease.release()


class Catalog:
    """A base by its public name, and adapters by theirs. All methods may be called from any thread."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: AdapterPool,
        *,
        alias: str = "",
        folder: Path | None = None,
        routing: Routing | None = None,
    ) -> None:
        """`alias`: another name of the base. `folder`: where adapters that clients load lie. `routing`: who chooses the
        adapters of requests with the model `auto`; None: there is no such model."""
        self.routing = routing
        self.model, self.tokenizer, self.pool, self.folder = model, tokenizer, pool, folder
        self.base, self.alias = public_name(model), alias
        self.digest = fingerprint(model).digest
        self.context = context_of(model)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.started = int(datetime.datetime.now().timestamp())
        self._renderings: OrderedDict[Any, Rendering] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return [self.base, *(each.name for each in self.pool.registered())]

    def is_routed(self, model: str) -> bool:
        return self.routing is not None and model == AUTO

    def resolve(self, model: str) -> str | None:
        """The adapter that `name` or `base:name` is; None for the base. ApiError (404) for any other name."""
        if model == self.base:
            return None
        names = self.names[1:]
        for name in (model, model.removeprefix(f"{self.base}:")):
            if name in names:
                return name
        if model and model == self.alias:
            return None
        raise ApiError(
            404, f"no model {model!r:.200}. {nearest(model, self.names)}", code="model_not_found", param="model"
        )

    def acquire(self, model: str, timeout: float) -> tuple[Lease, str]:
        """The adapters of a model, and its tag. Waits for a slot; ApiError where none is free in time."""
        if self.is_routed(model):
            raise invalid(
                f"the model {AUTO!r} is chosen by a prompt that is answered, and this route answers none: name a model",
                "model",
            )
        name = self.resolve(model)
        lease = self._waited(lambda: self.pool.acquire({} if name is None else name, timeout=max(0.0, timeout)))
        return lease, header_text(f"{name or self.base}@{lease.fingerprint or self.digest}")

    def _waited(self, take: Callable[[], T]) -> T:
        try:
            return take()
        except AdapterError as error:
            if error.slug == "not-registered":  # since a moment ago
                raise ApiError(404, str(error), code="model_not_found", param="model") from None
            if error.slug == "no-free-slot":
                raise ApiError(503, str(error), code=error.code, retry_after=5) from None
            raise ApiError(500, str(error), code=error.code) from None

    def open(self, model: str, timeout: float) -> Opened:
        """A model for one request; whoever gets it closes it."""
        return self._opened(*self.acquire(model, timeout))

    def open_for(self, model: str, timeout: float, render: Callable[[Opened], Sequence[Ids]]) -> Opened:
        """As `open`, for the prompts that `render` makes: by these the router chooses, where the model is `auto`."""
        if self.routing is None or not self.is_routed(model):
            return self.open(model, timeout)
        deadline = time.monotonic() + timeout
        routing = self.routing
        with self._opened(self._waited(routing.before), AUTO) as before:
            prompts = render(before)
        if len(prompts) != 1:
            raise invalid(f"the model {AUTO!r} is chosen by one prompt, and here are {len(prompts)}", "prompt")
        left = deadline - time.monotonic()
        chosen = self._waited(lambda: routing.route(list(map(int, prompts[0])), timeout=max(0.0, left)))
        name = self.base if chosen.weights == {} else chosen.shown
        tag = f"{name}@{chosen.lease.fingerprint or self.digest}"
        return self._opened(chosen.lease, header_text(tag))

    def _opened(self, lease: Lease, tag: str) -> Opened:
        try:
            return Opened(lease, self._rendering(lease), tag, self.vocabulary)
        except GraftError as error:
            lease.release()
            raise from_graft(error, "model") from None
        except BaseException:
            lease.release()
            raise

    def _rendering(self, lease: Lease) -> Rendering:
        """As `answer` renders for these adapters (`generation.answer.chat_renderer`)."""
        chat, tokenizer = lease.chat, self.tokenizer if lease.tokenizer is None else lease.tokenizer
        template = chat.template if chat else tokenizer.chat_template
        today = (chat.today if chat else None) or datetime.date.today()
        key = (id(tokenizer), str(template), today, chat.turn_order if chat else "refuse")
        with self._lock:
            if key not in self._renderings:
                renderer = Renderer(tokenizer, template, today=today, turn_order=key[3])
                self._renderings[key] = Rendering(self.model, renderer)
            self._renderings.move_to_end(key)
            while len(self._renderings) > RENDERINGS:
                self._renderings.popitem(last=False)
            return self._renderings[key]

    # What /v1/models shows -------------------------------------------------------------------------------------------

    def entry(self, model: str) -> dict[str, Any]:
        if self.is_routed(model):
            return self._auto_entry()
        name = self.resolve(model)
        return self._base_entry() if name is None else self._adapter_entry(self.pool.get(name))

    def entries(self) -> list[dict[str, Any]]:
        auto = [] if self.routing is None else [self._auto_entry()]
        return [self._base_entry(), *map(self._adapter_entry, self.pool.registered()), *auto]

    def _auto_entry(self) -> dict[str, Any]:
        assert self.routing is not None
        shown = {"id": AUTO, "object": "model", "created": self.started, "owned_by": "graftlm"}
        return shown | {"parent": self.base, "router": self.routing.config.name, "max_model_len": self.context}

    def _base_entry(self) -> dict[str, Any]:
        shown = {"id": self.base, "object": "model", "created": self.started, "owned_by": "graftlm"}
        return shown | {"parent": None, "fingerprint": self.digest, "max_model_len": self.context}

    def _adapter_entry(self, one: Registered) -> dict[str, Any]:
        shown = {"id": one.name, "object": "model", "created": self.started, "owned_by": "graftlm"}
        known = {"fingerprint": one.fingerprint, "method": one.method, "max_model_len": self.context}
        return shown | {"parent": self.base, "root": one.name} | known

    # Adapters that come and go ---------------------------------------------------------------------------------------

    def load(self, name: str, path: str, *, replace: bool) -> None:
        """Register an adapter that lies in the folder of adapters."""
        if not NAME.fullmatch(name) or name == self.base:
            raise invalid(f"lora_name {name!r:.200} must be letters, digits, '.', '_' and '-'", "lora_name")
        if self.is_routed(name):
            raise invalid(f"lora_name {name!r} is the model whose adapters the router chooses", "lora_name")
        if name in self.names and not replace:
            raise invalid(
                f"{name!r} is loaded. Unload it first, or say load_inplace: true", "lora_name", "already_loaded"
            )
        folder = self._inside(path)
        try:
            self.pool.register(name, folder, replace=replace)
        except GraftError as error:
            raise ApiError(400, self._without_paths(str(error)), code=error.code, param="lora_path") from None

    def unload(self, name: str) -> None:
        try:
            self.pool.unregister(name)
        except AdapterError as error:
            raise ApiError(404, str(error), code="model_not_found", param="lora_name") from None

    def _inside(self, path: str) -> Path:
        """The folder of this name in the folder of adapters. A name is no path: what leads elsewhere is refused."""
        assert self.folder is not None, "routes that load exist only with a folder"
        root = self.folder.resolve()
        known = sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
        found = root / path if path in known else None
        if found is None or found.resolve() != found:
            raise invalid(
                f"lora_path {path!r:.200} must be the name of a folder of adapters. {nearest(path, known)}", "lora_path"
            )
        return found

    def _without_paths(self, message: str) -> str:
        """A message without the folders above the folder of adapters."""
        assert self.folder is not None, "routes that load exist only with a folder"
        return message.replace(f"{self.folder.resolve()}/", "").replace(f"{self.folder}/", "")


def context_of(model: Any) -> int | None:
    """The most tokens of prompt and answer together, where the config of the model names it."""
    text = model.config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return found if isinstance(found, int) and found > 0 else None
