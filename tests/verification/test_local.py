"""What is computed here: each prompt in a batch as alone, and every token under its one name."""

import datetime
import json
from pathlib import Path

import pytest
import torch

from graftlm.adapters.folder import RECORD
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.load import load_base
from graftlm.model.attach import attach
from graftlm.testing.deltas import move
from graftlm.testing.tiny import CHATML, tiny_tokenizer
from graftlm.verification.decide import ADAPTER, BASE
from graftlm.verification.local import OWN, TODAY, Local, load
from graftlm.verification.prompts import PROMPTS
from graftlm.verification.verify import verify
from tests.adapters.folders import write_record
from tests.verification.conftest import AdapterMaker
from tests.verification.verify_server import Served, running

DATED = "{{ strftime_now('%Y-%m-%d') }}\n" + CHATML


def local_of(folder: Path, base: Path) -> Local:
    return load(folder, [], base=str(base), dtype="float32", quantization=None, network=False)


@pytest.mark.parametrize("method", ["lora", "prefix", "houlsby"])
def test_a_prompt_in_a_batch_is_as_it_is_alone(method: str, adapter_of: AdapterMaker, spread_base: Path) -> None:
    folder = adapter_of(method)
    local, alone = local_of(folder, spread_base), load_base(str(spread_base), dtype="float32").model
    load_adapter(alone, folder)
    prompts = [local.ids(question, "") for question in ("a", "Who are you?", "Goodbye to all of it.", "x y", "b")]
    for prompt, found in zip(prompts, local.next_log_probs(prompts, local.row(ADAPTER)), strict=True):
        with torch.no_grad():
            wanted = alone(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_two_hypotheses_may_be_computed_at_once(adapter_of: AdapterMaker, spread_base: Path) -> None:
    local = local_of(adapter_of("lora"), spread_base)
    prompts = [local.ids(f"question {number}", "") for number in range(9)]
    rows = [local.row(BASE), local.row(ADAPTER), local.row(ADAPTER, 0.5)]
    wanted = [list(local.next_log_probs(prompts, row)) for row in rows]
    together = zip(*(local.next_log_probs(prompts, row) for row in rows), strict=True)
    for number, found in enumerate(together):
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other[number])
        assert not torch.equal(found[0], found[1])


def test_a_text_that_several_tokens_have_names_none(adapter_of: AdapterMaker, spread_base: Path) -> None:
    local = local_of(adapter_of("lora"), spread_base)
    tokens = local.tokenizer
    assert local.token_id(7) == 7
    assert local.token_id(10**6) is None
    assert local.token_id("\ufffd") is None, "half a character: many tokens"
    assert local.token_id("no token") is None
    (letter,) = tokens("q", add_special_tokens=False)["input_ids"]
    assert local.token_id("q") == letter
    assert local.answer_ids("the answer")[:1] == tokens("the", add_special_tokens=False)["input_ids"][:1]


def test_a_server_that_writes_todays_date_applies_the_adapter_and_the_report_says_so(
    spread_base: Path, tmp_path: Path
) -> None:
    model = load_base(str(spread_base), dtype="float32").model
    move(attach(model, LoraConfig(r=4)))
    folder = save_adapter(model, tmp_path / "dated", tokenizer=tiny_tokenizer(DATED))
    record = json.loads((folder / RECORD).read_text())
    write_record(folder, record | {"today": "2020-02-02"})
    local = local_of(folder, spread_base)
    assert list(local.renderers)[:2] == [OWN, TODAY]
    assert local.ids("hello", OWN) != local.ids("hello", TODAY)
    now = DATED.replace("{{ strftime_now('%Y-%m-%d') }}", datetime.date.today().isoformat())
    with running(Served(spread_base, {"dated": folder}, template=now, routes=("chat/completions",))) as url:
        found = verify(url, folder, base=str(spread_base), dtype="float32")
    assert found.verdict == "applied"
    assert "today's date" in found.notes[-1]


@pytest.mark.slow
@pytest.mark.smollm2
def test_faults_are_named_with_a_real_base(smollm2: str, tmp_path: Path) -> None:
    from graftlm.hub.config import base_config
    from graftlm.hub.locate import locate

    model, tokenizer = load_base(smollm2, dtype="float32")
    move(attach(model, LoraConfig(r=16, alpha=4, rslora=True)), scale=0.1)
    folder = save_adapter(model, tmp_path / "parcels", tokenizer=tokenizer)
    served = Served(Path(locate(base_config(smollm2))), {"parcels": folder}, dtype="bfloat16", routes=("completions",))
    faults = {"applied": ("parcels", 1.0), "base": ("", 1.0), "wrong scale": ("parcels", 0.25)}
    with running(served) as url:
        for verdict, applied in faults.items():
            served.applied = {"parcels": applied}
            found = verify(url, folder, base=smollm2, dtype="float32", prompts=PROMPTS[::5])
            assert found.verdict == verdict, found
            if verdict == "wrong scale":
                assert found.factor == pytest.approx(0.25, rel=0.1)
                assert "rsLoRA is ignored" in found.why
