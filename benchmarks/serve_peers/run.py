"""`graft serve` against vLLM and llama-server over HTTP: each on the same core, in alternating rounds.

python benchmarks/serve_peers/run.py --vllm VENV/bin/vllm \\
    --llama-server BIN --llama-convert "PYTHON convert_hf_to_gguf.py"      all claims, then result.json
python benchmarks/serve_peers/run.py --vllm VENV/bin/vllm --rounds 1       a look, without a result

A peer that is not named is `not installed` in the result. llama.cpp's converter writes the base in GGUF. A server that
is not asked is stopped (SIGSTOP), so that it takes no time of the one that is. The client is on the other cores.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm import LoraConfig, attach, export, load_base, save_adapter  # noqa: E402
from graftlm.model.registry import trainable  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
NAMES = [f"adapter-{number}" for number in range(CONFIG["adapters"])]


@dataclass
class Server:
    """A running server, stopped while no other process may lose time to it."""

    process: subprocess.Popen[bytes]
    port: int
    body_of: Callable[[str], dict[str, Any]]
    """What a request has to say, beside prompt and length, for the adapter of this name."""

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        self.go_on()
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def answer(self, name: str, ids: list[int]) -> str:
        """The text of all new tokens; an answer of fewer ends the benchmark."""
        wanted = {"prompt": ids, "max_tokens": CONFIG["new_tokens"], "temperature": 0} | self.body_of(name)
        answer = self.post("/v1/completions", wanted)
        made = answer["usage"]["completion_tokens"]
        assert made == CONFIG["new_tokens"], f"{name} on port {self.port}: {made} tokens"
        text: str = answer["choices"][0]["text"]
        return text


# The files that the servers read ----------------------------------------------------------------------------------


def write_files(folder: Path, convert: Sequence[str]) -> list[int]:
    """The base as a model of transformers in each dtype and in GGUF, adapters for each server. Returns the ids that end
    a turn."""
    for dtype in CONFIG["dtypes"]:
        model, tokenizer = load_base(CONFIG["base"], dtype=dtype)
        for part in (model, tokenizer):
            part.save_pretrained(folder / dtype)
        if convert:
            kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
            made = [folder / dtype, "--outtype", kind, "--outfile", folder / f"{dtype}.gguf"]
            subprocess.run([*convert, *map(str, made)], check=True, capture_output=True)
    for number, name in enumerate(NAMES):
        model, tokenizer = load_base(CONFIG["base"], dtype="float32")
        attach(model, LoraConfig(r=CONFIG["rank"], alpha=CONFIG["rank"]), seed=number)
        random = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for B in (each for key, each in trainable(model).items() if key.endswith(".B")):
                B.copy_(0.02 * torch.randn(B.shape, generator=random))  # of a trained size
        save_adapter(model, folder / "adapters" / name)
        export(model, folder / "gguf" / name, to="gguf")
    ends = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])})


# The servers ------------------------------------------------------------------------------------------------------


def start(command: Sequence[str | Path], port: int, body_of: Callable[[str], dict[str, Any]], log: Path) -> Server:
    """Start a server on the core and wait until it is ready."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(CONFIG["core"]), "VLLM_NO_USAGE_STATS": "1"}
    pinned = ["taskset", "-c", str(CONFIG["core"]), *map(str, command)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            pinned, env=os.environ | one | vllm, stdout=out, stderr=out, start_new_session=True, cwd=log.parent
        )
    server = Server(process, port, body_of)
    until = time.monotonic() + CONFIG["start_seconds"]
    try:
        while process.poll() is None and time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                return server
        sys.exit(f"{' '.join(pinned)}\nis not ready:\n{log.read_text(errors='replace')[-3000:]}")
    except BaseException:
        if process.poll() is None:
            server.end()
        raise


def commands(args: argparse.Namespace, folder: Path, dtype: str, ends: list[int]) -> dict[str, Any]:
    """What starts each server that is here, by its name; {port} is a free one."""
    adapters, count = folder / "adapters", str(len(NAMES))
    graft = Path(sys.executable).with_name("graft")
    bias = {"logit_bias": dict.fromkeys(map(str, ends), -100)}
    found: dict[str, Any] = {
        "graft serve": (
            [graft, "serve", "--base", folder / dtype, "--adapters", adapters, "--dtype", dtype],
            lambda name: {"model": name} | bias,
        )
    }
    if args.vllm:
        modules = [f"{name}={adapters / name}" for name in NAMES]
        options = ["--dtype", dtype, "--max-model-len", "2048", "--enable-lora", "--max-loras", count]
        found["vLLM"] = (
            [
                args.vllm,
                "serve",
                folder / dtype,
                *options,
                "--max-lora-rank",
                CONFIG["rank"],
                "--lora-modules",
                *modules,
            ],
            lambda name: {"model": name} | bias,  # its ignore_eos lets a token through that ends a turn
        )
    if args.llama_server:
        files = ",".join(str(folder / "gguf" / name / "adapter.gguf") for name in NAMES)
        options = ["--threads", "1", "--threads-batch", "1", "--parallel", count, "--ctx-size", 2048, "--no-webui"]
        found["llama-server"] = (
            [
                args.llama_server,
                "--model",
                folder / f"{dtype}.gguf",
                *options,
                "--lora",
                files,
                "--lora-init-without-apply",
            ],
            lambda name: {"ignore_eos": True, "lora": [{"id": NAMES.index(name), "scale": 1.0}]},
        )
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


# Rounds -----------------------------------------------------------------------------------------------------------


def prompts(number: int) -> list[list[int]]:
    """Random ids; other ones in each round, so that no server has them in its cache."""
    random = torch.Generator().manual_seed(number)
    ids: list[list[int]] = torch.randint(20, 40_000, (len(NAMES), CONFIG["prompt_tokens"]), generator=random).tolist()
    return ids


def ask(server: Server, number: int) -> tuple[float, list[str]]:
    """Tokens per second, from the first request to the last answer; and the answers."""
    server.go_on()
    with ThreadPoolExecutor(len(NAMES)) as threads:
        prompt_list = prompts(number)
        started = time.perf_counter()
        answers = list(threads.map(server.answer, NAMES, prompt_list))
        took = time.perf_counter() - started
    server.pause()
    return len(NAMES) * CONFIG["new_tokens"] / took, answers


def measure(servers: dict[str, Server], rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in servers}
    answers_by_server: dict[str, list[str]] = {}
    for number in range(rounds + 1):  # the first is a warm-up
        for name, server in servers.items():
            rate, answers = ask(server, number)
            print(f"{name}: {rate:.1f} tokens/s" + ("" if number else " (warm-up)"), flush=True)
            if number:
                rates[name].append(rate)
            else:
                answers_by_server[name] = answers
    ours = "graft serve"
    peers = [name for name in servers if name != ours]
    return {
        "tokens_per_second": {name: [round(each, 1) for each in all_] for name, all_ in rates.items()},
        "ours_over_peer": {
            name: round(statistics.median(a / b for a, b in zip(rates[ours], rates[name], strict=True)), 3)
            for name in peers
        },
        "same_answers": {
            name: sum(a == b for a, b in zip(answers_by_server[ours], answers_by_server[name], strict=True))
            for name in peers
        },
    }


def version_of(command: Sequence[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(line for line in (process.stdout + process.stderr).splitlines() if any(c.isdigit() for c in line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=CONFIG["rounds"])
    parser.add_argument("--vllm", help="the program `vllm` of an environment of its own")
    parser.add_argument("--llama-server", help="the program `llama-server`")
    parser.add_argument(
        "--llama-convert", help="a command: a Python with what llama.cpp's converter needs, and its path"
    )
    args = parser.parse_args()
    if bool(args.llama_server) != bool(args.llama_convert):
        parser.error("--llama-server needs --llama-convert, which writes the base in GGUF")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ends = write_files(folder, (args.llama_convert or "").split())
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {CONFIG["core"]})
        for dtype in CONFIG["dtypes"]:
            servers: dict[str, Server] = {}
            try:
                for server, (command, body_of) in commands(args, folder, dtype, ends).items():
                    port = free_port()
                    servers[server] = start([*command, "--port", port], port, body_of, folder / f"{server}.log")
                    servers[server].pause()
                found[dtype] = measure(servers, args.rounds)
            finally:
                for each in servers.values():
                    each.end()
            print(dtype, found[dtype], flush=True)
    programs = {"vLLM": args.vllm, "llama-server": args.llama_server}
    peers = {name: version_of([path, "--version"]) if path else "not installed" for name, path in programs.items()}
    print(peers, flush=True)
    if args.rounds == CONFIG["rounds"]:
        write_result(__file__, {"peers": peers, "config": CONFIG, "found": found})


if __name__ == "__main__":
    main()
