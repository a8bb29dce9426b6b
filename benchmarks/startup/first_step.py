"""From an empty process to the end of the first optimizer step, stage by stage, as JSON on the last line."""

import json
import time

from graftlm.system import tune_process

tune_process()  # as the command line does
stages: dict[str, float] = {}
started = time.perf_counter()


def done(stage: str) -> None:
    stages[stage] = round(time.perf_counter() - started - sum(stages.values()), 3)


from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: E402, F401

done("imports of torch and transformers")

# what transformers imports when it first loads a model is among its imports, so that "graftlm" is ours alone
from graftlm import DataConfig, LoraConfig, Recipe, attach, load_base  # noqa: E402
from graftlm.data.batches.pack import lay_out  # noqa: E402
from graftlm.model.registry import trainable  # noqa: E402
from graftlm.optim.adamw import adamw  # noqa: E402
from graftlm.passes.autotune import fastest_backend  # noqa: E402
from graftlm.passes.packing_check import check_packing  # noqa: E402
from graftlm.prepare import prepare_data  # noqa: E402
from graftlm.training.loop import TrainStep  # noqa: E402
from graftlm.training.passes import Passes  # noqa: E402
from graftlm.training.state import TrainingState  # noqa: E402

done("imports of graftlm")
model, tokenizer = load_base("smollm2")
done("loading base and tokenizer")
rows = prepare_data(Recipe(data=DataConfig(train="builtin:docstrings")), tokenizer).examples
done("rows as an earlier run left them")
check_packing(model, rows, packed=True, sharing=True)
done("proving the forward pass and packing")
attach(model, LoraConfig(), seed=0)
done("attaching the delta")
optimizer = adamw([(trainable(model).values(), 1e-3)], weight_decay=0.0)
packs = [lay_out(rows[:8], 1024, packed=True, share=True)]
backend = fastest_backend(model, packs[0])
done("choosing kernels, as an earlier run measured them")
training, passes = TrainingState(model, {}, optimizer), Passes(backend=backend)
TrainStep(training, "supervised", lambda step: 1.0, clip=1.0, passes=passes).step(packs[0])
done("the first step")
print(json.dumps(stages))
