"""Conformance checks of optimizers.

``make(params, **options)`` is the factory: parameters or groups, and at least the options ``lr`` and, if tagged, ``foreach``.

============  ==========================================================================================================
tag           meaning (default)
============  ==========================================================================================================
oracle        needed: ``oracle(problem, steps, **options)`` gives the parameters after each step, computed in numpy float64
              apart from the component: a list over steps of lists over parameters
options       option sets that ``make`` and ``oracle`` both get on the trajectory (``({},)``)
problem       function giving the `Problem` to optimize (`separable`)
parameter     turns a tensor into a parameter (``torch.nn.Parameter``); a manifold's parameter class goes here
backward      ``backward(optimizer, loss)`` makes the gradients (``loss.backward()``)
step          ``step(optimizer, params, loss)`` takes one step on the function ``loss(params)`` and gives the loss before it, for
              a method that evaluates the loss itself and whose ``step`` needs a closure (``backward``, then ``step()``)
tolerance     largest difference from the oracle, relative to max(1, |value|) (1e-9)
foreach       whether there is a ``foreach`` option (True)
dtypes        what is trained (float32, float64, bfloat16)
half_state    state of half-precision parameters: 'param' for the parameter's dtype, or 'float32' ('param')
wide_state    names of state entries that are float64 whatever is trained (())
nan           what a NaN gradient does: 'propagates' (its parameter shows it, the others stay finite), 'raises' or 'skips'
              (nothing moves) ('propagates')
groups        several parameter groups: 'works' or 'refused' ('works')
empty         parameters without entries: 'works' or 'refused' ('works')
sparse        sparse gradients: 'works' or 'refused' ('refused')
complex       complex parameters: 'works' or 'refused' ('refused')
fsdp2         ``fully_shard`` on 2 gloo processes: 'works' or 'refused' ('works')
============  ==========================================================================================================

'refused' asks for a TypeError, ValueError or RuntimeError whose message says what is refused.
"""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException, spawn
from torch.optim import Optimizer

from corollary.testing.case import Case, Check, run_checks

Arrays = Sequence[NDArray[np.float64]]
_REFUSALS = (TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Problem:
    """A smooth problem whose derivatives an oracle gets in closed form.

    Args:
        start: where the parameters begin: two or more arrays of float64.
        loss: the scalar to minimize, of tensors in the shapes of ``start`` and any floating dtype.
        gradient: its gradient, of arrays.
        hessian_diagonal: the diagonal of its Hessian, of arrays; for second-order methods.
        separable: whether the loss is a sum over entries, so that parameters do not influence each other.
    """

    start: tuple[NDArray[np.float64], ...]
    loss: Callable[[Sequence[Tensor]], Tensor]
    gradient: Callable[[Arrays], list[NDArray[np.float64]]]
    hessian_diagonal: Callable[[Arrays], list[NDArray[np.float64]]] | None = None
    separable: bool = False


def separable(shapes: Sequence[tuple[int, ...]] = ((3, 4), (5,), (2, 3, 2, 2))) -> Problem:
    """Σ a/2 (θ - c)² + log cosh θ over all entries: curvature between 0.5 and 3, and different from place to place.

    Its Hessian is diagonal, so that Hutchinson's estimate with Rademacher probes is exact whatever the probe.

    Example:
        >>> problem = separable()
        >>> [g.shape for g in problem.gradient(problem.start)]
        [(3, 4), (5,), (2, 3, 2, 2)]
    """
    rng = np.random.default_rng(0)
    start = tuple(rng.normal(size=shape) for shape in shapes)
    scale = [rng.uniform(0.5, 2.0, size=shape) for shape in shapes]
    centre = [rng.normal(size=shape) for shape in shapes]

    def loss(params: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=params[0].device)
        for p, a, c in zip(params, scale, centre, strict=True):
            aa, cc = (torch.as_tensor(v, dtype=p.dtype, device=p.device) for v in (a, c))
            total = total + (aa / 2 * (p - cc) ** 2 + nn.functional.softplus(2 * p) - p).sum()
        return total

    def gradient(params: Arrays) -> list[NDArray[np.float64]]:
        return [a * (p - c) + np.tanh(p) for p, a, c in zip(params, scale, centre, strict=True)]

    def hessian_diagonal(params: Arrays) -> list[NDArray[np.float64]]:
        return [a + 1 / np.cosh(p) ** 2 for p, a in zip(params, scale, strict=True)]

    return Problem(start, loss, gradient, hessian_diagonal, separable=True)


def check_optimizer(make: Callable[..., Optimizer], **tags: Any) -> None:
    """Run every conformance check of an optimizer; raises ``AssertionError`` naming the first that fails.

    Args:
        make: importable factory of (params, **options): the FSDP2 check hands it to other processes.
        tags: as in the module's table; ``oracle`` is needed.

    Example:
        >>> import torch
        >>> from corollary.testing import Case, checks
        >>> def oracle(problem, steps, lr=0.1):
        ...     params, path = list(problem.start), []
        ...     for _ in range(steps):
        ...         params = [p - lr * g for p, g in zip(params, problem.gradient(params))]
        ...         path.append(params)
        ...     return path
        >>> case = Case(torch.optim.SGD, {"oracle": oracle, "options": [{"lr": 0.1}]})
        >>> checks("optimizer")["trajectory"](case)  # one of them; check_optimizer(torch.optim.SGD, oracle=oracle) runs all
    """
    run_checks("optimizer", Case(make, tags))


# ---------------------------------------------------------------------------------------------------------------- helpers


def _problem(case: Case) -> Problem:
    problem = cast(Problem, case.tags.get("problem", separable)())
    assert len(problem.start) >= 2, "the case's problem must have two or more parameters"
    return problem


def _params(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    parameter = case.tags.get("parameter", nn.Parameter)
    return [parameter(torch.as_tensor(array).to(dtype, copy=True)) for array in _problem(case).start]


def _coupled(problem: Problem, params: Sequence[Tensor]) -> Tensor:
    """The problem's loss with every parameter's Hessian tied to every other's, so that random probes leave a trace."""
    return problem.loss(params) * (1 + 0.1 * torch.tanh(sum((p.mean() for p in params), torch.zeros(()))))


def _backward(case: Case, optimizer: Optimizer, loss: Tensor) -> None:
    backward = case.tags.get("backward")
    if backward is None:
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        backward(optimizer, loss)


def _advance(case: Case, optimizer: Optimizer, params: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """One step as the method takes it: backward and ``step()``, or the case's own ``step`` with a closure. Gives the loss."""
    optimizer.zero_grad()
    if "step" in case.tags:
        return torch.as_tensor(case.tags["step"](optimizer, params, loss))
    value = loss(params)
    _backward(case, optimizer, value)
    optimizer.step()
    return value


def _run(
    case: Case,
    optimizer: Optimizer,
    params: Sequence[Tensor],
    steps: int,
    loss: Callable[[Problem, Sequence[Tensor]], Tensor] = _coupled,
) -> list[float]:
    problem = _problem(case)
    return [float(_advance(case, optimizer, params, partial(loss, problem)).detach()) for _ in range(steps)]


def _plain(problem: Problem, params: Sequence[Tensor]) -> Tensor:
    return problem.loss(params)


def _copies(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def _same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    gaps = [float(((a - b).abs() / b.abs().clamp_min(1)).max()) for a, b in zip(left, right, strict=True) if a.numel()]
    return float("nan") if any(np.isnan(gaps)) else max(gaps)


def _tag(case: Case, name: str, default: str, allowed: Sequence[str]) -> str:
    value = case.tags.get(name, default)
    assert value in allowed, f"tag '{name}' is {value!r}; allowed: {', '.join(allowed)}"
    return str(value)


@contextmanager
def _refusing(what: str, *words: str) -> Iterator[None]:
    try:
        yield
    except _REFUSALS as error:
        if not any(word.lower() in str(error).lower() for word in words):
            raise AssertionError(f"the error for {what} does not name it: {error}") from error
        return
    raise AssertionError(f"{what} is tagged 'refused', but nothing was raised")


def _through_safetensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as it comes back from a safetensors file with JSON beside it: what survives without pickle."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value.clone().contiguous()
            else:
                ok = value is None or isinstance(value, (bool, int, float, str))
                assert ok, f"state '{key}' is a {type(value).__name__}: only tensors and plain values survive safetensors"
                numbers[f"{index}/{key}"] = value
    try:
        text = json.dumps([numbers, state["param_groups"]])
    except TypeError as error:
        raise AssertionError(f"a parameter group holds more than plain values: {error}") from error
    numbers, groups = json.loads(text)
    restored: dict[int, dict[str, Any]] = {int(index): {} for index in state["state"]}
    for name, value in {**safetensors.load(safetensors.save(tensors)), **numbers}.items():
        index, key = name.split("/", 1)
        restored[int(index)][key] = value
    return {"state": restored, "param_groups": groups}


# ----------------------------------------------------------------------------------------------------------------- checks


def trajectory(case: Case, steps: int = 12) -> None:
    """Every step in float64 equals the oracle's, for every option set."""
    assert "oracle" in case.tags, "tag 'oracle' is needed: without an independent reference nothing is checked"
    problem, tolerance = _problem(case), float(case.tags.get("tolerance", 1e-9))
    for options in case.tags.get("options", ({},)):
        params = _params(case)
        optimizer = case.make(params, **options)
        wanted = case.tags["oracle"](problem, steps, **options)
        for number, arrays in enumerate(wanted, start=1):
            _run(case, optimizer, params, 1, _plain)
            gap = _difference(_copies(params), [torch.as_tensor(a) for a in arrays])
            assert gap <= tolerance, f"step {number} is {gap:.2e} off the oracle with options {options}"


def resume(case: Case, before: int = 3, after: int = 4) -> None:
    """Saved and loaded mid-run, through safetensors and through ``copy.deepcopy``, the run goes on bit by bit."""
    for route in (_through_safetensors, copy.deepcopy):
        for dtype in case.tags.get("dtypes", (torch.float32, torch.float64, torch.bfloat16)):
            torch.manual_seed(0)
            whole = _params(case, dtype)
            _run(case, case.make(whole), whole, before + after)
            torch.manual_seed(0)
            half = _params(case, dtype)
            optimizer = case.make(half)
            _run(case, optimizer, half, before)
            state = route(optimizer.state_dict())
            torch.manual_seed(1)  # whoever draws from the global generator is found out here
            torch.rand(7)
            parameter = case.tags.get("parameter", nn.Parameter)
            rest = [parameter(p) for p in _copies(half)]
            resumed = case.make(rest, lr=1e-8)
            resumed.load_state_dict(state)
            _run(case, resumed, rest, after)
            assert _same(rest, whole), (
                f"resumed through {route.__name__.strip('_')} in {dtype}, the run differs from the whole one"
            )


def foreach(case: Case, steps: int = 5) -> None:
    """``foreach=True`` steps as ``foreach=False`` does, also with parameters of two dtypes."""
    if not case.tags.get("foreach", True):
        return
    for dtypes in ((torch.float64,), (torch.float32, torch.float64)):
        ends = []
        for flag in (True, False):
            torch.manual_seed(0)
            parameter = case.tags.get("parameter", nn.Parameter)
            params = [parameter(p.detach().to(dtypes[i % len(dtypes)])) for i, p in enumerate(_params(case))]
            _run(case, case.make(params, foreach=flag), params, steps)
            ends.append(params)
        gap = _difference(_copies(ends[0]), _copies(ends[1]))
        assert gap <= (1e-12 if len(dtypes) == 1 else 1e-5), f"foreach differs from the loop by {gap:.2e} on {dtypes}"


def param_groups(case: Case, steps: int = 4) -> None:
    """Each group keeps its own learning rate, one added mid-run joins in, and a scheduler's rate is obeyed."""
    problem = _problem(case)
    lr = float(case.make(_params(case)).param_groups[0]["lr"])
    if _tag(case, "groups", "works", ("works", "refused")) == "refused":
        _one_group(case)
        return
    if problem.separable:
        params = _params(case)
        optimizer = case.make([{"params": params[:1], "lr": lr / 2}, {"params": params[1:]}])
        _run(case, optimizer, params, steps, _plain)
        slow, fast = (case.tags["oracle"](problem, steps, lr=rate)[-1] for rate in (lr / 2, lr))
        gap = _difference(_copies(params), [torch.as_tensor(a) for a in (*slow[:1], *fast[1:])])
        assert gap <= float(case.tags.get("tolerance", 1e-9)), f"groups with two learning rates are {gap:.2e} off the oracle"
    params = _params(case)
    begin = _copies(params)
    optimizer = case.make([{"params": params[:1], "lr": 0.0}])
    _run(case, optimizer, params, 1)
    optimizer.add_param_group({"params": params[1:]})
    _run(case, optimizer, params, steps)
    assert _same(params[:1], begin[:1]), "a group with lr=0 moved"
    assert not any(torch.equal(p, b) for p, b in zip(params[1:], begin[1:], strict=True)), "an added group does not move"
    _obeys_scheduler(case, optimizer, params)


def _one_group(case: Case) -> None:
    """A second group is refused by name, at the start and mid-run, and the scheduler's rate is obeyed all the same."""
    params = _params(case)
    with _refusing("a second parameter group", "group"):
        case.make([{"params": params[:1]}, {"params": params[1:]}])
    optimizer = case.make(params)
    with _refusing("a parameter group added mid-run", "group"):
        optimizer.add_param_group({"params": _params(case)})
    assert len(optimizer.param_groups) == 1, "a refused group stays among the optimizer's groups"
    _obeys_scheduler(case, optimizer, params)


def _obeys_scheduler(case: Case, optimizer: Optimizer, params: list[Tensor]) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch == 0))
    _run(case, optimizer, params, 1)
    scheduler.step()
    stopped = _copies(params)
    _run(case, optimizer, params, 1)
    assert _same(params, stopped), "a scheduler set lr to 0, and the parameters moved on"


def closure(case: Case, steps: int = 3) -> None:
    """``step(closure)`` runs the closure with gradients enabled, gives back its loss, and steps as the plain form does."""
    problem = _problem(case)
    if "step" in case.tags:
        _needs_closure(case)
        return
    ends = []
    for form in ("plain", "closure"):
        torch.manual_seed(0)
        params = _params(case)
        optimizer = case.make(params)
        if form == "plain":
            _run(case, optimizer, params, steps)
        else:
            last: list[Tensor] = []

            def evaluate(optimizer: Optimizer = optimizer, params: list[Tensor] = params, last: list[Tensor] = last) -> Tensor:
                assert torch.is_grad_enabled(), "step(closure) calls the closure with gradients disabled"
                optimizer.zero_grad()
                loss = _coupled(problem, params)
                _backward(case, optimizer, loss)
                last[:] = [loss]
                return loss

            for _ in range(steps):
                given = cast(Any, optimizer.step(evaluate))
                assert last, "step(closure) never calls the closure"
                assert given is not None, "step(closure) does not give back the closure's loss"
                assert torch.equal(torch.as_tensor(given), last[0]), (
                    "step(closure) gives back another loss than the closure did"
                )
        ends.append(params)
    gap = _difference(_copies(ends[1]), _copies(ends[0]))
    assert gap <= 1e-12, f"step(closure) differs from backward and step by {gap:.2e}"


def _needs_closure(case: Case) -> None:
    """Without its closure a step is refused by name; with it, gradients are enabled and the loss before the step comes back."""
    params = _params(case)
    begin = _copies(params)
    optimizer = case.make(params)
    with _refusing("step() without its closure", "closure"):
        optimizer.step()
    assert _same(params, begin), "a refused step() without closure moved parameters"
    seen = []

    def evaluate(given: Sequence[Tensor]) -> Tensor:
        assert torch.is_grad_enabled(), "step(closure) calls the closure with gradients disabled"
        value = _coupled(_problem(case), given)
        seen.append(value.detach())
        return value

    with torch.no_grad():
        value = case.tags["step"](optimizer, params, evaluate)
    assert seen, "step(closure) never calls the closure"
    assert value is not None, "step(closure) does not give back the closure's loss"
    assert torch.equal(torch.as_tensor(value).detach(), seen[0]), "step(closure) gives back another loss than the closure did"


def none_gradients(case: Case) -> None:
    """Without any gradient a step does nothing; a frozen or unused parameter never moves and gets no state."""
    parameter = case.tags.get("parameter", nn.Parameter)
    params, unused, frozen = _params(case), _params(case)[0], parameter(_params(case)[0].detach())
    frozen.requires_grad_(False)
    begin = _copies([*params, unused, frozen])
    optimizer = case.make([*params, unused, frozen])
    if "step" not in case.tags:  # a closure always has a gradient
        optimizer.step()
    assert _same([*params, unused, frozen], begin), "a step without any gradient moved parameters"
    _run(case, optimizer, params, 3)
    assert _same([unused, frozen], begin[-2:]), "a parameter without gradient moved"
    assert not any(torch.equal(p, b) for p, b in zip(params, begin, strict=False)), "a parameter with gradient does not move"
    for p in (unused, frozen):
        assert not optimizer.state.get(p), "a parameter without gradient got state"


def empty(case: Case) -> None:
    """A parameter without entries changes nothing for the others."""
    if _tag(case, "empty", "works", ("works", "refused")) == "refused":
        with _refusing("a parameter without entries", "empty", "shape", "entries", "size"):
            hollow = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
            params = [*_params(case), hollow]
            _advance(case, case.make(params), params, lambda given: _plain(_problem(case), given[:-1]) + given[-1].sum())
        return
    ends = []
    for hollows in ([], [nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))]):
        torch.manual_seed(0)
        params = _params(case)
        optimizer = case.make([*params, *hollows])
        count = len(params)
        for _ in range(3):
            _advance(
                case,
                optimizer,
                [*params, *hollows],
                lambda given, count=count: _problem(case).loss(given[:count]) + sum(h.sum() for h in given[count:]),  # type: ignore[misc]
            )
        ends.append(params)
    assert _difference(_copies(ends[1]), _copies(ends[0])) <= 1e-12, "a parameter without entries changes the others' steps"


def dtypes(case: Case, steps: int = 8) -> None:
    """In every dtype the loss falls; parameters and state keep shape and dtype, and state is in the dtype that is promised."""
    half_state = _tag(case, "half_state", "param", ("param", "float32"))
    wide = case.tags.get("wide_state", ())
    for dtype in case.tags.get("dtypes", (torch.float32, torch.float64, torch.bfloat16)):
        params = _params(case, dtype)
        shapes = [(p.shape, p.dtype) for p in params]
        optimizer = case.make(params)
        first = _run(case, optimizer, params, 1)[0]
        signature = _state_signature(optimizer, params)
        _run(case, optimizer, params, steps)
        last = float(_coupled(_problem(case), params).detach())
        assert [(p.shape, p.dtype) for p in params] == shapes, f"a {dtype} parameter changed its shape or dtype"
        assert _state_signature(optimizer, params) == signature, (
            f"state of a {dtype} parameter changes its keys, shapes or dtypes"
        )
        wanted = torch.float32 if half_state == "float32" and dtype in (torch.float16, torch.bfloat16) else dtype
        for entries in signature:
            for key, (shape, kept) in entries.items():
                promised = torch.float64 if key in wide else wanted
                ok = not shape or not kept.is_floating_point or kept == promised
                assert ok, f"state '{key}' of a {dtype} parameter is {kept}, promised is {promised}"
        assert last < first, f"in {dtype} the loss does not fall: from {first:.4g} to {last:.4g} in {steps + 1} steps"


def _state_signature(optimizer: Optimizer, params: Sequence[Tensor]) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    return [
        {k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        if p in optimizer.state
        else {}
        for p in params
    ]


def nan_gradient(case: Case) -> None:
    """A NaN in one parameter's gradient does what the tag says, and never passes unseen."""
    does = _tag(case, "nan", "propagates", ("propagates", "raises", "skips"))
    params = _params(case)
    optimizer = case.make(params)
    _run(case, optimizer, params, 1)
    begin = _copies(params)

    def step() -> None:
        if "step" in case.tags:  # the gradient is made within the step; the loss stays finite

            def loss(given: Sequence[Tensor]) -> Tensor:
                first = given[0].clone()
                if first.requires_grad:
                    first.register_hook(  # type: ignore[no-untyped-call]
                        lambda g: torch.where(torch.arange(g.numel()).view_as(g) == 0, torch.nan, g)
                    )
                return _problem(case).loss([first, *given[1:]])

            case.tags["step"](optimizer, params, loss)
            return
        optimizer.zero_grad()
        _backward(case, optimizer, _problem(case).loss(params))
        for p in params[:1]:
            assert p.grad is not None, "the first parameter got no gradient"
            p.grad.view(-1)[0] = float("nan")
        optimizer.step()

    if does == "raises":
        with _refusing("a NaN gradient", "nan", "finite"):
            step()
        assert _same(params, begin), "a step refused for its NaN gradient moved parameters"
        return
    step()
    if does == "skips":
        assert _same(params, begin), "a step with a NaN gradient is promised to be skipped, and moved parameters"
        return
    assert params[0].isnan().any(), "a NaN gradient is promised to show in its parameter, and does not"
    assert all(p.isfinite().all() for p in params[1:]), "a NaN gradient spreads to other parameters"


def arguments(case: Case) -> None:
    """A negative learning rate and an empty list of parameters raise ``ValueError``."""
    calls: tuple[tuple[str, tuple[str, ...], Callable[[], Optimizer]], ...] = (
        ("lr=-1", ("lr", "learning rate"), lambda: case.make(_params(case), lr=-1.0)),
        ("params=[]", ("param",), lambda: case.make([])),
    )
    for what, words, call in calls:
        try:
            call()
        except ValueError as error:
            if not any(word in str(error).lower() for word in words):
                raise AssertionError(f"the error for {what} does not name it: {error}") from error
        else:
            raise AssertionError(f"{what} raises no ValueError")


def sparse(case: Case) -> None:
    """Sparse gradients work or are refused, as tagged."""
    works = _tag(case, "sparse", "refused", ("works", "refused")) == "works"
    table = nn.Parameter(torch.ones(4, 3))
    begin = table.detach().clone()

    def step() -> None:
        rows = torch.tensor([0, 2])
        _advance(
            case, case.make([table]), [table], lambda given: (nn.functional.embedding(rows, given[0], sparse=True) ** 2).sum()
        )

    if not works:
        with _refusing("a sparse gradient", "sparse", "dense"):
            step()
        return
    step()
    moved = (table.detach() != begin).any(1).tolist()
    assert moved == [True, False, True, False], f"a sparse gradient of rows 0 and 2 moved rows {moved}"


def complex_params(case: Case) -> None:
    """Complex parameters work or are refused, as tagged."""
    works = _tag(case, "complex", "refused", ("works", "refused")) == "works"
    param = nn.Parameter(torch.tensor([1.0 + 1.0j, -2.0j]))

    def step() -> None:
        _advance(case, case.make([param]), [param], lambda given: (given[0].abs() ** 2).sum())

    if not works:
        with _refusing("a complex parameter", "complex"):
            step()
        return
    before = float(param.detach().abs().square().sum())
    step()
    assert float(param.detach().abs().square().sum()) < before, "a step on a complex parameter does not lower its loss"


def compiled(case: Case, steps: int = 3) -> None:
    """``torch.compile(optimizer.step)`` steps as the eager one does, within float32's rounding."""
    torch.compiler.reset()  # what was compiled before counts against the recompile limit
    ends = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        params = _params(case, torch.float32)
        optimizer = case.make(params)
        if compile_it:
            optimizer.step = torch.compile(optimizer.step)
        _run(case, optimizer, params, steps)
        ends.append(params)
    gap = _difference(_copies(ends[1]), _copies(ends[0]))
    assert gap <= 1e-4, f"the compiled step differs from the eager one by {gap:.2e}"


def fsdp2(case: Case, seconds: float = 120.0) -> None:
    """On 2 gloo processes under ``fully_shard`` it trains as on one process, or refuses with an error that names DTensor."""
    works = _tag(case, "fsdp2", "works", ("works", "refused")) == "works"
    own = {name: case.tags[name] for name in ("backward", "step") if name in case.tags}
    try:
        pickle.dumps((case.make, own))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"'make', 'backward' and 'step' must be importable, for the other process to find them: {error}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(  # type: ignore[no-untyped-call]
            _fsdp2_worker, (f"file://{Path(folder) / 'store'}", case.make, own, works), nprocs=2, join=False
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=5):
                assert time.monotonic() < deadline, f"the 2 processes did not finish within {seconds:g} s"
        except ProcessRaisedException as error:
            raise AssertionError(str(error).strip().splitlines()[-1]) from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()


def _fsdp2_worker(rank: int, store: str, make: Callable[..., Optimizer], own: dict[str, Any], works: bool) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        sharded = copy.deepcopy(alone)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        x, y = torch.randn(8, 6), torch.randn(8, 4)
        mine = slice(rank * 4, rank * 4 + 4)
        case = Case(make, own)

        def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
            torch.manual_seed(1)
            optimizer = make(model.parameters())
            for _ in range(3):
                optimizer.zero_grad()
                if "step" in own:
                    own["step"](optimizer, list(model.parameters()), lambda _: nn.functional.mse_loss(model(x), y))
                else:  # no name for the loss: a graph that outlives its backward pass can abort a process that leaves
                    _backward(case, optimizer, nn.functional.mse_loss(model(x), y))
                    optimizer.step()

        if not works:
            with _refusing("a sharded parameter", "DTensor"):
                train(sharded, x[mine], y[mine])
            return
        train(alone, x, y)
        train(sharded, x[mine], y[mine])
        whole = [cast(DTensor, p).full_tensor() for p in sharded.parameters()]
        gap = _difference(_copies(whole), _copies(list(alone.parameters())))
        assert gap <= 1e-5, f"sharded over 2 processes, the parameters differ from one process's by {gap:.2e}"
    finally:
        distributed.destroy_process_group()


CHECKS: dict[str, Check] = {
    "trajectory": trajectory,
    "resume": resume,
    "foreach": foreach,
    "param_groups": param_groups,
    "closure": closure,
    "none_gradients": none_gradients,
    "empty": empty,
    "dtypes": dtypes,
    "nan_gradient": nan_gradient,
    "arguments": arguments,
    "sparse": sparse,
    "complex_params": complex_params,
    "compiled": compiled,
    "fsdp2": fsdp2,
}
