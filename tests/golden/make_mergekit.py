"""What mergekit makes of three small changes, by its methods: tensors to compare with.

    make peers NAME=mergekit        runs this in an environment with mergekit 0.1.5

It imports nothing of graftlm. The changes are a formula, so that `tests/combine/test_mergekit.py` makes the same ones.
One file, `mergekit.safetensors`, with the versions in its metadata; a key is the name of a case.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

SEED = 7
WEIGHTS = (0.7, 0.2, -0.4)
POSITIVE = (0.5, 0.3, 0.2)
CASES = {
    "task_arithmetic": ("task_arithmetic", WEIGHTS, {}),
    "ties": ("ties", WEIGHTS, {"density": 0.6}),
    "ties, positive weights": ("ties", POSITIVE, {"density": 0.3}),
    "ties, weight 0": ("ties", (1.0, 0.0, 0.0), {"density": 1.0}),
    "dare_linear": ("dare_linear", WEIGHTS, {"density": 0.6}),
    "dare_linear, not rescaled by size": ("dare_linear", WEIGHTS, {"density": 1.0}),
    "dare_ties": ("dare_ties", WEIGHTS, {"density": 0.6}),
    "della": ("della", POSITIVE, {"density": 0.6, "epsilon": 0.2}),
    "della_linear": ("della_linear", WEIGHTS, {"density": 0.6, "epsilon": 0.2}),
    "breadcrumbs": ("breadcrumbs", WEIGHTS, {"density": 0.6, "gamma": 0.1}),
    "breadcrumbs, gamma 0": ("breadcrumbs", WEIGHTS, {"density": 0.6, "gamma": 0.0}),
    "sce": ("sce", None, {"select_topk": 0.5}),
    "sce, all": ("sce", None, {"select_topk": 1.0}),
    "model_stock": ("model_stock", None, {}),
    "karcher": ("karcher", None, {"max_iter": 500, "tol": 1e-9}),
    "slerp": ("slerp", None, {"t": 0.3}),
}
"""Case -> (mergekit's method, weights of the changes, its parameters)."""
PER_INPUT = ("density", "gamma", "epsilon")


def changes():
    """Three changes [7, 9], float64: numbers that look random, with a common part. The same on every machine."""
    count = torch.arange(63, dtype=torch.float64)

    def waves(seed):
        return torch.sin(count * 12.9898 + seed * 78.233 + 0.5 * torch.sin(count * 4.1414)).reshape(7, 9)

    return [scale * (waves(seed) + waves(9)) for seed, scale in enumerate((1.0, 0.6, 1.7))]


def make(case):
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    name, weights, parameters = CASES[case]
    given = changes()
    if name == "slerp":
        group = TensorGroup.from_tensors(given[:2], base_index=0)
    elif name == "karcher":
        group = TensorGroup.from_tensors(given)
    else:
        group = TensorGroup.from_tensors([torch.zeros_like(given[0]), *given], base_index=0)
    inputs = {"weight": weights} if weights is not None else {}
    inputs |= {key: [parameters[key]] * 3 for key in PER_INPUT if key in parameters}
    shared = {key: value for key, value in parameters.items() if key not in PER_INPUT}
    torch.manual_seed(SEED)
    ids = [entry.id for entry in group.non_base]
    each = {key: dict(zip(ids, map(float, values), strict=True)) for key, values in inputs.items()}
    (made,) = registry.get(name)([group], parameters=shared | each)
    return made


def main(file):
    from safetensors.torch import save_file

    tensors = {case: make(case).contiguous() for case in CASES}
    assert all(t.isfinite().all() for t in tensors.values())
    save_file(tensors, file, metadata={name: version(name) for name in ("mergekit", "torch")})
    print(f"{file}: {len(tensors)} tensors")


if __name__ == "__main__":
    main(Path(f"{sys.argv[1]}.safetensors"))
