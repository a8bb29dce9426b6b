"""How many held-out rows of several tasks a router answers exactly, beside the oracle, the base and a uniform mixture.

    python benchmarks/routing/run.py                                        whole, then result.json
    python benchmarks/routing/run.py --tasks a,b --rows 4 --routers arrow   a look, without a result

Adapters are those of benchmarks/task_library, in $GRAFT_CACHE/task-adapters; gates of phatgoose are kept beside them.
Routers learn from rows that the adapters were trained on. Rows of all tasks, and those of the unknown task, are in one
batch of the engine. `own`: of the weight of a row, how much its own task's adapter has; for routers of tokens the mean
over layers and tokens of the prompt, on the first rows of each task. Nothing is timed: other work may run beside it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.config.schema import build  # noqa: E402
from graftlm.data.chat.render import Renderer  # noqa: E402
from graftlm.data.sources.load import load_rows  # noqa: E402
from graftlm.data.sources.source import Row  # noqa: E402
from graftlm.evaluation.statistics.intervals import Interval, difference_interval, mean_interval  # noqa: E402
from graftlm.evaluation.tasks import score  # noqa: E402
from graftlm.files import cache_folder  # noqa: E402
from graftlm.generation.adapter_pool import AdapterPool, Lease  # noqa: E402
from graftlm.generation.engine import Engine  # noqa: E402
from graftlm.generation.requests import Request  # noqa: E402
from graftlm.hub.stopping import all_stop_ids  # noqa: E402
from graftlm.routing.routers import ADAPTER_ROUTERS  # noqa: E402
from graftlm.routing.routers.phatgoose import PhatgooseConfig  # noqa: E402
from graftlm.routing.routing import Routing  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
ADAPTERS = cache_folder() / "task-adapters"
WATCHED = 4
"""Rows of each task on which weights of tokens are looked at."""


class Rows(NamedTuple):
    trained: list[Row]
    held_out: list[Row]


class Asked(NamedTuple):
    task: str
    row: Row
    ids: list[int]


def rows_of(task: str, count: int) -> Rows:
    """The rows that the adapter of a task was trained on, and `count` others that take their templates in turn."""
    folder = ADAPTERS / task
    if not (folder / "held_out.jsonl").is_file():
        sys.exit(f"{folder}: no adapter. Train it: python benchmarks/task_library/run.py {task}")
    out = [json.loads(line)["where"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    rows = {row.where: row for row in load_rows(f"builtin:tasks/{task}")[0]}
    by_group: dict[str, list[Row]] = {}
    for where in out:
        by_group.setdefault(rows[where].group, []).append(rows[where])
    turns = [each[turn] for turn in range(len(out)) for each in by_group.values() if turn < len(each)]
    return Rows([row for where, row in rows.items() if where not in set(out)], turns[:count])


def answers(engine: Engine, renderer: Renderer, asked: Sequence[Asked], leases: Sequence[Lease]) -> list[float]:
    """1 for each row that is answered exactly, else 0."""
    stop_ids, found = all_stop_ids(engine.model, renderer.stop_ids), [0.0] * len(asked)
    requests = [
        Request(one.ids, CONFIG["max_new_tokens"], stop_ids=stop_ids, adapters=lease.adapters)
        for one, lease in zip(asked, leases, strict=True)
    ]
    for number, generation in engine.run(requests):
        found[number] = score(asked[number].row, renderer.decode(generation.answer_ids))
    return found


def own_weight(routing: Routing, asked: Sequence[Asked], weights: Sequence[Mapping[str, float] | None]) -> float:
    """The mean share of the weight that is that of the row's own task."""
    found, seen = list[float](), dict[str, int]()
    for one, chosen in zip(asked, weights, strict=True):
        if one.task not in routing.library.names:
            continue
        if chosen is not None:
            found.append(chosen.get(one.task, 0.0))
        elif (count := seen.get(one.task, 0)) < WATCHED and routing.mixture is not None:
            seen[one.task] = count + 1
            layers = routing.mixture.watch(one.ids).values()
            found.append(sum(float(g[:, names.index(one.task)].mean()) for names, g in layers) / len(layers))
    return sum(found) / len(found)


def summary(
    known: Callable[[Asked], bool], asked: Sequence[Asked], scores: Sequence[float], oracle: Sequence[float]
) -> Any:
    """The mean score of some rows and its difference to the oracle, with 95 % intervals over templates."""
    at = [n for n, one in enumerate(asked) if known(one)]
    groups = [asked[n].row.group for n in at]
    mean = mean_interval([scores[n] for n in at], groups)
    gap = difference_interval([scores[n] for n in at], [oracle[n] for n in at], groups)
    return {"score": rounded(mean), "minus_oracle": rounded(gap), "rows": len(at)}


def rounded(interval: Interval) -> list[float]:
    return [round(each, 3) for each in interval[:3]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", help="tasks with an adapter, in place of those of config.yaml")
    parser.add_argument("--rows", type=int, help="held-out rows of each task")
    parser.add_argument("--routers", help="those of config.yaml that are run")
    given = parser.parse_args()
    tasks = given.tasks.split(",") if given.tasks else CONFIG["tasks"]
    names = given.routers.split(",") if given.routers else list(CONFIG["routers"])
    rows = {task: rows_of(task, given.rows or CONFIG["rows"]) for task in [*tasks, CONFIG["unknown"]]}

    model, tokenizer = load_base(CONFIG["base"])
    pool = AdapterPool(model, slots=len(tasks) + 1)
    for task in [*tasks, CONFIG["unknown"]]:
        pool.register(task, ADAPTERS / task)
    chat = pool.get(tasks[0]).chat.settings
    renderer = Renderer(tokenizer, chat.template if chat else None, today=chat.today if chat else None)
    asked = [
        Asked(task, row, renderer.prompt(row.messages[:-1]).tolist()) for task in rows for row in rows[task].held_out
    ]
    engine, scores, own = Engine(model), dict[str, list[float]](), dict[str, float]()

    def run(side: str, choose: Callable[[Asked], Lease]) -> None:
        with ExitStack() as stack:
            leases = [stack.enter_context(choose(one)) for one in asked]
            scores[side] = answers(engine, renderer, asked, leases)
        print(side, f"{sum(scores[side]) / len(asked):.3f}", f"own {own[side]:.2f}" if side in own else "", flush=True)

    run("oracle", lambda one: pool.acquire(one.task))
    pool.unregister(CONFIG["unknown"])
    run("base", lambda one: pool.acquire({}))
    run("uniform", lambda one: pool.acquire(dict.fromkeys(tasks, 1 / len(tasks))))
    for name in names:
        tree = CONFIG["routers"][name]
        config = build(ADAPTER_ROUTERS[tree["name"]].config, tree, source=name)
        if isinstance(config, PhatgooseConfig):
            config = replace(config, gates=str(ADAPTERS / "gates.safetensors"))
        print(f"{name} learns ...", flush=True)
        routing = Routing(pool, tokenizer, config, rows={task: rows[task].trained for task in tasks})
        chosen = [routing.route(one.ids) for one in asked]
        own[name] = own_weight(routing, asked, [one.weights for one in chosen])
        leases = iter([one.lease for one in chosen])
        run(name, lambda _, leases=leases: next(leases))
        routing.close()

    table = {
        side: {
            "known": summary(lambda one: one.task in tasks, asked, found, scores["oracle"]),
            "unknown": summary(lambda one: one.task not in tasks, asked, found, scores["oracle"]),
            **({"own": round(own[side], 3)} if side in own else {}),
        }
        for side, found in scores.items()
    }
    for side, found in table.items():
        print(side, json.dumps(found))
    if not any((given.tasks, given.rows, given.routers)):
        write_result(__file__, {"config": CONFIG, "table": table})


if __name__ == "__main__":
    main()
