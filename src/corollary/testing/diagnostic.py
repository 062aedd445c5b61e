"""Conformance checks of diagnostics: functions of a model and data that give a frozen dataclass.

A case's ``make(model, data, seed=...)`` runs the diagnostic, loss and options filled in. Its tags:

==================  =========================================================================================
``problem``         required: ``problem(batches=..., dtype=...)`` gives a fresh model and an iterable of so many batches,
                    the same ones each time; draw batches of some kilobytes as they are asked for, so that memory shows
``streams``         whether memory is independent of the number of batches; default True
``dtypes``          floating dtypes of the model it takes; default float16, bfloat16, float32 and float64
``precision``       dtype to allowed error relative to float64; default 1e-1 (bfloat16), 5e-2 (float16), 1e-3 (float32)
``bad``             name to a function of no arguments that gives a model and data which must be refused (a wrong shape, say),
                    beyond no batches and parameters of NaN, which are tried on every diagnostic
==================  =========================================================================================
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corollary.memory import peak_bytes
from corollary.testing.case import Case, Check, run_checks
from corollary.testing.function import random_state
from corollary.testing.layer import _refused

_PRECISION = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_FEW, _MANY = 4, 24  # batches: enough that what is kept of each batch shows


def _problem(case: Case, batches: int = _FEW, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model, data = case.tags["problem"](batches=batches, dtype=dtype)
    return model, data


def _run(case: Case, problem: tuple[Any, Any] | None = None, seed: int = 0) -> Any:
    return case.make(*(problem or _problem(case)), seed=seed)


def _plain(value: Any) -> Any:
    """A field as ``json`` would give it back."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | int | float):
        yield path, float(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)


def frozen_dataclass(case: Case) -> None:
    """The result is an instance of a frozen dataclass."""
    result = _run(case)
    assert dataclasses.is_dataclass(result), f"the result is {type(result).__name__}, not a dataclass"
    fields = dataclasses.fields(result)
    assert fields, "the result has no fields"
    try:
        setattr(result, fields[0].name, None)
    except dataclasses.FrozenInstanceError:
        return
    raise AssertionError("the result's fields can be overwritten: its dataclass is not frozen")


def to_dict(case: Case) -> None:
    """``to_dict()`` holds every field, goes through strict JSON unchanged, and loses no digit of any number."""
    result = _run(case)
    data = result.to_dict()
    try:
        again = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"to_dict() is not plain JSON: {error}") from error
    assert again == data, "to_dict() changes on its way through JSON (tuples, or keys that are not strings)"
    assert any(_numbers(data)), "to_dict() holds no number"
    for field in dataclasses.fields(result):
        assert field.name in data, f"to_dict() lacks the field '{field.name}'"
        ours, true = data[field.name], _plain(getattr(result, field.name))
        assert ours == true, f"to_dict() gives '{field.name}' as {ours!r}, but the field is {true!r}"


def plot(case: Case) -> None:
    """``plot()`` makes axes and ``plot(ax)`` takes them; both draw something labelled, and no window opens."""
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    result = _run(case)
    before = pyplot.get_fignums()
    given = Figure().add_subplot()
    try:
        for ours, ax in (("plot(ax)", result.plot(given)), ("plot()", result.plot())):
            assert isinstance(ax, Axes), f"{ours} gave {type(ax).__name__}, not Axes"
            assert ours == "plot()" or ax is given, "plot(ax) gave other axes than it was given"
            assert ours == "plot()" or pyplot.get_fignums() == before, "plot(ax) opened another figure"
            assert ax.has_data() or ax.texts or ax.tables, f"{ours} drew nothing"
            assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title(), f"{ours} labelled nothing"
            FigureCanvasAgg(ax.get_figure(root=True)).draw()  # what cannot be rendered fails here
    finally:
        for number in set(pyplot.get_fignums()) - set(before):
            pyplot.close(number)


def memory(case: Case) -> None:
    """Peak memory does not grow with the number of batches."""
    if not case.tags.get("streams", True):
        return
    _run(case)  # imports and caches are nobody's fault

    def peak(batches: int) -> int:
        problem = _problem(case, batches)
        return peak_bytes(lambda: _run(case, problem))

    # Garbage in cycles is no growth: let the collector look often, and only at what is new.
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20, 2, 2)
    try:
        few, many = peak(_FEW), peak(_MANY)
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    # The slack is for the measurement, which allocates a little for each operation that it watches.
    assert many <= 1.1 * few + 32768, (
        f"{_FEW} batches take {few} bytes at the peak, {_MANY} take {many}: memory grows with data"
    )


def determinism(case: Case) -> None:
    """The same seed gives the same numbers, whatever the global random states are, and those stay as they were."""
    first = _run(case, seed=3).to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        problem = _problem(case)
        before = random_state()
        second = _run(case, problem, seed=3).to_dict()
        assert random_state() == before, "a global random state moved"
    assert first == second, "two runs with one seed differ"


def model_untouched(case: Case) -> None:
    """Modes, parameters, buffers, gradients, hooks and gradient mode are afterwards what they were before."""
    model, _ = _problem(case)
    if not isinstance(model, nn.Module):
        return
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0  # parts in either mode, which a plain train() afterwards would not restore
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5) if i % 2 else None

    def hooks(module: nn.Module) -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(module, kind)) for kind in kinds)

    def modes() -> list[bool]:
        return [module.training for module in model.modules()]

    def flags() -> list[bool]:
        return [parameter.requires_grad for parameter in model.parameters()]

    before = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    counts, training, trainable = [hooks(m) for m in model.modules()], modes(), flags()
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            _run(case, (model, _problem(case)[1]))  # data anew: it may be readable only once
            assert torch.is_grad_enabled() == enabled, "gradient mode was left switched"
    assert modes() == training, "training or evaluation mode of some part changed"
    assert flags() == trainable, "requires_grad of some parameter changed"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert name in before, f"'{name}' was added to the model"
        assert torch.equal(tensor, before[name]), f"'{name}' changed"
    for (name, parameter), (grad, copy) in zip(model.named_parameters(), gradients, strict=True):
        assert parameter.grad is grad, f"the gradient of '{name}' was replaced"
        assert grad is None or torch.equal(grad, copy), f"the gradient of '{name}' changed"  # type: ignore[arg-type]
    assert [hooks(m) for m in model.modules()] == counts, "hooks were left on the model"


def dtypes(case: Case) -> None:
    """Every promised dtype of the model gives numbers near those in float64."""
    true = dict(_grouped(_run(case, _problem(case, dtype=torch.float64)).to_dict()))
    for dtype in case.tags.get("dtypes", (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        allowed = {**_PRECISION, **case.tags.get("precision", {})}[dtype]
        for path, ours in _grouped(_run(case, _problem(case, dtype=dtype)).to_dict()):
            assert path in true, f"{dtype} gives '{path}', float64 does not"
            exact = true[path]
            assert ours.shape == exact.shape, f"{dtype} gives {ours.size} numbers as '{path}', float64 {exact.size}"
            error = float(np.abs(ours - exact).max() / max(np.abs(exact).max(), 1e-12))
            assert error <= allowed, f"{dtype}: '{path}' is off by {error:.1e} against float64, allowed {allowed:.0e}"


def _grouped(data: Any) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float64]]]]:
    groups: dict[str, list[float]] = {}
    for path, number in _numbers(data):
        groups.setdefault(path, []).append(number)
    yield from ((path, np.array(numbers)) for path, numbers in groups.items())


def bad_input(case: Case) -> None:
    """No batches, parameters of NaN and what the case names as bad end in a ValueError or TypeError that says what came."""
    _refused(lambda: _run(case, _problem(case, batches=0)), "no batches", ("empty", "no ", "0", "at least"))
    model, data = _problem(case)
    if isinstance(model, nn.Module):
        with torch.no_grad():
            next(p for p in model.parameters() if p.is_floating_point()).fill_(torch.nan)
        _refused(lambda: _run(case, (model, data)), "a parameter of NaN", ("NaN", "nan", "finite"))
    for name, bad in case.tags.get("bad", {}).items():
        _refused(lambda bad=bad: _run(case, bad()), name)  # type: ignore[misc]


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        frozen_dataclass, to_dict, plot, memory, determinism, model_untouched, dtypes, bad_input,
    )
}  # fmt: skip


def check_diagnostic(make: Callable[..., Any], **tags: Any) -> None:
    """Run every check of this module on a diagnostic.

    Args:
        make: ``make(model, data, seed=...)`` runs the diagnostic and gives its result.
        **tags: the problem it runs on, and what it promises; see the module's table. ``problem`` is required.

    Raises:
        AssertionError: names the first check that fails and why.
        ValueError: ``problem`` is missing.

    Example:
        >>> from corollary.analysis import evaluate_compression
        >>> from corollary.models import GPT
        >>> def problem(batches, dtype):
        ...     with torch.random.fork_rng(devices=[]):
        ...         torch.manual_seed(0)
        ...         model = GPT(16, dim=16, depth=1, heads=2, context=24).to(dtype)
        ...     texts = (torch.arange(24).roll(i) % 16 for i in range(4 * batches))
        ...     return model, texts
        >>> def make(model, data, seed):
        ...     return evaluate_compression(model, data, layers=["blocks.0", "norm"], batch_size=4)
        >>> check_diagnostic(make, problem=problem)
    """
    if "problem" not in tags:
        raise ValueError("check_diagnostic needs the tag 'problem': a function of (batches, dtype) giving a model and data")
    run_checks("diagnostic", Case(make, tags))
