"""For tests, ours and other packages': a tiny model, a tiny tokenizer, and the contract of a method as functions.

`check_method(name)` runs the whole contract over one row of METHODS; `tests/test_contract.py` runs each of its clauses
by name. A clause sees a method only through the interface, so a new method is tested without a new test.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from graftlm.deltas import METHODS
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, WeightDelta
from graftlm.model.attach import Host, attach, deltas_off, detach, hosts, merged_state, trainable
from graftlm.model.store import load_adapter, save_adapter

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of two layers, float32, in evaluation mode; any architecture by its model type."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(TINY | changes)))
    return model.float().eval().requires_grad_(False)


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of at most 300 tokens, trained here and now on a few sentences."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the user asks and the assistant answers in one line\n\n", "  a system tells"], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[2], pad_token=special[0]
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny_base(folder: Path, *, seed: int = 0, template: str | None = CHATML, **changes: Any) -> Path:
    """A folder that `load_base` loads: the tiny model and the tiny tokenizer."""
    tiny_model(seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


# The contract ----------------------------------------------------------------------------------------------------


def tiny_config(name: str) -> DeltaConfig:
    """The config of a method with sizes that fit the tiny model."""
    config: Any = METHODS[name].config
    small = {"r": 4, "alpha": 6.0}
    made: DeltaConfig = config(
        **{key: value for key, value in small.items() if key in {f.name for f in fields(config)}}
    )
    return made


def ids(seed: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def perturbed(name: str, model: Any, *, scale: float = 0.1, seed: int = 1) -> Any:
    """The model with the method on it, and every trainable tensor moved away from its start, so that no-ops show."""
    attach(model, tiny_config(name))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(ids()).logits
    return out


def close(ours: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Assert that the largest difference is at most `tolerance` of the largest value."""
    ours, wanted = ours.detach(), wanted.detach()
    error = float((ours - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    assert error <= tolerance, f"{what}: differs by {error:.3g} of the largest value, {tolerance:g} is allowed"


def identity_at_start(name: str) -> None:
    model = tiny_model()
    before = logits(model)
    attach(model, tiny_config(name))
    close(logits(model), before, "the model with a fresh delta against its base")


def off_is_the_base(name: str) -> None:
    model = tiny_model()
    before = logits(model)
    perturbed(name, model)
    assert not torch.equal(logits(model), before), "a delta away from its start must change the logits"
    with deltas_off(model):
        assert torch.equal(logits(model), before), "with deltas off, logits must be the base's bit for bit"
    assert not torch.equal(logits(model), before), "after deltas_off, the delta must be on again"


def only_the_delta_learns(name: str) -> None:
    model = tiny_model()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    perturbed(name, model)
    before = {key: p.detach().clone() for key, p in trainable(model).items()}
    optimiser = torch.optim.SGD(trainable(model).values(), lr=1.0)
    model(ids()).logits.float().log_softmax(-1)[..., 0].sum().backward()
    for key, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{key} got no gradient"
        assert bool(parameter.grad.any()), f"{key} got a gradient of zero"
    optimiser.step()
    for key, parameter in trainable(model).items():
        assert not torch.equal(parameter, before[key]), f"{key} did not move"
    detach(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[key]), f"{key} of the base was changed"


def fast_path_is_the_equation(name: str) -> None:
    """Outputs and all gradients of the model as it runs, against W' and b' applied by plain autograd."""
    fast, plain = perturbed(name, tiny_model()), perturbed(name, tiny_model())
    for host in hosts(plain).values():
        object.__setattr__(host, "forward", _by_the_equation(host))
    outputs = []
    for model in (fast, plain):
        out = model(ids()).logits
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        outputs.append(out.detach())
    close(outputs[0], outputs[1], "logits of the fast path against the equation")
    for (key, ours), wanted in zip(trainable(fast).items(), trainable(plain).values(), strict=True):
        assert ours.grad is not None
        assert wanted.grad is not None
        close(ours.grad, wanted.grad, f"gradient of {key} on the fast path against the equation")


def _by_the_equation(host: Host) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        (delta,) = host.on()
        if isinstance(delta, WeightDelta):
            return host.view.apply(x, *host.effective())
        y: Tensor = delta(x, host.view(x), host.view)
        return y

    return forward


def merged_is_the_model(name: str) -> None:
    model = perturbed(name, tiny_model())
    if not METHODS[name].mergeable:
        return
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted, state = logits(model), merged_state(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "merging changed it"
    close(logits(plain_with(state)), wanted, "the merged model against the model with its delta")


def plain_with(state: Mapping[str, Tensor]) -> Any:
    """A model without deltas that has a merged state for its weights, new biases included."""
    plain = tiny_model(seed=5)
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if kind == "bias" and plain.get_submodule(layer).bias is None:
            plain.get_submodule(layer).bias = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing, f"merged state lacks {missing}"
    assert not unexpected, f"merged state has {unexpected}, which the base has not"
    return plain


def save_load_save_is_stable(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = perturbed(name, tiny_model())
        save_adapter(model, f"{folder}/a")
        other = tiny_model()
        load_adapter(other, f"{folder}/a")
        assert torch.equal(logits(other), logits(model)), "a loaded adapter must compute the same bits"
        save_adapter(other, f"{folder}/b")
        first, second = (Path(folder, n, "adapter_model.safetensors").read_bytes() for n in "ab")
        assert first == second, "save, load, save must give the same bytes"


def detach_returns_the_very_modules(name: str) -> None:
    model = tiny_model()
    modules, before = dict(model.named_modules()), logits(model)
    attach(model, tiny_config(name))
    detach(model)
    after = dict(model.named_modules())
    assert modules.keys() == after.keys(), "detach must leave no module behind"
    assert all(modules[key] is after[key] for key in modules), "detach must put back the very modules"
    assert torch.equal(logits(model), before)


def same_seed_same_start(name: str) -> None:
    starts: list[Mapping[str, Tensor]] = []
    for seed in (7, 7, 8):
        model = tiny_model()
        attach(model, tiny_config(name), seed=seed)
        starts.append(trainable(model))
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0]), (
        "the same seed must give the same start"
    )
    if any(bool(p.detach().std() > 0) for p in starts[0].values()):
        assert any(not torch.equal(starts[0][key], starts[2][key]) for key in starts[0]), "another seed, another start"


def parameters_are_as_declared(name: str) -> None:
    model = tiny_model()
    attach(model, tiny_config(name))
    for site, host in hosts(model).items():
        for delta in host.on():
            values = {f.name: getattr(delta.config, f.name) for f in fields(delta.config)}
            values |= {"d_in": delta.site.d_in, "d_out": delta.site.d_out}
            declared = eval(delta.formula, {"__builtins__": {}}, values)  # noqa: S307 (a literal of the method's class)
            counted = sum(p.numel() for p in delta.parameters() if p.requires_grad)
            assert counted == declared, f"{site}: {counted} trainable parameters, {delta.formula} says {declared}"


def factors_are_the_matrix(name: str) -> None:
    model = perturbed(name, tiny_model())
    for site, host in hosts(model).items():
        for delta in host.on():
            if isinstance(delta, AdditiveDelta):
                x = torch.randn(5, delta.site.d_in, generator=torch.Generator().manual_seed(2))
                matrix = delta.matrix()
                assert matrix.shape == (delta.site.d_out, delta.site.d_in), f"{site}: matrix() has shape {matrix.shape}"
                close(delta.increment(x, host.view), x @ matrix.T, f"{site}: increment() against matrix()")
                if (factors := delta.factors()) is not None:
                    close(factors[1] @ factors[0], matrix, f"{site}: B A against matrix()")


def two_deltas_compose(name: str) -> None:
    """With every mergeable method as a second delta on the same layers: forward = merged, and detached = alone."""
    for other, method in METHODS.items():
        if not (METHODS[name].mergeable and method.mergeable):
            continue
        model = perturbed(name, tiny_model())
        alone = logits(model)
        attach(model, tiny_config(other), name="second", seed=3)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(0.05)
        close(logits(plain_with(merged_state(model))), logits(model), f"{name} and {other} merged against both on")
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.sub_(0.05)
        detach(model, "second")
        close(logits(model), alone, f"{name} after {other} was taken off again")


def bf16_base(name: str) -> None:
    """On a bf16 base trainable tensors stay float32, and outputs agree with float32 to bf16's precision."""
    wanted = logits(perturbed(name, tiny_model()))
    model = perturbed(name, tiny_model().bfloat16())
    assert all(p.dtype == torch.float32 for p in trainable(model).values()), "trainable tensors must be float32"
    out = model(ids()).logits
    assert out.dtype == torch.bfloat16, f"a bf16 base must compute in bf16, this is {out.dtype}"
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable(model).values())
    close(out.detach().float(), wanted, "logits on a bf16 base against float32", tolerance=0.05)


def checkpointing_changes_nothing(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = perturbed(name, tiny_model())
        if checkpointed:
            model.train()
            model.config.use_cache = False
            model.activation_checkpointing_enable()
        model(ids()).logits.square().sum().backward()
        gradients.append([p.grad for p in trainable(model).values()])
    for ours, wanted in zip(gradients[1], gradients[0], strict=True):
        assert ours is not None
        assert wanted is not None
        close(ours, wanted, "gradient under checkpointing")


CONTRACT: dict[str, Callable[[str], None]] = {
    clause.__name__: clause
    for clause in (
        identity_at_start,
        off_is_the_base,
        only_the_delta_learns,
        fast_path_is_the_equation,
        merged_is_the_model,
        save_load_save_is_stable,
        detach_returns_the_very_modules,
        same_seed_same_start,
        parameters_are_as_declared,
        factors_are_the_matrix,
        two_deltas_compose,
        bf16_base,
        checkpointing_changes_nothing,
    )
}


def check_method(name: str) -> None:
    """Run every clause of the contract on one method of METHODS; raises AssertionError with the clause's name."""
    for title, clause in CONTRACT.items():
        try:
            clause(name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {title}: {error}") from None
        except Exception as error:  # whatever else a method breaks, its author is told in which clause
            raise AssertionError(f"{name}: {title}: {type(error).__name__}: {error}") from error
