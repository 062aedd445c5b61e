"""Conformance checks of losses: an ``nn.Module`` with ``reduction``, and a function that does the same.

``make(**arguments)`` gives the module; it must take ``reduction``. Tags:

===================  =============================================================================  ==================
tag                  what it says                                                                   without it
===================  =============================================================================  ==================
``function``         the functional form, called as ``function(*arguments, reduction=...)``; bind    not compared
                     other arguments with ``functools.partial``
``inputs``           how many leading arguments are differentiable and shaped (N, C)                1
``example``          ``(generator, dtype) -> arguments`` of one batch, at least 4 samples, the      normal logits
                     differentiable inputs first, the target last                                   (6, 5), indices (6,)
``classes``          the target holds class indices                                                 True
``separate``         a sample's loss does not depend on the other samples of the batch              True
``spatial``          inputs (N, C, d1, ...) are taken                                               False
``probabilities``    targets may be probabilities shaped like the logits                            False
``extreme``          magnitude of the inputs at which loss and gradient must still be finite        1e4
===================  =============================================================================  ==================

With ``classes=False`` the target is left alone; with ``separate=False`` the order of the batch may matter only as a permutation
of a reduced loss, and single samples are not compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corollary.testing.case import Case, Check, run_checks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
# Rounding of one operation, times what a loss of a handful of classes adds up.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5, torch.float64: 1e-12}


def _logits(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _example(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given: Callable[[torch.Generator, torch.dtype], Any] | None = case.tags.get("example")
    if given is not None:
        return list(given(generator, dtype))
    inputs = [_logits((6, 5), generator, dtype) for _ in range(case.tags.get("inputs", 1))]
    return [*inputs, torch.randint(5, (6,), generator=generator)]


def _classes(case: Case) -> bool:
    return bool(case.tags.get("classes", True))


def _separate(case: Case) -> bool:
    return bool(case.tags.get("separate", True))


def _count(case: Case) -> int:
    return int(case.tags.get("inputs", 1))


def _with_gradient(case: Case, arguments: list[Tensor]) -> list[Tensor]:
    count = _count(case)
    return [a.detach().clone().requires_grad_() for a in arguments[:count]] + arguments[count:]


def _gradients(case: Case, module: nn.Module, arguments: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = _with_gradient(case, arguments)
    loss = module(*leaves)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves[: _count(case)])


def _close(left: Tensor, right: Tensor, what: str, dtype: torch.dtype = torch.float64) -> None:
    tolerance = _TOLERANCE[dtype]
    assert left.shape == right.shape, f"{what}: shape {tuple(left.shape)} against {tuple(right.shape)}"
    gap = (left.double() - right.double()).abs()
    assert bool((gap <= tolerance * (1 + right.double().abs())).all()), f"{what}: they differ by {float(gap.max()):.3g}"


def _refuses(call: Callable[[], Any], what: str, *names: str) -> None:
    """``call`` must raise ``ValueError`` or ``TypeError`` with a message that names one of ``names``."""
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
        assert any(name in message for name in names), f"{what}: the message names none of {names}: {message}"
    except Exception as error:  # whatever else comes up is what the check reports
        raise AssertionError(f"{what}: must be a ValueError or TypeError, not {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"{what}: no error")


def check_function_agrees(case: Case) -> None:
    """Module and function give the same for each reduction."""
    function = case.tags.get("function")
    if function is None:
        return
    arguments = _example(case)
    for reduction in REDUCTIONS:
        _close(case.make(reduction=reduction)(*arguments), function(*arguments, reduction=reduction), f"reduction {reduction}")


def check_reductions(case: Case) -> None:
    """``none`` gives one value per sample, ``sum`` their sum, ``mean`` their mean (and the default); others are refused."""
    arguments = _example(case)
    none, mean, total = (case.make(reduction=reduction)(*arguments) for reduction in REDUCTIONS)
    samples = arguments[-1].shape if _classes(case) else none.shape
    assert none.shape == samples != (), f"none: shape {tuple(none.shape)}, expected {tuple(samples)}"
    assert mean.shape == total.shape == (), f"mean and sum must be scalars, got {tuple(mean.shape)}, {tuple(total.shape)}"
    _close(mean, none.mean(), "mean against the mean of none")
    _close(total, none.sum(), "sum against the sum of none")
    _close(case.make()(*arguments), mean, "the default against mean")
    _refuses(lambda: case.make(reduction="average")(*arguments), "reduction 'average'", "reduction")


def check_gradient(case: Case) -> None:
    """The gradient agrees with finite differences in float64."""
    arguments, count, module = _example(case), _count(case), case.make(reduction="sum")
    inputs = tuple(a.clone().requires_grad_() for a in arguments[:count])
    try:
        torch.autograd.gradcheck(lambda *values: module(*values, *arguments[count:]), inputs)
    except RuntimeError as error:  # GradcheckError is one
        raise AssertionError(str(error)) from error


def check_finite_at_extremes(case: Case) -> None:
    """Loss and gradient are finite for inputs of magnitude ``extreme`` (1e4), and for all-equal inputs, in every dtype."""
    extreme = float(case.tags.get("extreme", 1e4))
    for dtype in DTYPES:
        for fill in (extreme, -extreme, 0.0):
            for seed in range(3):
                arguments = _example(case, dtype, seed)
                for i in range(_count(case)):
                    # Alternating signs pull the classes of one sample to both ends; equal entries are the other extreme.
                    sign = arguments[i].sign() if seed else torch.ones_like(arguments[i])
                    arguments[i] = (sign * fill).to(dtype)
                loss, gradients = _gradients(case, case.make(reduction="none"), arguments)
                assert bool(loss.isfinite().all()), f"{dtype}, inputs of {fill:g}: loss {loss.tolist()}"
                for gradient in gradients:
                    assert bool(gradient.isfinite().all()), f"{dtype}, inputs of {fill:g}: gradient is not finite"


def check_dtypes(case: Case) -> None:
    """Loss and gradient keep the input's dtype and lie near float64's, for moderate inputs."""
    module = case.make(reduction="none")
    for dtype in DTYPES:
        arguments = _example(case, dtype)
        loss, gradients = _gradients(case, module, arguments)
        assert loss.dtype == dtype, f"loss of {dtype} inputs is {loss.dtype}"
        assert all(g.dtype == dtype for g in gradients), f"gradient of {dtype} inputs is {[g.dtype for g in gradients]}"
        wide = [a.double() if a.is_floating_point() else a for a in arguments]
        exact, slopes = _gradients(case, module, wide)
        _close(loss, exact, f"loss in {dtype}", dtype)
        for gradient, slope in zip(gradients, slopes, strict=True):
            _close(gradient, slope, f"gradient in {dtype}", dtype)


def check_device(case: Case) -> None:
    """The loss lives on the inputs' device: the meta device everywhere, and a GPU where there is one."""
    for name in ("meta", *(("cuda",) if torch.cuda.is_available() else ())):
        device = torch.device(name)
        arguments = [a.to(device) for a in _example(case, torch.float32)]
        try:
            loss = case.make().to(device)(*arguments)
        except (RuntimeError, NotImplementedError) as error:
            raise AssertionError(f"fails on {name}, so something is bound to the CPU or reads values: {error}") from error
        assert loss.device.type == name, f"loss of inputs on {name} is on {loss.device}"


def check_inputs_unchanged(case: Case) -> None:
    """Neither forward nor backward writes into the arguments."""
    arguments = _example(case)
    before = [a.clone() for a in arguments]
    leaves = _with_gradient(case, arguments)
    case.make()(*leaves).backward()
    for i, (now, leaf, was) in enumerate(zip(arguments, leaves, before, strict=True)):
        same = torch.equal(now, was) and torch.equal(leaf.detach(), was)
        assert same, f"argument {i} was changed in place"


def check_order_of_batch(case: Case) -> None:
    """Permuting the batch permutes the losses; a part of the batch has the losses of that part."""
    arguments = _example(case)
    n = len(arguments[0])
    order = torch.arange(n - 1, -1, -1)
    shuffled = [a[order] for a in arguments]
    _close(case.make(reduction="sum")(*shuffled), case.make(reduction="sum")(*arguments), "sum of the permuted batch")
    if _separate(case):
        module = case.make(reduction="none")
        whole = module(*arguments)
        _close(module(*shuffled), whole[order], "losses of the permuted batch")
        _close(module(*[a[: n // 2] for a in arguments]), whole[: n // 2], "losses of half the batch")


def check_memory_layout(case: Case) -> None:
    """Transposed and expanded inputs give what contiguous ones give."""
    arguments, count = _example(case), _count(case)
    module = case.make(reduction="none")
    strided = [a.mT.contiguous().mT if a.ndim > 1 else a.repeat_interleave(2)[::2] for a in arguments]
    _close(module(*strided), module(*arguments), "strided inputs")
    same = [a[:1].expand_as(a) for a in arguments[:count]] + arguments[count:]
    _close(module(*same), module(*[a.contiguous() for a in same]), "expanded inputs")


def check_spatial(case: Case) -> None:
    """(N, C, d1, d2) gives, place by place, what (N, C) gives."""
    if not case.tags.get("spatial", False):
        return
    generator, count = torch.Generator().manual_seed(1), _count(case)
    inputs = [_logits((2, 5, 3, 4), generator, torch.float64) for _ in range(count)]
    target = torch.randint(5, (2, 3, 4), generator=generator)
    module = case.make(reduction="none")
    flat = module(*[i.movedim(1, -1).reshape(-1, 5) for i in inputs], target.reshape(-1))
    _close(module(*inputs, target), flat.view(2, 3, 4), "spatial inputs")


def check_probabilities(case: Case) -> None:
    """One-hot probabilities give what indices give, and the loss is linear in the probabilities."""
    if not case.tags.get("probabilities", False):
        return
    *inputs, target = _example(case)
    module, classes = case.make(reduction="none"), inputs[0].shape[1]
    hard = nn.functional.one_hot(target, classes).double()
    other = hard.roll(1, dims=1)
    _close(module(*inputs, hard), module(*inputs, target), "one-hot against indices")
    mixed = 0.25 * module(*inputs, hard) + 0.75 * module(*inputs, other)
    _close(module(*inputs, 0.25 * hard + 0.75 * other), mixed, "mixture of two targets")


def check_refuses_wrong_classes(case: Case) -> None:
    """A class out of range, a target of wrong shape or dtype and integer inputs are refused by name."""
    if not _classes(case):
        return
    *inputs, target = _example(case)
    classes, module = inputs[0].shape[1], case.make()
    for bad in (classes, classes + 7, -1):
        wrong = target.clone()
        wrong[0] = bad
        _refuses(lambda wrong=wrong: module(*inputs, wrong), f"class {bad} of {classes}", "target")  # type: ignore[misc]
    _refuses(lambda: module(*inputs, target[:-1]), "one target too few", "target")
    _refuses(lambda: module(*inputs, target.unsqueeze(1)), "target with one dimension too many", "target")
    _refuses(lambda: module(*inputs, target.to(torch.int32)), "target of int32", "target")
    _refuses(lambda: module(*[i.long() for i in inputs], target), "integer inputs", "logits", "input")


def check_refuses_empty(case: Case) -> None:
    """An empty batch is refused: its mean is not a number."""
    arguments = [a[:0] for a in _example(case)]
    _refuses(lambda: case.make()(*arguments), "empty batch", "empty")


def check_nan_is_seen(case: Case) -> None:
    """NaN in one sample's inputs is refused or comes out as NaN, never as a number; the other samples keep their loss."""
    arguments, module = _example(case), case.make(reduction="none")
    clean = module(*arguments)
    for i in range(_count(case)):
        broken = [a.clone() for a in arguments]
        broken[i][0] = torch.nan
        try:
            loss = module(*broken)
        except ValueError:
            continue
        assert bool(loss[0].isnan().all()), f"NaN in argument {i} gives {loss[0].tolist()}"
        if _separate(case):
            _close(loss[1:], clean[1:], "losses of the other samples")


def check_compiles(case: Case) -> None:
    """``torch.compile`` takes it as one graph and gives the same loss and gradient."""
    module, arguments = case.make(), _example(case, torch.float32)
    loss, gradients = _gradients(case, module, arguments)
    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
        again, slopes = _gradients(case, compiled, arguments)
    except Exception as error:  # dynamo raises many types; each of them is the failure
        raise AssertionError(f"does not compile as one graph: {type(error).__name__}: {error}") from error
    finally:
        torch.compiler.reset()
    _close(again, loss, "compiled loss", torch.float32)
    for gradient, slope in zip(gradients, slopes, strict=True):
        _close(slope, gradient, "compiled gradient", torch.float32)


def check_vmap(case: Case) -> None:
    """``torch.func.vmap`` over stacked batches gives each batch's loss (seeds trained side by side need it)."""
    batches = [_example(case, seed=seed) for seed in range(3)]
    module = case.make()
    stacked = [torch.stack(values) for values in zip(*batches, strict=True)]
    try:
        together = torch.func.vmap(module)(*stacked)
    except RuntimeError as error:
        raise AssertionError(f"vmap fails: {error}") from error
    _close(together, torch.stack([module(*batch) for batch in batches]), "stacked batches")


def check_state_and_repr(case: Case) -> None:
    """The state is tensors alone and loads into a twin; a copy gives the same loss; ``repr`` shows the reduction."""
    module, arguments = case.make(reduction="sum"), _example(case)
    state = module.state_dict()
    assert all(isinstance(v, Tensor) for v in state.values()), f"state_dict holds {[type(v).__name__ for v in state.values()]}"
    twin = case.make(reduction="sum")
    twin.load_state_dict(state)
    _close(twin(*arguments), module(*arguments), "loss after loading the state")
    _close(copy.deepcopy(module)(*arguments), module(*arguments), "loss of a copy")
    text = repr(module)
    for part in (type(module).__name__, "sum"):
        assert part in text, f"repr does not show '{part}': {text}"


CHECKS: Mapping[str, Check] = {
    "function_agrees": check_function_agrees,
    "reductions": check_reductions,
    "gradient": check_gradient,
    "finite_at_extremes": check_finite_at_extremes,
    "dtypes": check_dtypes,
    "device": check_device,
    "inputs_unchanged": check_inputs_unchanged,
    "order_of_batch": check_order_of_batch,
    "memory_layout": check_memory_layout,
    "spatial": check_spatial,
    "probabilities": check_probabilities,
    "refuses_wrong_classes": check_refuses_wrong_classes,
    "refuses_empty": check_refuses_empty,
    "nan_is_seen": check_nan_is_seen,
    "compiles": check_compiles,
    "vmap": check_vmap,
    "state_and_repr": check_state_and_repr,
}


def check_loss(make: Callable[..., Any], **tags: Any) -> None:
    """Run every check of losses on a factory; raises ``AssertionError`` naming the first that fails.

    Args:
        make: gives the module; it must take ``reduction``.
        **tags: what the loss promises; see `corollary.testing.loss`.

    Example:
        >>> import torch
        >>> from corollary.losses import CompSumLoss, comp_sum_loss
        >>> from corollary.testing import check_loss
        >>> check_loss(CompSumLoss, function=comp_sum_loss, spatial=True, probabilities=True)
    """
    run_checks("loss", Case(make, tags))
