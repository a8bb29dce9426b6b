"""The loop of `rl`: prompts -> answers of the model as it is -> rewards -> what a step trains on.

It makes the rows of a step (`Callback.rows`), so everything after that is the same as for rows of files. What it must
remember when a run is stopped is in its `facts`, which checkpoints save. That is nothing as long as every step has
answers of its own: what is drawn follows from the seed, the steps done and the batch alone, so a resumed run draws it
again. With `steps_per_round` the model that answered is gone after a step, and the answers for later steps are saved.

What is trained are the very ids that were generated after the very ids of the prompt: no text is tokenized again. An
answer that ended is trained with the token that ended it, one that was cut without.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch

from graftlm import distributed
from graftlm.data.batches.pack import Example, Group, collate
from graftlm.data.batches.prompts import PromptExample
from graftlm.data.chat.render import Renderer
from graftlm.display.pages import NO_SIGNAL
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.generation.sampling import Sampling
from graftlm.hub.stopping import all_stop_ids
from graftlm.losses import LOSSES, LossConfig
from graftlm.model.modes import deltas_still
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.rl.config import RLConfig, score, training_group
from graftlm.rl.rewards import Completion, Scorer
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState

Prompts = Sequence[Example | Group]


class Sampler(Callback):
    """Makes the rows of a step of its prompts; made once a phase."""

    paper = "DeepSeekMath, Shao et al. 2024, arXiv:2402.03300, algorithm 1"
    cost = "the answers of a step: `samples` a prompt, each token of them a forward pass"

    def __init__(
        self, rl: RLConfig, loss: LossConfig, scorer: Scorer, renderer: Renderer, *, packed: bool, sharing: bool
    ) -> None:
        """`packed` and `sharing` say how old log-probabilities are computed: as `data.pack` and
        `train.prefix_sharing`."""
        super().__init__(CallbackConfig(name="rl"))
        self.rl, self.loss, self.scorer, self.renderer = rl, loss, scorer, renderer
        self.packed, self.sharing = packed, sharing
        self.engine: Engine | None = None

    def rows(
        self, training: TrainingState, number: int, rows_of: Callable[[int], Prompts], last: int
    ) -> list[Example | Group]:
        """What batch `number` trains on; metrics and events go to `training`. `rows_of` has the prompts of any batch,
        and the phase ends before `last`."""
        length = self.rl.steps_per_round
        rounds = {key: round_ for key, round_ in self.facts.items() if int(key) >= number}
        if str(number) not in rounds:
            until = min(last, number - (number - training.first) % length + length)
            rounds = self._round(training, {n: rows_of(n) for n in range(number, until)})
        self.facts = rounds if length > 1 else {}
        round_ = rounds[str(number)]
        training.metrics |= round_["metrics"]
        training.events += round_["events"]
        prompts = rows_of(number)
        return [_row(one, prompts[one["prompt"]]) for one in round_["rows"]]

    def _round(self, training: TrainingState, steps: Mapping[int, Prompts]) -> dict[str, Any]:
        """{batch: {rows, metrics, events}}, as JSON can say it."""
        started = time.perf_counter()
        where = [(number, place) for number, some in steps.items() for place in range(len(some))]
        prompts = [steps[number][place] for number, place in where]
        answers = self._answers(training, prompts, f"answers from batch {min(steps)}")
        ends = all_stop_ids(training.model, self.renderer.stop_ids)
        completions = [
            self._completion(prompt, ids, ends) for prompt, some in zip(prompts, answers, strict=True) for ids in some
        ]
        rewards = score(self.scorer, completions)
        took, samples = time.perf_counter() - started, self.rl.samples
        parts = [slice(i * samples, (i + 1) * samples) for i in range(len(prompts))]
        groups = [
            training_group(self.loss, [_example(prompt, ids) for ids in some], rewards[part])
            for prompt, some, part in zip(prompts, answers, parts, strict=True)
        ]
        if self.rl.steps_per_round > 1 and LOSSES[self.loss.name].rows == "rewards":
            groups = self._with_before(training, groups)
        found: dict[str, Any] = {}
        for number in steps:
            own = [i for i, (batch, _) in enumerate(where) if batch == number]
            of_step = [i for n in own for i in range(parts[n].start, parts[n].stop)]
            silent = [prompts[i].where for i in own if groups[i] is None]
            found[str(number)] = {
                "rows": [_fields(one, where[i][1]) for i in own if (one := groups[i]) is not None],
                "metrics": {
                    **_metrics([rewards[i] for i in of_step], [completions[i] for i in of_step]),
                    "no_signal": len(silent) / len(own),
                    "answer_tokens": fmean(len(ids) for i in own for ids in answers[i]),
                    "generate_s": round(took / len(steps), 4),
                },
                "events": [{"event": NO_SIGNAL, "prompts": silent}] if silent else [],
            }
        return found

    def _answers(self, training: TrainingState, prompts: Prompts, purpose: str) -> list[list[list[int]]]:
        """`samples` answers to each prompt, as ids, each with random numbers of its own. The ranks share the prompts;
        with a base in parts all ranks answer all of them together."""
        model, rl = training.model, self.rl
        if self.engine is None:
            self.engine = Engine(model, max_requests=rl.at_once, cache_tokens=None)
        ids = [prompt.answers[0].ids for prompt in prompts]
        stop_ids, seed = all_stop_ids(model, self.renderer.stop_ids), training.seed_for(purpose)
        together = distributed.is_sharded(model)
        rank, count = (0, 1) if together else (distributed.rank(), distributed.count())
        own = range(rank, len(ids), count)  # all answers to a prompt by one rank: it reads the prompt once
        numbers = [i * rl.samples + n for i in own for n in range(rl.samples)]
        requests = [
            Request(
                ids[number // rl.samples],
                rl.max_new_tokens,
                Sampling(rl.temperature, top_p=rl.top_p, seed=seed + number),
                stop_ids=stop_ids,
            )
            for number in numbers
        ]
        mine = [(numbers[at], generation.ids) for at, generation in self.engine.run(requests)]
        every = dict(mine if together else distributed.gathered(mine))
        return [[every[i * rl.samples + n] for n in range(rl.samples)] for i in range(len(prompts))]

    def _completion(self, prompt: Example | Group, ids: Sequence[int], ends: Sequence[int]) -> Completion:
        assert isinstance(prompt, PromptExample)
        cut = ids[-1] not in ends
        answer = self.renderer.decode(ids if cut else ids[:-1]).strip()
        return Completion(prompt.messages, answer, prompt.reference, cut, prompt.where)

    @torch.no_grad()
    def _with_before(self, training: TrainingState, groups: Sequence[Any]) -> list[Any]:
        """Groups whose answers know how likely they were when they were given; the ranks share the work."""
        model: Any = training.model
        together = distributed.is_sharded(model)
        mine: list[tuple[int, list[list[float]]]] = []
        with deltas_still(model), packed_attention(model) if self.packed else nullcontext():
            for i, group in enumerate(groups):
                if group is None or not (together or i % distributed.count() == distributed.rank()):
                    continue
                pack = collate([group], share=self.sharing).to(model.device)
                values = log_probs(model, pack).float().cpu()
                # Triples are in the order of their hidden rows, so those of an answer are in the order of its tokens.
                of_answer = [values[pack.answers.cpu() == n].tolist() for n in range(len(group.answers))]
                mine.append((i, of_answer))
        by_number = dict(mine if together else distributed.gathered(mine))
        return [None if group is None else _remember(group, by_number[i]) for i, group in enumerate(groups)]


def _example(prompt: Example | Group, ids: Sequence[int]) -> Example:
    prompt_ids = prompt.answers[0].ids
    weights = np.concatenate([np.zeros(len(prompt_ids), np.float32), np.ones(len(ids), np.float32)])
    return Example(np.concatenate([prompt_ids, np.array(ids, np.int32)]), weights, prompt.where)


def _remember(group: Group, log_probs: Sequence[Sequence[float]]) -> Group:
    answers = []
    for answer, values in zip(group.answers, log_probs, strict=True):
        before = np.zeros(len(answer), np.float32)
        before[answer.weights > 0] = values
        answers.append(replace(answer, old_log_probs=before))
    return replace(group, answers=tuple(answers))


def _metrics(rewards: Sequence[float | None], completions: Sequence[Completion]) -> dict[str, float]:
    """The mean reward and its spread, and which shares of the answers were cut, or could not be judged."""
    judged = [reward for reward in rewards if reward is not None]
    found = {"reward": fmean(judged), "reward_spread": pstdev(judged)} if judged else {}
    found["cut"] = fmean(one.cut for one in completions)
    if len(judged) < len(rewards):
        found["not_judged"] = 1 - len(judged) / len(rewards)
    return found


# Rows as JSON, for checkpoints -----------------------------------------------------------------------------------


def _fields(item: Example | Group, prompt: int) -> dict[str, Any]:
    """A row without its prompt, which is the number of one of the step's."""
    answers = []
    for answer in item.answers:
        trained = answer.weights > 0
        before = None if answer.old_log_probs is None else answer.old_log_probs[trained].tolist()
        answers.append([answer.ids[trained].tolist(), before])
    scores, pairs = (item.scores, item.pairs) if isinstance(item, Group) else (None, ())
    return {"prompt": prompt, "answers": answers, "scores": scores, "pairs": pairs}


def _row(fields: Mapping[str, Any], prompt: Example | Group) -> Example | Group:
    answers = tuple(_example(prompt, ids) for ids, _ in fields["answers"])
    if fields["scores"] is None:
        return answers[0]
    group = Group(answers, tuple(fields["scores"]), tuple((a, b) for a, b in fields["pairs"]))
    before = [values for _, values in fields["answers"] if values is not None]
    return _remember(group, before) if before else group
