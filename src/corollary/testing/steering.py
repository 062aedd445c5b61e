"""Conformance checks of steering: objects that change a Transformer's activations by hooks and come off cleanly.

``make(model, layers, **options)`` builds the steerer for the named layers, which give the residual stream. It has
``fit(source, target)`` with two batches of paired prompts, ``steer(strength=1.0)`` that gives a handle with ``remove()`` which is a
context manager too, ``state_dict()`` and ``load_state_dict()``. Its tags:

===========  =========================================================================================================
``options``  option sets that ``make`` gets; default ``({},)``
``dtypes``   dtypes of models that it steers; default bfloat16, float32 and float64
===========  =========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from corollary.models import GPT
from corollary.testing.case import Case, Check, run_checks
from corollary.testing.function import random_state

_LAYERS = ("blocks.*",)


class _Tuples(nn.Module):
    """A block that gives its stream first in a tuple, as transformers' blocks may."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Any) -> tuple[Tensor, str]:
        return self.block(x[0] if isinstance(x, tuple) else x), "kept"


class _Unpack(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: tuple[Tensor, str]) -> Tensor:
        assert x[1] == "kept", "what stood beside the stream was changed"
        out: Tensor = self.norm(x[0])
        return out


def _model(dtype: torch.dtype = torch.float32, tuples: bool = False) -> GPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(64, dim=16, depth=3, heads=2, context=10)
    with torch.no_grad():
        model.embed.weight.mul_(20)  # a fresh model's stream is too small for a difference to show in bfloat16
    if tuples:
        model.blocks = nn.ModuleList(_Tuples(block) for block in model.blocks)
        model.norm = _Unpack(model.norm)  # type: ignore[assignment]
    return model.to(dtype).eval()


def _prompts() -> tuple[Tensor, Tensor]:
    source = torch.randint(0, 32, (12, 6), generator=torch.Generator().manual_seed(1))
    return source, source + 32


def _fitted(case: Case, model: nn.Module, options: Mapping[str, Any]) -> Any:
    steerer = case.make(model, _LAYERS, **options)
    steerer.fit(*_prompts())
    return steerer


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _sets(case: Case) -> Any:
    return case.tags.get("options", ({},))


@torch.no_grad()
def acts(case: Case) -> None:
    """Steering changes the output while it is on, by more at a greater strength, and not at all at strength 0."""
    for options in _sets(case):
        model = _model()
        steerer, tokens = _fitted(case, model, options), _prompts()[0]
        plain = model(tokens)
        outs = []
        for strength in (0.0, 0.01, 0.02):
            with steerer.steer(strength):
                outs.append((model(tokens) - plain).norm().item())
        assert outs[0] == 0, f"{options}: strength 0 changes the output by {outs[0]:.1e}"
        assert 0 < outs[1] < outs[2], f"{options}: strengths 0.01 and 0.02 change the output by {outs[1]:.1e} and {outs[2]:.1e}"


@torch.no_grad()
def removal(case: Case) -> None:
    """``remove()``, the end of a ``with`` and an error inside it leave the model as it was, bit for bit."""
    for options in _sets(case):
        model = _model()
        kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        tokens = _prompts()[0]
        plain = model(tokens)
        steerer = _fitted(case, model, options)
        assert not _hooks(model), f"{options}: fit leaves {_hooks(model)} hooks on the model"
        handle = steerer.steer(2.0)
        during = model.state_dict()
        handle.remove()
        handle.remove()
        try:
            with steerer.steer(2.0):
                raise InterruptedError
        except InterruptedError:
            pass
        assert not _hooks(model), f"{options}: {_hooks(model)} hooks are left on the model"
        assert torch.equal(model(tokens), plain), f"{options}: the output is not what it was"
        for state in (during, model.state_dict()):
            same = list(state) == list(kept) and all(torch.equal(state[key], kept[key]) for key in kept)
            assert same, f"{options}: the model's state dict changed"


@torch.no_grad()
def several(case: Case) -> None:
    """Two steerings at once both act, and come off in any order."""
    for options in _sets(case):
        model = _model()
        steerer, tokens = _fitted(case, model, options), _prompts()[0]
        plain = model(tokens)
        with steerer.steer(0.5):
            alone = model(tokens)
        first, second = steerer.steer(0.5), steerer.steer(0.25)
        both = model(tokens)
        second.remove()
        assert torch.equal(model(tokens), alone), f"{options}: with the second removed, the first acts otherwise than alone"
        first.remove()
        assert not torch.equal(both, alone), f"{options}: a second steering does nothing"
        assert torch.equal(model(tokens), plain), f"{options}: both removed, the output is not what it was"


@torch.no_grad()
def tuples(case: Case) -> None:
    """A layer that gives its stream first in a tuple is steered alike, and the rest of the tuple passes."""
    for options in _sets(case):
        outs = []
        for model in (_model(), _model(tuples=True)):
            with _fitted(case, model, options).steer():
                outs.append(model(_prompts()[0]))
        assert (outs[0] - outs[1]).abs().max() < 1e-5, f"{options}: a stream in a tuple is steered otherwise"


@torch.no_grad()
def causal(case: Case) -> None:
    """What a position gets does not depend on later ones, so that a key-value cache holds."""
    for options in _sets(case):
        model = _model()
        tokens = _prompts()[0]
        with _fitted(case, model, options).steer():
            error = (model(tokens)[:, :3] - model(tokens[:, :3])).abs().max().item()
        assert error < 1e-5, f"{options}: a prefix is steered otherwise than within the whole, by {error:.1e}"


def modes(case: Case) -> None:
    """It works with gradients, without them and in inference mode, and gradients reach the parameters."""
    for options in _sets(case):
        model = _model()
        steerer, tokens = _fitted(case, model, options), _prompts()[0]
        with steerer.steer():
            tracked = model(tokens)
            with torch.no_grad():
                free = model(tokens)
            with torch.inference_mode():
                inference = model(tokens).clone()
            tracked.sum().backward()
        assert torch.equal(tracked.detach(), free), f"{options}: no_grad gives something else"
        assert torch.equal(free, inference), f"{options}: inference mode gives something else"
        for name, p in model.named_parameters():
            assert p.grad is not None, f"{options}: no gradient reaches '{name}'"
            assert p.grad.isfinite().all(), f"{options}: the gradient of '{name}' is not finite"


@torch.no_grad()
def dtypes(case: Case) -> None:
    """Models of each promised dtype are steered, and their output keeps its dtype."""
    for options in _sets(case):
        for dtype in case.tags.get("dtypes", (torch.bfloat16, torch.float32, torch.float64)):
            model = _model(dtype)
            tokens = _prompts()[0]
            plain = model(tokens)
            with _fitted(case, model, options).steer():
                out = model(tokens)
            assert out.dtype == dtype, f"{options}: the output became {out.dtype}"
            assert out.isfinite().all(), f"{options}, {dtype}: the output is not finite"
            assert not torch.equal(out, plain), f"{options}, {dtype}: steering does nothing"


@torch.no_grad()
def resumed(case: Case) -> None:
    """The state goes through safetensors, and a steerer that loads it steers with the same bits."""
    for options in _sets(case):
        model = _model()
        steerer, tokens = _fitted(case, model, options), _prompts()[0]
        other = case.make(model, _LAYERS, **options)
        other.load_state_dict(safetensors.load(safetensors.save(steerer.state_dict())))
        outs = []
        for s in (steerer, other):
            with s.steer():
                outs.append(model(tokens))
        assert torch.equal(*outs), f"{options}: the loaded steerer steers otherwise"


def determinism(case: Case) -> None:
    """The same prompts give the same steerer, and the global random states stay as they were."""
    for options in _sets(case):
        before = random_state()
        states = [_fitted(case, _model(), options).state_dict() for _ in range(2)]
        assert random_state() == before, f"{options}: a global random state moved"
        for key, tensor in states[0].items():
            assert torch.equal(tensor, states[1][key]), f"{options}: '{key}' differs between two fits"


def bad_input(case: Case) -> None:
    """Unknown layers, prompts that are no pairs, a NaN strength, an empty state and use before a fit are refused."""
    for options in _sets(case):
        _refusals(case, options)


def _refusals(case: Case, options: Mapping[str, Any]) -> None:
    model = _model()
    source, target = _prompts()
    cases: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("a number as model", lambda: case.make(3, _LAYERS, **options)),
        ("an unknown layer", lambda: case.make(model, ["no such layer"], **options)),
        ("prompts that are no pairs", lambda: case.make(model, _LAYERS, **options).fit(source, target[:-1])),
        ("steering before a fit", lambda: case.make(model, _LAYERS, **options).steer()),
        ("a NaN strength", lambda: _fitted(case, model, options).steer(float("nan"))),
        ("an empty state", lambda: case.make(model, _LAYERS, **options).load_state_dict({})),
    )
    for name, call in cases:
        try:
            call()
        except (TypeError, ValueError):
            assert not _hooks(model), f"{options}: {name} leaves hooks on the model"
            continue
        raise AssertionError(f"{options}: {name} is taken")


CHECKS: Mapping[str, Check] = {
    check.__name__: check for check in (acts, removal, several, tuples, causal, modes, dtypes, resumed, determinism, bad_input)
}


def check_steering(make: Callable[..., Any], **tags: Any) -> None:
    """Run every check of this module on the steerer that ``make(model, layers, **options)`` builds.

    Args:
        make: builds the steerer.
        **tags: what it promises; see the module's table.

    Raises:
        AssertionError: names the first check that fails and why.

    Example:
        >>> from corollary.adapt import GACT
        >>> check_steering(GACT, options=({"clusters": 2},))
    """
    run_checks("steering", Case(make, tags))
