"""How fast rows become ids and masks, against TRL's SFTTrainer; a second start from the cache; a stream's memory.

Both sides take the same rows from the same file, as messages, and train the answers alone. A run is a process. What is
timed begins with rows in memory (a list of ours, a datasets.Dataset of theirs) and ends with examples to train on; the
import of libraries and the loading of a tokenizer are out on both sides, the start of worker processes is in. TRL has
its template patched as it patches those that it knows: `{% generation %}` around answers, without which it cannot tell
turns apart. Both must give the same number of tokens, and of trained tokens within the ends of turns.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import peak_rss_gib, write_result  # noqa: E402

TRAINED = (  # ChatML as SmolLM2 has it, with the mark that TRL needs around what is trained
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ SYSTEM }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_rows(count: int, file: Path) -> None:
    """Conversations of one to three turns; the number in each makes it unlike the others."""
    from graftlm.data.sources.docstrings import rows

    known = rows()
    with open(file, "w", encoding="utf-8") as out:
        for number in range(count):
            messages = []
            for turn in range(1 + number % 3):
                row = known[(number * 7 + turn * 13) % len(known)]
                messages.append({"role": "user", "content": f"{number}: {row['prompt']}"})
                messages.append({"role": "assistant", "content": row["completion"]})
            out.write(json.dumps({"messages": messages}) + "\n")


def _cpu_s() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(config: dict[str, Any], file: Path, cache: Path | None) -> dict[str, Any]:
    from graftlm.data.chat.render import Renderer
    from graftlm.data.quality.preflight import prepare
    from graftlm.data.sources.row_cache import read_cached
    from graftlm.data.sources.source import DataConfig
    from graftlm.hub.tokenizer import load_tokenizer

    data = DataConfig(train=str(file), max_tokens=config["max_tokens"], over_length="truncate")
    renderer = Renderer(load_tokenizer(config["base"]))
    began = time.perf_counter()
    rows = read_cached(data, seed=0, folder=cache).train
    read_s = time.perf_counter() - began
    began, cpu_s = time.perf_counter(), _cpu_s()
    examples, report = prepare(rows, renderer, data, workers=config["processes"], cache=cache)
    wall_s, cpu_s = time.perf_counter() - began, _cpu_s() - cpu_s
    return {
        "wall_s": wall_s, "cpu_s": cpu_s, "read_s": read_s, "rows": len(examples), "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens, "from_cache": report.from_cache,
    }  # fmt: skip


def theirs(config: dict[str, Any], file: Path) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from graftlm.hub.tokenizer import load_tokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(config["base"])
    alone = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    system = alone.partition("<|im_start|>user")[0]
    template = TRAINED.replace("SYSTEM", repr(system))
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    plain = tokenizer.apply_chat_template(probe, tokenize=False)
    assert tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False) == plain, (template, plain)
    tokenizer.chat_template = template
    rows = datasets.Dataset.from_list([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))  # only the data is of interest
    seconds = processor = 0.0
    prepare = SFTTrainer._prepare_dataset

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal seconds, processor
        began, cpu_s = time.perf_counter(), _cpu_s()
        done = prepare(*arguments, **named)
        seconds += time.perf_counter() - began
        processor += _cpu_s() - cpu_s
        return done

    SFTTrainer._prepare_dataset = timed
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, assistant_only_loss=True, report_to="none", save_strategy="no",
            max_length=config["max_tokens"], dataset_num_proc=config["processes"], disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        made = trainer.train_dataset
        labels = made["labels"]
        return {
            "wall_s": seconds, "cpu_s": processor, "rows": len(made), "tokens": sum(map(len, made["input_ids"])),
            "supervised_tokens": sum(label != -100 for row in labels for label in row), "torch": torch.__version__,
        }  # fmt: skip


def streamed(config: dict[str, Any]) -> dict[str, Any]:
    """Short rows without end: the memory of this process and of its children, now and then."""
    from graftlm.data.chat.render import Renderer
    from graftlm.data.quality.preflight import stream
    from graftlm.data.sources.formats import Message
    from graftlm.data.sources.source import DataConfig, Row
    from graftlm.hub.tokenizer import load_tokenizer

    def rows() -> Iterator[Row]:
        for i in range(config["streamed_rows"]):
            yield Row([Message("user", f"What is {i}?"), Message("assistant", f"It is {i}.")], f"rows:{i}", str(i))

    renderer = Renderer(load_tokenizer(config["base"]))
    before, began = peak_rss_gib(), time.perf_counter()
    count, marks = 0, []
    for count, _ in enumerate(stream(rows(), renderer, DataConfig(train="rows"), workers=config["processes"]), start=1):
        if count % 20_000 == 0:
            marks.append({"rows": count, "rss_mib": _rss_mib(os.getpid()), "children_mib": _children_mib()})
            if time.perf_counter() - began > config["stream_seconds"]:
                break
    wall_s = time.perf_counter() - began
    above = 2**10 * (peak_rss_gib() - before)
    most_children = max(mark["children_mib"] for mark in marks)
    return {
        "rows": count, "rows_per_s": count / wall_s, "peak_above_start_mib": above, "peak_children_mib": most_children,
        "marks": marks[:: max(1, len(marks) // 10)],
    }  # fmt: skip


def _rss_mib(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # it has ended
        return 0.0


def _children_mib() -> float:
    """Of all processes below this one."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(_rss_mib(process) for process in family - {os.getpid()})


def run(what: str, *arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, __file__, "--what", what, "--out", str(out), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=environment)
        found: dict[str, Any] = json.loads(out.read_text())
    print(what, {key: value for key, value in found.items() if key != "marks"}, flush=True)
    return found


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("ours", "theirs", "stream"))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what:
        if args.what == "stream":
            result = streamed(config)
        else:
            result = ours(config, args.rows, args.cache) if args.what == "ours" else theirs(config, args.rows)
        args.out.write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        file, many = Path(folder, "rows.jsonl"), Path(folder, "many.jsonl")
        write_rows(config["rows"], file)
        write_rows(config["cached_rows"], many)
        sides: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for _ in range(config["rounds"]):
            for side, found in sides.items():
                found.append(run(side, "--rows", str(file)))
        same = {name: (sides["ours"][0][name], sides["theirs"][0][name]) for name in ("rows", "tokens")}
        assert all(a == b for a, b in same.values()), same
        medians = {side: statistics.median(each["wall_s"] for each in found) for side, found in sides.items()}
        cache = ("--rows", str(many), "--cache", str(Path(folder, "cache")))
        starts = [run("ours", *cache) for _ in range(3)]
        assert [start["from_cache"] for start in starts] == [False, True, True]
    write_result(
        __file__,
        {
            "config": config,
            "median_wall_s": medians,
            "rows_per_s": {side: config["rows"] / wall_s for side, wall_s in medians.items()},
            "times_faster": medians["theirs"] / medians["ours"],
            "first_start_s": starts[0]["read_s"] + starts[0]["wall_s"],
            "second_start_s": [start["read_s"] + start["wall_s"] for start in starts[1:]],
            "reading_s": [start["read_s"] for start in starts],
            "stream": run("stream"),
            "runs": sides,
        },
    )


if __name__ == "__main__":
    main()
