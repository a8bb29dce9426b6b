"""What a server should answer: the base with adapters on it, here, under every hypothesis."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.chat import tokenizer_of
from graftlm.adapters.load import attach_adapter
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.errors import DataError, TargetError
from graftlm.hub.load import load_base
from graftlm.hub.tokenizer import plain_template
from graftlm.model.modes import by_row, check_weights, deltas_still, weighted_row
from graftlm.model.routes import Row
from graftlm.verification.client import Prompt
from graftlm.verification.decide import ADAPTER

BATCH = 4
"""Prompts in a pass: their logits over the whole vocabulary are held."""

OWN, TODAY, OF_BASE = "the adapter's", "the adapter's (of today)", "the base's"


@dataclass(frozen=True)
class Local:
    """A base with the adapter, and perhaps others, attached and off."""

    model: Any
    tokenizer: Any
    adapter: Adapter
    others: Mapping[str, str]
    """Name of another adapter -> name of its delta on the model."""
    renderers: Mapping[str, Renderer]
    """Name of a chat template -> what renders with it; the first is the right one. Empty where there is none."""
    messages: Sequence[str]
    """What was checked of each adapter."""
    _ids_of: dict[str, int | None] = field(default_factory=dict)
    _rendered: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    @property
    def expected(self) -> tuple[str, ...]:
        """The templates that are right; "" is a prompt that was rendered here."""
        return ("", *[name for number, name in enumerate(self.renderers) if number == 0 or name == TODAY])

    def row(self, weights: str, scale: float = 1.0) -> Row:
        """The deltas of a hypothesis's weights."""
        names = {ADAPTER: ADAPTER} | dict(self.others)
        return weighted_row(self.model, {names[weights]: scale} if weights in names and scale else {})

    @property
    def can_scale(self) -> bool:
        """Whether a part of the adapter's change has a meaning: a prefix or prompt is there or not."""
        try:
            check_weights(self.model, self.row(ADAPTER, 0.5))
        except TargetError:
            return False
        return True

    # What is fed -----------------------------------------------------------------------------------------------------

    def ids(self, question: str, template: str) -> list[int]:
        """The prompt as a template renders it; with "" as the right one does, or as it is where there is none."""
        if not self.renderers:
            return list(map(int, self.tokenizer(question)["input_ids"]))
        key = template or next(iter(self.renderers)), question
        if key not in self._rendered:
            self._rendered[key] = list(map(int, self.renderers[key[0]].prompt([Message("user", question)])))
        return self._rendered[key]

    def prompt(self, question: str) -> Prompt:
        ids = self.ids(question, "")
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        begin = self.tokenizer.bos_token or ""
        texts = (text, text.removeprefix(begin))  # many tokenizers put the first token before a text by themselves
        fitting = (each for each in texts if list(self.tokenizer(each)["input_ids"]) == ids)
        return Prompt(question, ids, next(fitting, None))

    def answer_ids(self, text: str) -> list[int]:
        """The tokens of an answer as far as they are known: without the last, which may have been cut."""
        text = text.partition("\ufffd")[0]
        ids = list(map(int, self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return ids[:-1] if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text else []

    def token_id(self, token: int | str) -> int | None:
        """The id of a token that a server names by id or by text; None for a text that several tokens have."""
        if isinstance(token, int):
            return token if token < len(self.tokenizer) else None
        if not self._ids_of:
            for id_ in range(len(self.tokenizer)):
                piece = str(self.tokenizer.convert_ids_to_tokens(id_)).replace("\u2581", " ")
                text = self.tokenizer.decode([id_], clean_up_tokenization_spaces=False)
                for each in {piece, text}:
                    self._ids_of[each] = None if each in self._ids_of else id_
        return self._ids_of.get(token)

    # What comes of it ------------------------------------------------------------------------------------------------

    def next_log_probs(self, prompts: Sequence[Sequence[int]], row: Row) -> Iterator[Tensor]:
        """Of each prompt the log-probabilities of what follows, float32 [vocabulary], in nats."""
        for logits in self.logits_after(prompts, [[] for _ in prompts], row):
            yield logits[0].log_softmax(-1)

    @torch.no_grad()
    def logits_after(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], row: Row
    ) -> Iterator[Tensor]:
        """Of each prompt the logits for every token of its answer and the one after it, float32 [answer + 1, V].

        Rows of a batch end with filling, which no token before it sees.
        """
        fed = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        for start in range(0, len(fed), BATCH):
            some = fed[start : start + BATCH]
            longest = max(map(len, some))
            ids = torch.tensor([[*one, *[one[-1]] * (longest - len(one))] for one in some])
            with by_row(self.model, [row]), deltas_still(self.model):  # not over a yield: others run between
                logits = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
            for number, one in enumerate(some):
                first = len(prompts[start + number]) - 1
                yield logits[number, first : len(one)].float().cpu()


def load(
    folder: Path,
    others: Sequence[Path],
    *,
    base: str | None,
    dtype: str | None,
    quantization: str | None,
    network: bool,
) -> Local:
    """The base that the adapter names, unless `base` does, with the adapters on it.

    Raises what `load_base` and `attach_adapter` raise.
    """
    adapter = Adapter.read(folder)
    more = {each.resolve().name: Adapter.read(each) for each in others}
    if len(more) < len(others):
        more = {str(each): Adapter.read(each) for each in others}
    named = (adapter.base or {}).get("name") or adapter.peft_config.get("base_model_name_or_path")
    model, tokenizer = load_base(base or named or "smollm2", dtype=dtype, quantization=quantization, network=network)
    of_base = plain_template(tokenizer)
    names = {f"the adapter {name}": f"other{number}" for number, name in enumerate(more)}
    messages = [attach_adapter(model, adapter, name=ADAPTER)]
    for name, other in zip(names.values(), more.values(), strict=True):
        messages.append(attach_adapter(model, other, name=name))
    tokenizer = tokenizer_of(model, tokenizer)
    renderers = _renderers(tokenizer, adapter, of_base, more)
    return Local(model, tokenizer, adapter, names, renderers, messages)


def _renderers(tokenizer: Any, adapter: Adapter, of_base: str, others: Mapping[str, Adapter]) -> dict[str, Renderer]:
    """By template, those that render a question otherwise than those before."""
    today, chat = datetime.date.today(), adapter.chat
    wanted = [(OWN, chat.template, chat.today), (TODAY, chat.template, today), (OF_BASE, of_base, today)]
    wanted += [(f"{name}'s", other.chat.template, other.chat.today) for name, other in others.items()]
    found: dict[str, Renderer] = {}
    seen, made = set[tuple[int, ...]](), set[tuple[str, datetime.date | None]]()
    for name, template, day in wanted:
        if not template:
            continue
        renderer = Renderer(tokenizer, template, today=day or today)
        key = template, renderer.today if renderer.writes_the_date else None
        if key in made:
            continue  # before it starts a process
        made.add(key)
        try:
            ids = tuple(renderer.prompt([Message("user", "Where is it?")]).tolist())
        except DataError:
            if name == OWN:
                raise
            continue  # no server can render a question with it
        if ids not in seen:
            seen.add(ids)
            found[name] = renderer
    return found
