"""An adapter that is several deltas."""

from pathlib import Path

import pytest
import torch

from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.model.attach import detach
from graftlm.model.modes import activate, by_row, deltas_off
from graftlm.model.registry import attachment, hosts, parameters_of
from graftlm.testing.deltas import close, ids, logits
from tests.adapters.foreign.folders import lora, tied, untied, with_biases_untied
from tests.errors import raises
from tests.peers import peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_deltas_of_an_adapter_are_switched_together(tmp_path: Path) -> None:
    config = lora(trainable_token_indices=[5, 6], modules_to_save=["lm_head"], bias="lora_only")
    theirs = peft_adapter(config, with_biases_untied(), tmp_path / "a")
    ours, base = with_biases_untied(), with_biases_untied()
    note = load_adapter(ours, tmp_path / "a", name="sql")
    assert "4 deltas here, switched together: sql-modules, sql-tokens, sql, sql-biases" in note
    tuned = logits(ours)
    close(tuned, logits(theirs), "all of it")
    activate(ours)
    assert torch.equal(logits(ours), logits(base))
    activate(ours, "sql")
    assert torch.equal(logits(ours), tuned)
    with by_row(ours, [("sql",), ()]):
        close(logits(ours)[0], tuned[0], "its row")
        close(logits(ours)[1], logits(base)[1], "a row of the base")
    with deltas_off(ours):
        assert torch.equal(logits(ours), logits(base))
    names = ("sql", "sql-modules", "sql-tokens", "sql-biases")
    assert len(parameters_of(ours, "sql")) == sum(len(parameters_of(ours, name)) for name in names[1:]) + 8
    with raises("adapter/several-deltas", match="'sql' is 4 deltas"):
        save_adapter(ours, tmp_path / "b", name="sql")
    detach(ours, "sql-tokens")
    assert attachment(ours).members["sql"] == ("sql-modules", "sql", "sql-biases")
    detach(ours, "sql")
    assert (hosts(ours), attachment(ours).members) == ({}, {})
    assert torch.equal(logits(ours), logits(base))


def test_each_delta_of_it_is_saved_by_its_name_and_loads_again(tmp_path: Path) -> None:
    peft_adapter(lora(modules_to_save=["lm_head"]), untied(), tmp_path / "a")
    ours, again = untied(), untied()
    load_adapter(ours, tmp_path / "a")
    assert attachment(ours).members == {"default": ("default-modules", "default")}
    save_adapter(ours, tmp_path / "modules", name="default-modules")
    load_adapter(again, tmp_path / "modules", name="head")
    activate(ours, "default-modules")
    assert torch.equal(logits(again), logits(ours))


def test_a_second_adapter_under_a_name_that_is_taken_is_refused_whole(tmp_path: Path) -> None:
    peft_adapter(lora(modules_to_save=["lm_head"]), untied(), tmp_path / "a")
    ours = untied()
    load_adapter(ours, tmp_path / "a")
    before = logits(ours)
    with raises("adapter/does-not-fit-model", match="'default-modules'"):
        load_adapter(ours, tmp_path / "a")
    assert torch.equal(logits(ours), before)
    load_adapter(ours, tmp_path / "a", name="other")
    activate(ours, "other")
    close(logits(ours), before, "the same under another name")
    with raises("target/no-such-delta", match="'othr'"):
        activate(ours, "othr")


def test_rows_of_a_batch_with_and_without_an_adapter_of_several_deltas(tmp_path: Path) -> None:
    peft_adapter(lora(modules_to_save=["embed_tokens"]), tied(), tmp_path / "a")
    ours = tied()
    load_adapter(ours, tmp_path / "a")
    tuned, rows = logits(ours), ids()
    with by_row(ours, [(), ("default",)]), torch.no_grad():
        mixed = ours(input_ids=rows).logits
    close(mixed[1], tuned[1], "the row with it")
    with deltas_off(ours):
        close(mixed[0], logits(ours)[0], "the row without it")


def test_a_name_that_torch_has_a_method_of_is_refused_in_words(folder: Path) -> None:
    model = tied()
    with raises("adapter/does-not-fit-model", match="'half'"):
        load_adapter(model, folder, name="half")
    assert hosts(model) == {}
