"""Each check of diagnostics passes a sound one and catches the fault that it is there for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corollary.testing import Case, check_diagnostic
from corollary.testing.diagnostic import CHECKS


@dataclass(frozen=True)
class Report:
    mean: float
    norms: tuple[float, ...]
    batches: int

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def plot(self, ax: Any = None) -> Any:
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure().add_subplot()
        ax.plot(self.norms)
        ax.set_xlabel("layer")
        return ax


def problem(batches: int, dtype: torch.dtype) -> tuple[nn.Module, Iterator[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, (torch.randn(512, 6, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(batches))


def sound(model: nn.Module, data: Iterator[Tensor], seed: int) -> Report:
    """Mean output over the data and the norm of each parameter."""
    training = {module: module.training for module in model.modules()}
    total, count = 0.0, 0
    try:
        model.eval()
        with torch.no_grad():
            for x in data:
                if x.shape[-1] != 6:
                    raise ValueError(f"data has {x.shape[-1]} features; allowed: 6")
                total, count = total + float(model(x).double().abs().mean()), count + 1
    finally:
        for module, mode in training.items():
            module.training = mode
    if not count:
        raise ValueError("data is empty; allowed: at least one batch")
    if total != total:
        raise ValueError("the model's output holds NaN")
    return Report(total / count, tuple(float(p.detach().double().norm()) for p in model.parameters()), count)


def wrong() -> tuple[nn.Module, list[Tensor]]:
    return problem(1, torch.float32)[0], [torch.randn(4, 5)]


TAGS = {"problem": problem, "bad": {"five features": wrong}}


def test_a_sound_diagnostic_passes() -> None:
    check_diagnostic(sound, **TAGS)


def test_problem_is_required() -> None:
    with pytest.raises(ValueError, match="needs the tag 'problem'"):
        check_diagnostic(sound)


def variant(**changes: Any) -> Callable[..., Any]:
    """The sound diagnostic with another report class built from the same numbers."""
    namespace = {"to_dict": Report.to_dict, "plot": Report.plot, **changes}
    kind = dataclass(frozen=True)(type("Variant", (), {"__annotations__": Report.__annotations__, **namespace}))

    def run(model: Any, data: Any, seed: int) -> Any:
        return kind(**asdict(sound(model, data, seed)))

    return run


def wrap(fault: Callable[[nn.Module, int], Any]) -> Callable[..., Any]:
    """The sound diagnostic, then a fault done to the model."""

    def run(model: Any, data: Any, seed: int) -> Any:
        report = sound(model, data, seed)
        fault(model, seed)
        return report

    return run


def thawed(model: Any, data: Any, seed: int) -> Any:
    kind = dataclass(type("Thawed", (), {"__annotations__": Report.__annotations__}))
    return kind(**asdict(sound(model, data, seed)))


def hoarding(model: Any, data: Any, seed: int) -> Report:
    held = list(data)
    return sound(model, iter(held), seed)


def keeps_outputs(model: Any, data: Any, seed: int) -> Report:
    kept = []

    def read() -> Iterator[Tensor]:
        for x in data:
            kept.append(x.sum(1).double())
            yield x

    return sound(model, read(), seed)


def noisy(model: Any, data: Any, seed: int) -> Report:
    report = sound(model, data, seed)
    return Report(report.mean + float(np.random.default_rng().normal()), report.norms, report.batches)


def from_global_state(model: Any, data: Any, seed: int) -> Report:
    state = torch.get_rng_state()
    report = sound(model, data, seed)
    report = Report(report.mean + float(torch.rand(())), report.norms, report.batches)
    torch.set_rng_state(state)
    return report


def in_training_mode(model: Any, data: Any, seed: int) -> Report:
    report = sound(model, data, seed)
    model.train()
    model(torch.randn(4, 6, dtype=next(model.parameters()).dtype, generator=torch.Generator().manual_seed(0)))
    return report


def only_float32(model: Any, data: Any, seed: int) -> Report:
    report = sound(model, data, seed)
    scale = 1.0 if next(model.parameters()).dtype == torch.float64 else 1.5
    return Report(report.mean * scale, report.norms, report.batches)


def accepts_nothing(model: Any, data: Any, seed: int) -> Report:
    first = next(data, None) if hasattr(data, "__next__") else None
    if first is None and hasattr(data, "__next__"):
        return Report(0.0, (0.0,), 0)

    def again() -> Iterator[Tensor]:
        if first is not None:
            yield first
        yield from data

    return sound(model, again(), seed)


def accepts_nan(model: Any, data: Any, seed: int) -> Report:
    with torch.no_grad():
        clean = {n: p.nan_to_num() for n, p in model.named_parameters()}
        call = lambda x: torch.func.functional_call(model, clean, (x,))  # noqa: E731
        return Report(float(sum(call(x).abs().mean() for x in data)), (1.0,), 1)


def crashes(model: Any, data: Any, seed: int) -> Report:
    items = list(data)
    if not items:
        raise IndexError("list index out of range")
    return sound(model, iter(items), seed)


def draws_nothing(self: Any, ax: Any = None) -> Any:
    from matplotlib.figure import Figure

    return ax or Figure().add_subplot()


def own_axes(self: Any, ax: Any = None) -> Any:
    return Report.plot(self, None)


def opens_a_figure(self: Any, ax: Any = None) -> Any:
    from matplotlib import pyplot

    pyplot.figure()
    return Report.plot(self, ax)


def set_grad(model: nn.Module, seed: int) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def add_to_grad(model: nn.Module, seed: int) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(1)


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        ("frozen_dataclass", thawed, "not frozen"),
        ("frozen_dataclass", lambda *a, **k: sound(*a, **k).to_dict(), "not a dataclass"),
        ("to_dict", variant(to_dict=lambda self: asdict(self)), "tuples"),
        ("to_dict", variant(to_dict=lambda self: {"mean": torch.ones(2)}), "not plain JSON"),
        ("to_dict", variant(to_dict=lambda self: {**Report.to_dict(self), "mean": float("nan")}), "not plain JSON"),
        ("to_dict", variant(to_dict=lambda self: {"mean": self.mean}), "lacks the field 'norms'"),
        ("to_dict", variant(to_dict=lambda self: {**Report.to_dict(self), "mean": round(self.mean, 3)}), "gives 'mean' as"),
        ("plot", variant(plot=draws_nothing), "drew nothing"),
        ("plot", variant(plot=own_axes), "other axes"),
        ("plot", variant(plot=opens_a_figure), "opened another figure"),
        ("plot", variant(plot=lambda self, ax=None: None), "not Axes"),
        ("memory", hoarding, "memory grows with data"),
        ("memory", keeps_outputs, "memory grows with data"),
        ("determinism", noisy, "differ"),
        ("determinism", from_global_state, "differ"),
        ("determinism", wrap(lambda model, seed: torch.rand(1)), "random state moved"),
        ("determinism", wrap(lambda model, seed: random.random()), "random state moved"),
        ("determinism", wrap(lambda model, seed: np.random.rand()), "random state moved"),  # noqa: NPY002
        ("model_untouched", wrap(lambda model, seed: model.eval()), "mode of some part"),
        ("model_untouched", wrap(lambda model, seed: model.train()), "mode of some part"),
        ("model_untouched", wrap(lambda model, seed: model[0].weight.data.mul_(1.01)), "'0.weight' changed"),
        ("model_untouched", wrap(lambda model, seed: model[1].running_mean.add_(1)), "'1.running_mean' changed"),
        ("model_untouched", wrap(lambda model, seed: model.requires_grad_(False)), "requires_grad"),
        ("model_untouched", wrap(set_grad), "was replaced"),
        ("model_untouched", wrap(add_to_grad), "gradient of '0.bias' changed"),
        ("model_untouched", wrap(lambda model, seed: model[0].register_forward_hook(lambda *_: None)), "hooks"),
        ("model_untouched", wrap(lambda model, seed: torch.set_grad_enabled(False)), "gradient mode"),
        ("model_untouched", in_training_mode, "changed"),
        ("dtypes", only_float32, "is off by"),
        ("bad_input", accepts_nothing, "no batches: was accepted"),
        ("bad_input", accepts_nan, "no batches: was accepted|NaN: was accepted"),
        ("bad_input", crashes, "must be a ValueError or TypeError"),
    ],
)
def test_each_check_catches_its_fault(check: str, broken: Callable[..., Any], message: str) -> None:
    case = Case(broken, TAGS)
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](case)


def test_a_bad_shape_that_is_accepted_is_caught() -> None:
    tags = {**TAGS, "bad": {"ordinary data": lambda: problem(2, torch.float32)}}
    with pytest.raises(AssertionError, match="ordinary data: was accepted"):
        CHECKS["bad_input"](Case(sound, tags))


def test_memory_is_not_asked_of_what_does_not_stream() -> None:
    CHECKS["memory"](Case(hoarding, {**TAGS, "streams": False}))
