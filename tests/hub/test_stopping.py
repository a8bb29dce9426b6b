"""A model stops where it was taught to, here and wherever its files are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from graftlm.adapters.export.export import EXPORTS, export
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.deltas import METHODS
from graftlm.generation.answer import answer
from graftlm.generation.generate import generate
from graftlm.hub.stopping import all_stop_ids, base_stop_ids, missing_end
from graftlm.model.attach import attach
from graftlm.testing import tiny_model, tiny_tokenizer
from graftlm.testing.deltas import move

pytestmark = pytest.mark.versions

END_OF_TEXT, END_OF_TURN = 0, 2


def a_base(eos: int | list[int] | None = END_OF_TEXT, template: str | None = None) -> tuple[Any, Any]:
    """As Qwen2.5's and SmolLM2's bases: settings that end at <|endoftext|>, turns that end with <|im_end|>."""
    model, tokenizer = tiny_model(eos_token_id=END_OF_TEXT), tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = template or tokenizer.chat_template
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=END_OF_TEXT)
    return model, tokenizer


@pytest.mark.parametrize(("eos", "wanted"), [(0, (0,)), ([7, 0], (7, 0)), (None, (END_OF_TEXT,))])
def test_the_bases_own_ends_are_those_of_its_settings_or_of_its_config(eos: Any, wanted: tuple[int, ...]) -> None:
    model, _ = a_base(eos)
    assert base_stop_ids(model) == wanted
    assert all_stop_ids(model, (2, 7)) == tuple(dict.fromkeys((2, 7, *wanted)))


def test_answers_stop_at_every_end_of_the_base() -> None:
    """The likeliest tokens are made ends of the base, one after the other: the answer gets shorter each time."""
    model = tiny_model(initializer_range=0.6, tie_word_embeddings=False)
    tokenizer, question = tiny_tokenizer(), "the user asks"
    prompt = Renderer(tokenizer).prompt([Message("user", question)])
    ((_, free),) = generate(model, [prompt], stop_ids=[], max_new_tokens=12)
    firsts = [n for n, token in enumerate(free) if token not in free[:n] and n > 0]
    assert len(firsts) > 2
    for place in reversed(firsts):
        model.generation_config = GenerationConfig(eos_token_id=[299, free[place]])
        wanted = Renderer(tokenizer).decode(free[:place])
        assert answer(model, tokenizer, question, max_new_tokens=12) == wanted
        pieces: list[str] = []
        assert answer(model, tokenizer, question, max_new_tokens=12, on_text=pieces.append) == wanted
        assert "".join(pieces) == wanted


@pytest.mark.parametrize(("eos", "wanted"), [(0, [2, 0]), ([0, 7], [2, 0, 7]), ([7, 2], [2, 0, 7])])
def test_a_merged_folder_stops_where_answers_were_taught_to_end(eos: Any, wanted: Any, tmp_path: Path) -> None:
    model, tokenizer = a_base(eos)
    move(attach(model, METHODS["lora"].config(r=4)))
    before = model.generation_config.to_dict()
    stop_ids = Renderer(tokenizer).stop_ids
    made = export(model, tmp_path / "out", to="merged", tokenizer=tokenizer, stop_ids=stop_ids)
    assert "missing_end" not in made
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == wanted
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == END_OF_TURN
    assert model.generation_config.to_dict() == before
    assert tokenizer.eos_token_id == END_OF_TEXT, "what was given is not changed"

    class Ends(torch.nn.Module):
        """Writes id 5 twice and then the end of a turn, for ever."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            scores = torch.zeros(*x.shape[:-1], 300)
            scores[..., 5 if self.calls < 3 else END_OF_TURN] = 1
            return scores

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    merged.set_output_embeddings(Ends())
    generated = merged.generate(torch.tensor([[9, 9]]), max_new_tokens=20, do_sample=False)
    assert generated[0].tolist() == [9, 9, 5, 5, END_OF_TURN]


@pytest.mark.parametrize("to", [each for each in EXPORTS if each != "merged"])
@pytest.mark.parametrize(("eos", "lacks"), [(0, True), ([0, 2], False)])
def test_an_export_names_the_end_that_its_base_lacks(to: str, eos: Any, lacks: bool, tmp_path: Path) -> None:
    model, tokenizer = a_base(eos)
    move(attach(model, METHODS["lora"].config(r=4)))
    made = export(model, tmp_path / "out", to=to, tokenizer=tokenizer, stop_ids=Renderer(tokenizer).stop_ids)
    found = made.get("missing_end")
    assert (found is not None) == lacks
    if found:
        assert (found["id"], found["token"]) == (END_OF_TURN, "<|im_end|>")
        assert "answers end with <|im_end|> (id 2)" in found["why"]


def test_a_template_that_writes_the_eos_token_itself_keeps_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = a_base(template="{{ eos_token }}" + tiny_tokenizer().chat_template)
    messages = [Message("user", "a")]
    wanted = Renderer(tokenizer).prompt(messages).tolist()
    attach(model, METHODS["lora"].config(r=4))
    export(model, tmp_path / "out", to="merged", tokenizer=tokenizer, stop_ids=Renderer(tokenizer).stop_ids)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert Renderer(again).prompt(messages).tolist() == wanted
    assert END_OF_TURN in json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]


def test_nothing_is_missing_where_nothing_ends_an_answer() -> None:
    model, tokenizer = a_base()
    assert missing_end(model, tokenizer, ()) is None
