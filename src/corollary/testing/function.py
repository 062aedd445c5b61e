"""Conformance checks of plain functions from tensors to tensors.

A case's ``make()`` gives the function. Its tags:

==================  =========================================================================================
``inputs``          required: ``inputs(generator, dtype)`` draws the positional arguments of one sample
``batched``         whether tensors with one more leading dimension give the samples' results, stacked; default True
``dtypes``          floating dtypes it takes; default float16, bfloat16, float32 and float64
``precision``       dtype to allowed error relative to float64; default 5e-2, 1e-2, 1e-4 and 1e-10 as for layers
``differentiable``  whether gradients equal finite differences; default True
``bad``             name to arguments that must be refused, beyond the integers, NaN and emptiness tried on every tensor
``empty``           whether a tensor without rows is refused; default True
==================  =========================================================================================
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_leaves

from corollary.testing.case import Case, Check, run_checks
from corollary.testing.layer import _PRECISION, _distance, _refused


def _draw(case: Case, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Any]:
    return list(case.tags["inputs"](torch.Generator().manual_seed(seed), dtype))


def _call(case: Case, inputs: list[Any]) -> list[Tensor]:
    leaves = tree_leaves(case.make()(*inputs))
    assert leaves, "the function gave nothing"
    assert all(isinstance(leaf, Tensor) for leaf in leaves), f"the function gave {[type(leaf).__name__ for leaf in leaves]}"
    return leaves


def _floating(inputs: list[Any]) -> list[int]:
    return [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]


def random_state() -> tuple[Any, ...]:
    """The global random states that a component has to leave as they were, comparable with ``==``."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy global state is the one that must not move
    return (torch.get_rng_state().tolist(), name, np.asarray(keys).tolist(), rest, random.getstate())


def finite(case: Case) -> None:
    """Ordinary inputs give finite results."""
    for i, out in enumerate(_call(case, _draw(case))):
        assert out.isfinite().all(), f"result {i} is not finite for ordinary inputs"


def precision(case: Case) -> None:
    """Every promised dtype gives a floating result near the one in float64, which stays float64."""
    for dtype in case.tags.get("dtypes", (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        inputs = _draw(case, dtype)
        # The true result is that of the rounded inputs, so that only the function's own rounding is measured.
        true = _call(case, [x.double() if i in _floating(inputs) else x for i, x in enumerate(inputs)])
        allowed = {**_PRECISION, **case.tags.get("precision", {})}[dtype]
        for i, (ours, exact) in enumerate(zip(_call(case, inputs), true, strict=True)):
            stays = dtype != torch.float64 or not ours.is_floating_point() or ours.dtype == torch.float64
            assert stays, f"result {i}: float64 inputs gave {ours.dtype}"
            error = _distance(ours, exact)
            assert error <= allowed, f"result {i}, {dtype}: relative error {error:.2e} against float64, allowed {allowed:.0e}"


def batch(case: Case) -> None:
    """A leading dimension of samples gives what each sample gives by itself."""
    if not case.tags.get("batched", True):
        return
    samples = [_draw(case, seed=seed) for seed in (1, 2, 3)]
    stacked = [torch.stack(xs) if isinstance(xs[0], Tensor) else xs[0] for xs in zip(*samples, strict=True)]
    singles = [_call(case, sample) for sample in samples]
    for i, out in enumerate(_call(case, stacked)):
        assert len(out) == 3, f"result {i} of 3 samples has shape {tuple(out.shape)}"
        error = _distance(out, torch.stack([single[i] for single in singles]))
        assert error < 1e-9, f"result {i} of a batch differs from the samples' own by {error:.1e}"


def determinism(case: Case) -> None:
    """The same inputs give the same bits, and the global random states stay as they were."""
    before = random_state()
    first, second = _call(case, _draw(case)), _call(case, _draw(case))
    assert random_state() == before, "a global random state moved"
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {i} differs between two calls"


def inputs_unchanged(case: Case) -> None:
    """No input is written to, whether or not it requires gradients."""
    for tracked in (False, True):
        inputs = _draw(case)
        given = [(x.requires_grad_() * 1 if tracked and i in _floating(inputs) else x) for i, x in enumerate(inputs)]
        tensors = {i: (x, x.detach().clone(), x._version) for i, x in enumerate(given) if isinstance(x, Tensor)}
        _call(case, given)
        for i, (x, copy, version) in tensors.items():
            assert torch.equal(x, copy), f"input {i} was changed in place"
            assert x._version == version, f"input {i} was written to in place"


def strides(case: Case) -> None:
    """Inputs that are not contiguous give the same results."""
    inputs = _draw(case)
    strided = [x.mT.contiguous().mT if isinstance(x, Tensor) and x.ndim > 1 else x for x in inputs]
    for i, (ours, true) in enumerate(zip(_call(case, strided), _call(case, inputs), strict=True)):
        assert _distance(ours, true) < 1e-9, f"result {i} depends on how the inputs lie in memory"


def gradient(case: Case) -> None:
    """Gradients in the floating inputs equal finite differences in float64."""
    if not case.tags.get("differentiable", True):
        return
    inputs = _draw(case)
    places = _floating(inputs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, tensors, strict=True))
        return tuple(o for o in _call(case, [given.get(i, x) for i, x in enumerate(inputs)]) if o.is_floating_point())

    try:
        torch.autograd.gradcheck(call, tuple(inputs[i].requires_grad_() for i in places), fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(str(error).strip().splitlines()[0]) from error


def nan_input(case: Case) -> None:
    """One NaN is refused with a message that says so, or shows in the result; it never vanishes."""
    for i in _floating(_draw(case)):
        inputs = _draw(case)
        inputs[i].reshape(-1)[-1:].fill_(torch.nan)
        said = None
        try:
            shows = any(leaf.isnan().any() for leaf in _call(case, inputs))
        except ValueError as error:
            said = str(error)
            shows = "nan" in said.lower() or "finite" in said
        assert shows, f"NaN in input {i}: " + (f"the error does not say so: {said}" if said else "it vanished from the result")


def bad_input(case: Case) -> None:
    """Integers, emptiness and what the case names as bad end in a ValueError or TypeError that says what came."""
    for i in _floating(_draw(case)):
        inputs = _draw(case)
        whole, inputs[i] = inputs[i], inputs[i].to(torch.int64)
        _refused(lambda inputs=inputs: case.make()(*inputs), f"int64 as input {i}", ("int64",))  # type: ignore[misc]
        if case.tags.get("empty", True) and whole.ndim > 1:
            inputs[i] = whole[..., :0, :]
            _refused(lambda inputs=inputs: case.make()(*inputs), f"no rows in input {i}", ("0", "empty"))  # type: ignore[misc]
    for name, arguments in case.tags.get("bad", {}).items():
        _refused(lambda arguments=arguments: case.make()(*arguments), name)  # type: ignore[misc]


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        finite, precision, batch, determinism, inputs_unchanged, strides, gradient, nan_input, bad_input,
    )
}  # fmt: skip


def check_function(make: Callable[[], Callable[..., Any]], **tags: Any) -> None:
    """Run every check of this module on the function that ``make()`` gives.

    Args:
        make: gives the function.
        **tags: what the function takes and promises; see the module's table. ``inputs`` is required.

    Raises:
        AssertionError: names the first check that fails and why.
        ValueError: ``inputs`` is missing.

    Example:
        >>> def norm(x):
        ...     if not x.is_floating_point() or 0 in x.shape:
        ...         raise ValueError(f"'x' is {x.dtype} of shape {tuple(x.shape)}; allowed: floating, not empty")
        ...     return x.square().sum((-2, -1)).sqrt()
        >>> check_function(lambda: norm, inputs=lambda g, dtype: (torch.randn(4, 3, generator=g, dtype=dtype),))
    """
    if "inputs" not in tags:
        raise ValueError("check_function needs the tag 'inputs': a function of (generator, dtype) that draws the arguments")
    run_checks("function", Case(make, tags))
