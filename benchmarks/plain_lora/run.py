"""What export as a plain LoRA loses of methods without low-rank factors. Nothing is timed.

python benchmarks/plain_lora/run.py
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm import load_adapter, load_base  # noqa: E402
from graftlm.model.hosts import LayerHost  # noqa: E402
from graftlm.model.registry import hosts  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())


def trained(method: str, folder: Path) -> Any:
    """The base with a delta after the job."""
    recipe, out = folder / f"{method}.yaml", folder / method
    recipe.write_text(yaml.safe_dump(CONFIG["recipe"] | {"delta": {"method": method}}))
    subprocess.run([sys.executable, "-m", "graftlm", "train", str(recipe), "--out", str(out)], check=True)
    model, _ = load_base(CONFIG["recipe"]["base"], dtype="float32")
    load_adapter(model, out)
    return model


@torch.no_grad()
def lost(model: Any) -> dict[int, float]:
    """Rank -> ||dW - its best approximation|| / ||dW||, the mean over the linear layers of CONFIG's layers."""
    numbers = "|".join(map(str, CONFIG["layers"]))
    shares: dict[int, list[float]] = {rank: [] for rank in CONFIG["ranks"]}
    for name, host in hosts(model).items():
        if isinstance(host, LayerHost) and re.search(rf"\.layers\.({numbers})\.", name):
            squares = torch.linalg.svdvals((host.effective()[0] - host.view.weight).double()).square()
            for rank in shares:
                shares[rank].append(float((squares[rank:].sum() / squares.sum()).sqrt()))
    return {rank: round(sum(each) / len(each), 3) for rank, each in shares.items()}


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in CONFIG["methods"]:
            found[method] = lost(trained(method, Path(folder)))
            print(method, found[method], flush=True)
    write_result(__file__, {"config": CONFIG, "share_lost": found})


if __name__ == "__main__":
    main()
