"""Write what is a fact of the code or of a benchmark: cli.md, recipe.md, methods.md, equations.md,
optimizers.md, callbacks.md, architectures.md, recipe.schema.json, and the figures in benchmarks.md and README.md.

`python docs/generate.py` writes them; with `--check` it fails where one is stale, and says which.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from graftlm.callbacks import CALLBACKS
from graftlm.cli import app
from graftlm.config.schema import json_schema
from graftlm.deltas import METHODS
from graftlm.deltas.inits import INITS
from graftlm.losses import LOSSES
from graftlm.optim import OPTIMIZERS
from graftlm.planning.advice import facts, measured
from graftlm.recipe import Recipe
from graftlm.selection import SELECTORS
from graftlm.training.callback import CallbackRow

HERE = Path(__file__).parent
ROOT = HERE.parent
MADE = "<!-- made by docs/generate.py: do not edit -->\n\n"


def cli() -> str:
    """Every command's help text."""
    command = typer.main.get_command(app)
    errors = (
        "A command prints results to standard output and everything else to standard error. An error that you can\n"
        "correct is one message, `error[CODE]: MESSAGE`, with exit code 1; [errors](errors.md) lists codes and fixes.\n"
    )
    return MADE + f"# Command line\n\n{errors}\n" + "\n".join(_help(command, "graft", None))


def _help(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=name.split()[-1], parent=parent, terminal_width=100)
    yield f"## {name}\n\n```text\n{context.get_help()}\n```\n"
    for child, inner in getattr(command, "commands", {}).items():
        yield from _help(inner, f"{name} {child}", context)


COMMON = {
    "the recipe": ("base", "data", "delta", "train", "loss", "optimizer", "callbacks", "report"),
    "BaseConfig": ("name", "dtype", "quantization", "template"),
    "DataConfig": ("train", "held_out", "mask", "max_tokens", "over_length", "pack"),
    "SourceConfig": ("path", "format", "weight", "cap"),
    "TrainConfig": (
        "steps",
        "epochs",
        "batch_rows",
        "learning_rate",
        "schedule",
        "warmup",
        "pack_tokens",
        "threads",
        "checkpointing",
        "kernels",
        "save_every",
        "seed",
    ),
    "ReportConfig": ("answers", "max_new_tokens", "trackers"),
}
"""Config -> the keys that come first in its table: those that most recipes set."""
FIRST_METHODS = ("lora", "dora", "full", "prefix")


def recipe() -> str:
    """Every key of a recipe, by section: its values, its default and what it means."""
    schema = json.loads(json_schema(Recipe))
    sections = dict(schema["$defs"])
    lines = [MADE + "# Recipe\n", "Every key, its values and its default, by section; common keys come first.\n"]
    lines += ["Unknown keys are errors. Editors complete and check recipes with `docs/recipe.schema.json`.\n"]
    methods = [*FIRST_METHODS, *(name for name in METHODS if name not in FIRST_METHODS)]
    groups = {
        "base": ["BaseConfig"],
        "data": ["DataConfig", "SourceConfig"],
        "delta": [METHODS[name].config.__name__ for name in methods],
        "train": ["TrainConfig"],
        "loss": [row.config.__name__ for row in LOSSES.values()],
        "regularisers": [],
        "optimizer": [row.config.__name__ for row in OPTIMIZERS.values()],
        "callbacks": [row.config.__name__ for row in CALLBACKS.values()],
        "select": [row.config.__name__ for row in SELECTORS.values()],
        "rl": [],
        "report": ["ReportConfig"],
    }
    for key, names in groups.items():  # and what these refer to, unless another section has it
        taken = {name for other, found in groups.items() if other != key for name in found}
        names += [name for name in _reached(schema["properties"][key], sections) if name not in {*names, *taken}]
    first = next(iter(groups.values()))
    first += [name for name in sections if not any(name in names for names in groups.values())]
    titles = {name: _title(key, name, sections[name]) for key, names in groups.items() for name in names}
    lines.append("## The recipe\n\n" + _table(schema, COMMON["the recipe"], titles))
    done: set[str] = set()
    for key, names in groups.items():
        lines.append(f"## {key}\n")
        if meaning := " ".join(schema["properties"][key].get("description", "").split()):
            lines.append(meaning + "\n")
        for name in dict.fromkeys(names):
            if name in sections and name not in done:
                done.add(name)
                python = "" if titles[name] == name else f"In Python: `{name}`.\n\n"
                lines.append(f"### {titles[name]}\n\n{python}{_table(sections[name], COMMON.get(name, ()), titles)}")
    return "\n".join(lines)


def _reached(field: Any, sections: dict[str, Any], found: dict[str, None] | None = None) -> list[str]:
    """The names of the configs to which a field leads, in order."""
    found = {} if found is None else found
    for name in re.findall(r'"#/\$defs/(\w+)"', json.dumps(field)):
        if name not in found:
            found[name] = None
            _reached(sections[name], sections, found)
    return list(found)


def _title(key: str, name: str, section: dict[str, Any]) -> str:
    """`delta: lora` for what is chosen by a name, else the name of the config."""
    names = [field["const"] for field in section["properties"].values() if "const" in field]
    return f"{'scorer' if key == 'rl' else key}: {names[0]}" if names else name


def _table(section: dict[str, Any], common: tuple[str, ...], titles: dict[str, str]) -> str:
    properties = section["properties"]
    lines = ["| key | values | default | |\n|---|---|---|---|"]
    for key in sorted(properties, key=lambda key: common.index(key) if key in common else len(common)):
        field = properties[key]
        needed = key in section.get("required", ())
        default = "needed" if needed else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        meaning = " ".join(field.get("description", "").split())
        lines.append(f"| `{key}` | {_values(field, titles)} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _values(field: dict[str, Any], titles: dict[str, str]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{titles[name]}](#{titles[name].lower().replace(': ', '-')})"
    if "anyOf" in field:
        return " or ".join(_values(option, titles) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array" and "items" in field:
        return f"list of {_values(field['items'], titles)}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return " ".join([field.get("type", "mapping"), ", ".join(limits)]).strip()


def methods() -> str:
    """The table of methods and of inits, with what was measured of them."""
    rows, base = facts(), measured()["base"]
    with_figures = [row for row in rows if row["held_out_loss"] is not None]
    intro = f"""{MADE}# Methods

{len(rows)} methods and {len(INITS)} inits; any pair that has a meaning may be combined, and any several deltas may sit
on one model. `graft methods` prints this table, `graft methods --for "small data, little memory"` a choice from it.

## What each is

*Merges*: it is a change of weights. *Is LoRA*: it has exact low-rank factors, so `graft export --to plain-lora` makes a
LoRA of it that every server reads. *In PEFT*: the type under which PEFT reads and writes the same.
"""
    lines = [
        intro,
        "| name | family | paper | trainable parameters a site | sites | merges | is LoRA | in PEFT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"`{row['parameters']}`" + (f", shared `{row['parameters_shared']}`" * (row["parameters_shared"] != "0"))
        merges = "yes" if row["mergeable"] else f"no: {row['why_not_mergeable']}"
        cells = (row["family"], row["paper"], size, ", ".join(row["sites"]), merges, _yes(row["factors"]))
        lines.append(f"| `{row['name']}` | " + " | ".join(cells) + f" | {row['peft_type'] or '-'} |")
    lines += ["", "## Inits\n", "| name | paper | sets | needs | fresh delta |", "|---|---|---|---|---|"]
    for name, init in INITS.items():
        start = "the base" if init.starts_at_base else "moves the model"
        cells = (init.paper, ", ".join(init.tensors) or "nothing", ", ".join(init.needs) or "-", start)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", *_measured_methods(with_figures, base)]
    return "\n".join(lines) + "\n"


def equations() -> str:
    """What each method and each init computes: the text at the top of its file, and a recipe."""
    lines = [
        f"""{MADE}# Equations

The equation of each method, its shapes, and where it departs from its paper: the text at the top of its file in
`graftlm/deltas/`. W [d_out, d_in] is a frozen weight of the base, x the input of its layer, h the output with the
delta. [The table of methods](methods.md) says what each can do; [the recipe](recipe.md#delta) has its keys.

![learnt against forgotten, on one job](methods.svg)
"""
    ]
    lines.append("## Methods\n")
    for name, method in METHODS.items():
        lines.append(f"### {name}\n\n{_prose(method.delta.__module__)}\n")
    lines.append("## Inits\n")
    for name, init in INITS.items():
        if name != "zero":
            lines.append(f"### Init {name}\n\n{_prose(init.make.__module__)}\n")
    return "\n".join(lines)


def _prose(module: str) -> str:
    """The text at the top of a module; its indented lines are equations, and stay as they are."""
    lines = (import_module(module).__doc__ or "").strip().splitlines()
    return "\n".join(line if line.startswith("    ") else line.replace("<", "&lt;") for line in lines)


def _measured_methods(rows: list[dict[str, Any]], base: dict[str, float]) -> list[str]:
    if not rows:
        return []
    config = json.loads(_result("methods").read_text())["config"]
    train, rows_of, steps = config["train"], config["row_tokens"], config["train"]["steps"]
    nearly, rows_of_step = config["sweep"]["nearly"], train["batch_rows"]
    intro = f"""## What each did on one job

[benchmarks/methods](../benchmarks/methods/result.json): SmolLM2-135M, docstrings of up to {rows_of} tokens, {steps}
steps of {rows_of_step} rows, one thread. The learning rate is the smallest of a small sweep that gains nearly as much
({nearly:.0%}) as the best; figures are means over the seeds counted in the last column. *Forgotten* is the rise of the
loss on general text.
The base: held-out loss {base["held_out_loss"]:.3f}, ROUGE-L {base["rouge_l"]:.3f}, loss on general text
{base["general_loss"]:.3f}, in nats a token. One short job on one small model orders methods on that job. Ranks were not
swept: each method has its default.

![learnt against forgotten](methods.svg)
"""
    heads = ("name", "rate", "parameters", "held-out loss", "of LoRA's gain", "ROUGE-L", "forgotten", "step / LoRA's")
    lines = [intro, "| " + " | ".join((*heads, "GiB over LoRA's peak", "seeds")) + " |", "|---" * 10 + "|"]
    for row in sorted(rows, key=lambda row: row["held_out_loss"]):
        cells = [
            f"{row['rate_measured']:.2g}",
            f"{row['parameters_trained']:,}",
            f"{row['held_out_loss']:.3f}",
            f"{row['share_of_lora']:.0%}",
            "-" if row["rouge_l"] is None else f"{row['rouge_l']:.3f}",
            f"{row['forgotten']:+.3f}",
            "-" if row["step_ratio"] is None else f"{row['step_ratio']:.2f}",
            "-" if row["peak_over_lora_gib"] is None else f"{row['peak_over_lora_gib']:+.2f}",
            str(row["seeds"]),
        ]
        lines.append(f"| `{row['name']}` | " + " | ".join(cells) + " |")
    low = [row for row in rows if row["share_of_lora"] < 0.5]
    if low:
        lines += ["", "Below half of LoRA's gain in these steps, at the rate that was best for it:", ""]
        for row in low:
            lines.append(
                f"- `{row['name']}`: {row['share_of_lora']:.0%}. {config['notes'].get(row['name'], '')}".rstrip()
            )
    return lines


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def optimizers() -> str:
    """The table of optimizers."""
    intro = f"""{MADE}# Optimizers

{len(OPTIMIZERS)} optimizers. A recipe names one, with its options or without; `adamw` is the default:

```yaml
base: smollm2
data: {{train: rows.jsonl}}
optimizer: {{name: galore, rank: 8}}
```

An optimizer that has no meaning for what is trained is refused with the reason, before the first step.
The file of each begins with its equation and says where it departs from the paper: `graftlm/optim/`.
[Optimizers and callbacks](how-to/callbacks.md) says which one to choose.
"""
    return intro + _callback_table(OPTIMIZERS)


def callbacks() -> str:
    """The table of callbacks."""
    intro = f"""{MADE}# Callbacks

{len(CALLBACKS)} callbacks. They act between the steps of a run, or on the numbers of a step, whatever the method and
the loss. A recipe names any number of them, in the order in which they act, with their options or without:

```yaml
base: smollm2
data: {{train: rows.jsonl}}
callbacks: [ema, {{name: lora-plus, ratio: 8.0}}]
```

A callback that has no meaning for what is trained is refused with the reason, before the first step.
The file of each begins with its equation and says where it departs from the paper: `graftlm/callbacks/`.
[Optimizers and callbacks](how-to/callbacks.md) says which one to choose.
"""
    return intro + _callback_table(CALLBACKS)


def _callback_table(rows: dict[str, CallbackRow]) -> str:
    """What each does in a line, what it costs, and its options."""
    lines = ["\n| name | what it does | paper | cost | options |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        described = (import_module(row.callback.__module__).__doc__ or "").splitlines()[0]
        what = described.partition(": ")[2].partition(" (")[0].partition(". ")[0].rstrip(".")
        section = json.loads(json_schema(row.config))["properties"]
        options = [f"`{key}: {json.dumps(f.get('default'))}`" for key, f in section.items() if key != "name"]
        cells = (what, row.callback.paper, row.callback.cost, ", ".join(options) or "-")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """README.md with six figures of docs/benchmarks.md, and how many there are of what, between their marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in _figures()}
    counts = (
        f"{len(METHODS)} methods ([table](docs/methods.md)), {len(INITS)} inits, {len(LOSSES)} objectives, "
        f"{len(OPTIMIZERS)} optimizers ([table](docs/optimizers.md)), {len(CALLBACKS)} callbacks "
        f"([table](docs/callbacks.md)) and {len(SELECTORS)} ways to choose rows."
    )
    note = (
        "Speed is that of SmolLM2-135M on this machine: [all figures, and how they were measured](docs/benchmarks.md)."
    )
    table = [
        "| measured | figure | source, machine |",
        "|---|---|---|",
        *(rows[name] for name in README_FIGURES),
        "",
        note,
    ]
    return _between("figures", "\n".join(table), _between("counts", counts, text))


def benchmarks() -> str:
    """docs/benchmarks.md with the figures of benchmarks/*/result.json between its marks."""
    text = (HERE / "benchmarks.md").read_text(encoding="utf-8")
    table = ["| measured | figure | source, machine |", "|---|---|---|", *_figures(), "", _how_speed_was_measured()]
    return _between("figures", "\n".join(table).replace("](benchmarks/", "](../benchmarks/"), text)


def _figures() -> list[str]:
    """One line of a table for each figure; links are those of README.md."""
    found = [make(json.loads(file.read_text())) for name, make in FIGURES.items() if (file := _result(name)).is_file()]
    return "\n".join(found).splitlines()


README_FIGURES = (
    "demo: held-out ROUGE-L F1, base -> tuned (the first run, 100 functions)",
    "demo: time after the installation",
    "demo: peak memory of the process",
    "training, one thread, against TRL + PEFT tuned, prefix sharing off",
    "NF4 with double quantization",
    "kill -9 at random and at every write, full and read-only disks",
)
"""The rows of the table of figures that README shows."""


def _how_speed_was_measured() -> str:
    config = json.loads(_result("train_speed").read_text())["config"]
    steps, rounds = config["steps"], config["rounds"]
    return f"""Names of the settings:

- *TRL + PEFT tuned*: the fastest configuration that we found: eager attention, one row at a time, no autocast, no
  packing, with torch.compile ([grid](benchmarks/train_speed/grid.json)).
- *as documented*: the defaults of TRL and PEFT. It ran once.
- *patched*: *tuned*, with TRL's code patched and the allocator tuned. It ran once.
- *prefix sharing*: rows that begin alike share the computation of the common prefix.

Speeds are of SmolLM2-135M over {steps} steps in {rounds} alternating rounds on one machine. Other processors give other
ratios. The same machine also varies from day to day. The first three steps, in which both sides warm up and the peer
compiles for minutes, do not count. Without torch.compile the peer is slower ([log](log.md))."""


def package() -> str:
    """README for a package index, where links into the repository lead nowhere: their text alone, and no picture."""
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", readme())
    text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    text = re.sub(r"<!--.*?-->\n", "", text)
    title, rest = text.split("\n", 1)
    return f"""{MADE}{title}

*This page is README.md of the source distribution, which also has the documentation (docs/), the benchmarks and the
tests. Commands that begin with `make` are for a checkout; `graft init quickstart` writes the recipe of the demo.*
{rest}"""


def _between(mark: str, made: str, text: str) -> str:
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{made}\n{end}{after}"


def _result(name: str) -> Path:
    return ROOT / "benchmarks" / name / "result.json"


def _quickstart(result: dict[str, Any]) -> str:
    runs, where = result["runs"], _where("quickstart", result)
    rouge, loss = ([run["held_out"][key] for run in runs] for key in ("rouge_l", "loss_nats"))
    walls, memory = [r["command_wall_s"] for r in runs], [r["train"]["peak_rss_gib"] for r in runs]
    figures = {
        "demo: held-out ROUGE-L F1, base -> tuned (the first run, 100 functions)": _both(rouge[0]),
        "demo: held-out loss, nats per supervised token": _both(loss[0]),
        "demo: time after the installation": f"{walls[0]:.0f} s, {min(walls[1:]):.0f} s once the base is cached",
        "demo: peak memory of the process": f"{max(memory):.2f} GiB",
    }
    return _rows(figures, where)


def _both(figures: dict[str, float]) -> str:
    return f"{figures['base']:.3f} -> {figures['tuned']:.3f}"


def _train_speed(result: dict[str, Any]) -> str:
    where, rows = _where("train_speed", result), {}
    for threads, found in result["threads"].items():
        on = "one thread" if threads == "1" else f"{threads} threads"
        best = found["table"][found["best_peer"]]["tokens_per_s"]
        for name, label in (("ours", "prefix sharing off"), ("ours, shared beginnings", "prefix sharing on")):
            ratios, speed = found["ratios"][name], found["table"][name]["tokens_per_s"]
            figure = f"{ratios['to the best peer']:.2f} times ({speed:.0f} against {best:.0f} tokens/s)"
            rows[f"training, {on}, against TRL + PEFT tuned, {label}"] = figure
        ratios = found["ratios"]["ours, shared beginnings"]
        for name, label in (
            ("to as documented", "TRL + PEFT as documented"),
            ("to tuned beyond configuration", "TRL + PEFT patched"),
        ):
            if name in ratios:
                rows[f"training, {on}, against {label}, prefix sharing on"] = f"{ratios[name]:.2f} times"
        if (exact := found["table"].get("peer's code in float32")) is not None:
            apart = {name: _apart(shape["losses"], exact["losses"]) for name, shape in found["table"].items()}
            ours = max(share for name, share in apart.items() if name.startswith("ours"))
            steps = result["config"]["steps"]
            rows[f"largest difference of the losses of {steps} steps, bf16 against float32"] = (
                f"{ours:.2%}, the worst of our settings (TRL + PEFT: {apart[found['best_peer']]:.2%} tuned, "
                f"{apart['as documented']:.2%} as documented)"
            )
        small = found["ratios"].get("ours, small packs")
        if small:
            ours = found["table"]["ours, small packs"]
            figure = f"{small['peak memory']:.2f} of its {found['table'][found['best_peer']]['peak_rss_gib']:.2f} GiB"
            rows[f"peak memory against TRL + PEFT tuned, packs of 256 tokens, {on}"] = (
                f"{figure}, at {ours['tokens_per_s']:.0f} tokens/s"
            )
    return _rows(rows, where)


def _apart(losses: list[float], exact: list[float]) -> float:
    return max(abs(loss / wanted - 1) for loss, wanted in zip(losses, exact, strict=True))


def _rows(rows: dict[str, str], where: str) -> str:
    return "\n".join(f"| {name} | {figure} | {where} |" for name, figure in rows.items())


def _prefix_sharing(result: dict[str, Any]) -> str:
    rows = {
        f"{name}: prefix sharing on against off": (
            f"{job['times_as_fast']:.2f} times as fast, " if job["times_as_fast"] else ""
        )
        + f"{job['fewer_tokens']:.1f} times fewer tokens computed"
        for name, job in result["jobs"].items()
    }
    return _rows(rows, _where("prefix_sharing", result))


def _nf4(result: dict[str, Any]) -> str:
    nats, codec = result["nats"], result["codecs"]["nf4"]
    rows = {
        "NF4 with double quantization": f"{codec['bits_a_weight']:.2f} bits a weight; a step takes "
        f"{result['steps']['cpu_ratio_to_bf16']['nf4']:.2f} of a bf16 step",
        "loss of the base on Python's documentation, nats a token": f"bf16 {nats['bf16']:.3f}, NF4 "
        f"{nats['nf4, fp32 products']:.3f}, NF4 by bitsandbytes "
        f"{nats['nf4 of bitsandbytes, fp32 products']:.3f}",
    }
    return _rows(rows, _where("nf4", result))


def _lengths(result: dict[str, Any]) -> str:
    memory = result["memory"]
    rows = {
        "memory of 8,192 tokens against the line through 256 to 4,096": f"{memory['longest_over_the_line']:.2f}",
        "a step at r = 64 against r = 1": f"{result['r64_over_r1']:.2f}",
    }
    return _rows(rows, _where("lengths", result))


def _estimate(result: dict[str, Any]) -> str:
    worst = result["worst"]
    figure = f"peak memory within {worst['peak_gib']:.0%}, step time within {worst['step_s']:.0%}"
    return _rows({f"`graft estimate` on {len(result['recipes'])} recipes": figure}, _where("estimate", result))


def _startup(result: dict[str, Any]) -> str:
    figure = result["seconds"]["graft --help"]["median_s"]
    return f"| `graft --help` | {figure:.2f} s | {_where('startup', result)} |"


def _damaged_rows(result: dict[str, Any]) -> str:
    runs, clean = list(result["damaged"].values()), result["clean"].values()
    found, planted = (sum(run[key] for run in runs) for key in ("reported_with_the_right_line_and_reason", "damaged"))
    alarms, rows = sum(one["alarms"] for one in clean), sum(one["rows"] for one in clean)
    kinds = sum(map(len, result["kinds"].values()))
    figure = f"{found:,} of {planted:,}, each file in at most {max(run['cpu_s'] for run in runs):.1f} s"
    rows_of = {
        f"damaged lines of {kinds} kinds in files of {result['config']['rows']:,} that are reported by line": figure,
        "false alarms on clean rows of every format": f"{alarms} in {rows:,}",
    }
    return _rows(rows_of, _where("damaged_rows", result))


def _masks(result: dict[str, Any]) -> str:
    held, count = sum(one["holds"] for one in result["templates"].values()), len(result["templates"])
    what = f"templates whose masks hold on {result['config']['conversations']:,} random conversations each"
    return _rows({what: f"{held} of {count}"}, _where("masks", result))


def _rendering(result: dict[str, Any]) -> str:
    config = result["config"]
    cached = f"a second start with {config['cached_rows']:,} rows"
    rows_of = {
        "rows to ids and masks, against TRL's preparation": f"{result['times_faster']:.1f} times as fast",
        cached: f"{max(result['second_start_s']):.1f} s, reading the file included",
    }
    return _rows(rows_of, _where("rendering", result))


def _streaming(result: dict[str, Any]) -> str:
    what = f"memory of a stream of {result['rows']:,} rows, all processes"
    return _rows({what: f"{result['most_above_start_mib']:.0f} MiB above the start"}, _where("streaming", result))


def _task_library(result: dict[str, Any]) -> str:
    exact = [row["exact"] for row in result["table"].values()]
    base, tuned, rows = (sum(row[side] for row in exact) for side in ("base", "tuned", "rows"))
    what = f"{len(exact)} small tasks, an adapter of {result['config']['train']['steps']} steps for each"
    return _rows(
        {f"{what}: held-out rows answered exactly": f"{base} -> {tuned} of {rows}"}, _where("task_library", result)
    )


def _merge_memory(result: dict[str, Any]) -> str:
    what = f"memory of merging {result['config']['adapters']} adapters, above what is resident before"
    figure = f"{result['most_share']:.2f} of one float32 model, the pages of the base that are read for it included"
    return _rows({what: figure}, _where("merge_memory", result))


def _core_space(result: dict[str, Any]) -> str:
    config = result["config"]
    what = f"TIES of {config['adapters']} adapters of rank {config['r']} in core space"
    figures = {
        f"{what}: processor time": f"1/{result['time_ratio']:.1f} of that on whole matrices",
        f"{what}: memory above base and adapters": f"{result['core_above_share']:.2f} of the adapters' bytes",
    }
    return _rows(figures, _where("core_space", result))


def _selection(result: dict[str, Any]) -> str:
    found = result["demo"]
    means, best = found["held_out_loss_mean"], found["best"]
    seeds = len(found["held_out_loss"][best])
    rows_of = {
        "LESS: rows of a task found among others, at 5 % of the pool": ", ".join(
            f"{recall:.0%}" for recall in result["planted"]["recall_at_5_percent"]
        ),
        f"10 % selected by {best} against 10 % drawn at random: held-out loss, mean of {seeds} seeds": (
            f"{means[best]:.2f} against {means['drawn']:.2f}, better in {found['wins']}"
        ),
    }
    return _rows(rows_of, _where("selection", result))


def _preference(result: dict[str, Any]) -> str:
    rows = {
        f"a DPO step, {threads} thread{'s' * (threads != '1')}, against TRL + PEFT tuned": (
            f"{found['ratios']['step, to the best peer']:.2f} times as fast"
        )
        for threads, found in result["threads"].items()
    }
    return _rows(rows, _where("preference", result))


def _dpo_task(result: dict[str, Any]) -> str:
    before, after = (
        [seed["held_out"][which]["accuracy"] for seed in result["seeds"].values()] for which in ("base", "tuned")
    )
    figure = f"{min(before):.2f} -> {min(after):.2f} to {max(after):.2f} over {len(after)} seeds"
    return _rows({"DPO: share of held-out pairs in the right order": figure}, _where("dpo_task", result))


def _crash(result: dict[str, Any]) -> str:
    parts = [part for kind in result["config"]["runs"] for part in result[kind].values()]
    lives = sum(part.get("kills", 0) + part.get("operations", 0) + part.get("points", 0) for part in parts)
    wrong = sum(part["failed"] + part["other_bytes"] for part in parts)
    figure = f"{lives:,} kills, {wrong} that did not end in the bytes of an uninterrupted run"
    return _rows({"kill -9 at random and at every write, full and read-only disks": figure}, _where("crash", result))


def _generation(result: dict[str, Any]) -> str:
    config, rows = result["config"], {}
    asked, samples = config["prompts"], config["samples"]
    for dtype, found in result["found"].items():
        batch = f"{asked['count']} prompts of {asked['shortest']} to {asked['longest']} tokens, {dtype}"
        rows[f"{batch}, against `model.generate` in one batch"] = _faster(found["prompts"])
        one = f"{samples['count']} samples of a prompt of {samples['prompt']} tokens, {dtype}"
        rows[f"{one}, against `num_return_sequences`"] = _faster(found["samples"])
    return _rows(rows, _where("generation", result))


def _faster(found: dict[str, Any]) -> str:
    speed = found["tokens"] / statistics.median(found["seconds"]["engine"])
    return f"{found['ratio']:.2f} times as fast ({speed:.0f} new tokens/s, prompts included)"


def _rl_speed(result: dict[str, Any]) -> str:
    figure = f"{result['ratio']:.2f} times as fast"
    return _rows({"online RL: a step, against answers by `model.generate`": figure}, _where("rl_speed", result))


def _many_adapters(result: dict[str, Any]) -> str:
    found, rank = result["found"], result["config"]["rank"]
    rows = {
        f"answers of {count}, each of a request of its own (r {rank}, bfloat16), one thread, float32": (
            f"{each['over_base']['bfloat16']:.2f} of the base's tokens/s"
        )
        for count, each in found.items()
        if count.endswith(" adapters")
    }
    peft = f"{found['peft']['engine_over_peft']:.1f} times as fast"
    return _rows(rows | {"8 adapters, against PEFT's mixed batch": peft}, _where("many_adapters", result))


def _prepacked(result: dict[str, Any]) -> str:
    rows = {
        f"all products of a step of SmolLM2-135M with {count} row{'s' * (count != 1)}, {dtype}, one thread": (
            f"{found[str(count)]['panels']:.0f} ms in our panels, {found[str(count)]['oneDNN']:.0f} in oneDNN's layout"
        )
        for dtype, found in result["milliseconds"].items()
        for count in (1, 8)
    }
    return _rows(rows, _where("prepacked", result))


def _plain_lora(result: dict[str, Any]) -> str:
    figures = {
        f"`{method}` as a plain LoRA of rank {rank}: share of ||dW|| lost": f"{share:.0%}"
        for method, found in result["share_lost"].items()
        for rank, share in found.items()
    }
    return _rows(figures, _where("plain_lora", result))


def _adapter_pool(result: dict[str, Any]) -> str:
    found, config = result["found"], result["config"]
    cold, registered = found["cold"][str(config["registered"])], f"{config['registered']:,} registered adapters"
    rows = {
        f"{registered} (r {config['rank']}) by Zipf's law from {config['slots']} slots": (
            f"{found['slots over all resident']:.2f} of the speed with all of them on the model"
        ),
        f"requests for the base beside {registered}": f"{found['base only']['ratio']:.2f} of the plain base's speed",
        f"an adapter of {cold['file_mb']:.0f} MB onto the model": f"{cold['median_ms']:.0f} ms, its file cached",
        f"{len(config['methods'])} methods without factors together": (
            f"{found['methods without factors']['ratio']:.2f} of the base's speed"
        ),
    }
    return _rows(rows, _where("adapter_pool", result))


def _serve_peers(result: dict[str, Any]) -> str:
    adapters = result["config"]["adapters"]
    rows = {
        f"{adapters} adapters over HTTP, one core, {dtype}, against {peer}": f"{ratio:.1f} times as fast"
        for dtype, found in result["found"].items()
        for peer, ratio in found["ours_over_peer"].items()
    }
    return _rows(rows, _where("serve_peers", result))


def _constrained(result: dict[str, Any]) -> str:
    found = result["found"]
    rows = {
        "answers by a JSON schema": f"{found['valid']} of {found['answers']} valid",
        "their time a token, against free answers": f"{found['speed_at_16']['ratio']:.2f} times, 16 at a time",
    }
    return _rows(rows, _where("constrained", result))


def _where(name: str, result: dict[str, Any]) -> str:
    return f"[{name}](benchmarks/{name}/result.json), {machine(result['machine'])}"


def machine(found: dict[str, Any]) -> str:
    """A machine in a few words: processor, cores, and its bf16 instructions where the name tells no model."""
    name, cores = found["processor"], found["cores"]
    if not any(character.isdigit() for character in name):  # a virtual machine's "AMD EPYC"
        name += f" ({', '.join(found['bf16_products']) or 'no bf16 products'})"
    return f"{name}, {cores} core{'s' * (cores != 1)}"


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quickstart": _quickstart,
    "train_speed": _train_speed,
    "prefix_sharing": _prefix_sharing,
    "nf4": _nf4,
    "lengths": _lengths,
    "estimate": _estimate,
    "startup": _startup,
    "damaged_rows": _damaged_rows,
    "masks": _masks,
    "rendering": _rendering,
    "streaming": _streaming,
    "selection": _selection,
    "preference": _preference,
    "dpo_task": _dpo_task,
    "crash": _crash,
    "merge_memory": _merge_memory,
    "task_library": _task_library,
    "core_space": _core_space,
    "prepacked": _prepacked,
    "plain_lora": _plain_lora,
    "many_adapters": _many_adapters,
    "adapter_pool": _adapter_pool,
    "serve_peers": _serve_peers,
    "constrained": _constrained,
    "generation": _generation,
    "rl_speed": _rl_speed,
}


def architectures() -> str:
    """The matrix of architectures, as benchmarks/architectures measured it."""
    result = json.loads(_result("architectures").read_text(encoding="utf-8"))
    columns, cells = list(result["verdicts"]), result["cells"]
    text = f"""{MADE}# Architectures

{len(cells)} classes of causal language models of transformers {result["machine"]["transformers"]}, each as a tiny
random model, against everything that a LoRA on all of its linear layers goes through. *refused*: with a reason
([all of them](../benchmarks/architectures/result.json)); -: transformers or PEFT themselves do not do it. What cannot
be packed trains with `data: {{pack: false}}`.

| | {" | ".join(columns)} |
|---|{"---|" * len(columns)}
"""
    for name, row in cells.items():
        text += f"| {name} | {' | '.join(_cell(row[column]) for column in columns)} |\n"
    text += "\nThere is no tiny model of these yet:\n\n"
    for reason in dict.fromkeys(result["not_built"].values()):
        names = [name for name, why in result["not_built"].items() if why == reason]
        text += f"- {', '.join(names)}: {reason}.\n"
    return text


def _cell(cell: dict[str, str]) -> str:
    if cell["verdict"] == "ok":
        return cell["says"] or "ok"
    return "-" if cell["verdict"] == "no" else cell["verdict"]


PAGES: dict[str, Callable[[], str]] = {
    "architectures.md": architectures,
    "benchmarks.md": benchmarks,
    "../README.md": readme,
    "package.md": package,
    "cli.md": cli,
    "recipe.md": recipe,
    "methods.md": methods,
    "equations.md": equations,
    "optimizers.md": optimizers,
    "callbacks.md": callbacks,
    "recipe.schema.json": lambda: json_schema(Recipe),
}


def main() -> None:
    stale = []
    for name, make in PAGES.items():
        text = make()
        file = HERE / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(stale)}. Run `make docs` and commit what it writes")
    print(f"{'stale' if stale else 'fresh'}: {', '.join(stale or PAGES)}")


if __name__ == "__main__":
    main()
