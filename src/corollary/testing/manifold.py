"""Conformance checks of manifolds: any `corollary.linalg.Manifold`.

A case's ``make()`` builds the manifold. Its tags:

===============  =============================================================================================
``batches``      batch shapes to try; default ``((), (5,), (2, 3))``
``dtypes``       floating dtypes it promises; default float32 and float64 (the theorems are always checked in float64)
``gauge``        where several tensors are the same point: ``gauge(manifold, generator, dtype)`` draws a function that
                 maps points and tangent vectors to other representatives; default none
``equivariant``  whether ``retract`` gives ``gauge`` of its result for ``gauge`` of its arguments; default True (without it,
                 only the distance of the two results must vanish)
``injectivity``  length of tangent vectors up to which the distance to ``exp`` must be the length; default 1.0
===============  =============================================================================================

``exp`` and ``distance`` are checked where the manifold defines them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from corollary.linalg.manifolds import Manifold
from corollary.testing.case import Case, Check, run_checks

_F64 = torch.float64


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(manifold: Manifold, batch: tuple[int, ...] = (5,), seed: int = 0, dtype: torch.dtype = _F64) -> tuple[Tensor, Tensor]:
    """Points, and tangent vectors of unit length at them."""
    generator = _generator(seed)
    x = manifold.random_point(*batch, generator=generator, dtype=dtype)
    v = manifold.random_tangent(x, generator=generator)
    return x, _scaled(manifold, x, v, 1.0)


def _scaled(manifold: Manifold, x: Tensor, v: Tensor, length: float) -> Tensor:
    norm = manifold.inner(x, v, v).sqrt().clamp_min(1e-30)
    return v * (length / norm).reshape(*norm.shape, *[1] * len(manifold.point_shape))


def _worst(difference: Tensor) -> float:
    return float(difference.detach().abs().max()) if difference.numel() else 0.0


def _on(manifold: Manifold, x: Tensor, tolerance: float, what: str) -> None:
    off = _worst(manifold.normalize(x) - x)
    assert off <= tolerance, f"{what} is {off:.1e} off the manifold, allowed is {tolerance:.1e}"


def _has(manifold: Manifold, name: str) -> bool:
    """Whether a member that may be left out is there: the base class's own raises."""
    x, v = _draw(manifold, (1,))
    try:
        getattr(manifold, name)(x, v if name == "exp" else x)
    except NotImplementedError:
        return False
    return True


def _batches(case: Case) -> tuple[tuple[int, ...], ...]:
    batches: tuple[tuple[int, ...], ...] = case.tags.get("batches", ((), (5,), (2, 3)))
    return batches


def shapes(case: Case) -> None:
    """Every operation keeps batch shape, point shape and dtype; an empty batch passes through."""
    manifold: Manifold = case.make()
    for batch in (*_batches(case), (0,)):
        for dtype in case.tags.get("dtypes", (torch.float32, _F64)):
            x = manifold.random_point(*batch, generator=_generator(), dtype=dtype)
            v = manifold.random_tangent(x, generator=_generator(1))
            y = manifold.retract(x, v)
            given = {"random_point": x, "random_tangent": v, "retract": y, "transport": manifold.transport(x, y, v)}
            given |= {"gradient": manifold.gradient(x, v), "normalize": manifold.normalize(x)}
            for name, tensor in given.items():
                wanted = (*batch, *manifold.point_shape)
                assert tuple(tensor.shape) == wanted, f"{name}: shape {tuple(tensor.shape)}, expected {wanted}"
                assert tensor.dtype == dtype, f"{name}: {tensor.dtype} for {dtype}"
            assert tuple(manifold.inner(x, v, v).shape) == batch, f"inner: one number for each point expected for batch {batch}"


def batching(case: Case) -> None:
    """A batch gives what its points give alone."""
    manifold: Manifold = case.make()
    x, v = _draw(manifold)
    for name, of in (("project", manifold.project), ("retract", manifold.retract)):
        together = of(x, v)
        alone = torch.stack([of(a, b) for a, b in zip(x, v, strict=True)])
        assert _worst(together - alone) < 1e-12, (
            f"{name}: a batch differs from its points alone by {_worst(together - alone):.1e}"
        )


def seeded(case: Case) -> None:
    """``random_point`` follows its generator, and gives points that ``check_point`` takes in every dtype."""
    manifold: Manifold = case.make()
    first, again = (manifold.random_point(4, generator=_generator(3), dtype=_F64) for _ in range(2))
    assert torch.equal(first, again), "the same generator gives two points"
    other = manifold.random_point(4, generator=_generator(4), dtype=_F64)
    assert not torch.equal(first, other), "another generator gives the same point"
    for dtype in case.tags.get("dtypes", (torch.float32, _F64)):
        manifold.check_point(manifold.random_point(4, generator=_generator(3), dtype=dtype))


def refusals(case: Case) -> None:
    """``check_point`` refuses another shape, another kind of number, NaN, and what is off the manifold, and says so."""
    manifold: Manifold = case.make()
    x = manifold.random_point(3, generator=_generator(), dtype=_F64)
    bad: list[tuple[str, Tensor, type[Exception]]] = [("int64", torch.ones(x.shape, dtype=torch.int64), TypeError)]
    bad.append(("NaN", x * torch.nan, ValueError))
    if manifold.point_shape:
        bad.append((str(x.shape[-1] + 1), torch.cat([x, x[..., :1]], -1), ValueError))
        doubled = 2 * x
        if _worst(manifold.normalize(doubled) - doubled) > 1e-6:
            bad.append(("away", doubled, ValueError))
    for word, tensor, kind in bad:
        message = None
        try:
            manifold.check_point(tensor)
        except kind as error:
            message = str(error)
        assert message is not None, f"check_point takes a tensor that it must refuse ({word})"
        assert word in message, f"the message does not say '{word}': {message}"


def projection(case: Case) -> None:
    """The projection is linear, idempotent, and self-adjoint, so that what it removes is orthogonal to the tangent space."""
    manifold: Manifold = case.make()
    x, _ = _draw(manifold)
    u, v = (torch.randn(x.shape, generator=_generator(seed), dtype=_F64) for seed in (5, 6))
    pu, pv = manifold.project(x, u), manifold.project(x, v)
    assert _worst(manifold.project(x, pu) - pu) < 1e-12, "projecting twice is not projecting once"
    assert _worst(manifold.project(x, u - 3 * v) - (pu - 3 * pv)) < 1e-12, "the projection is not linear"
    dims = tuple(range(1, x.ndim))
    gap = (pu * v).sum(dims) - (u * pv).sum(dims) if dims else pu * v - u * pv
    assert _worst(gap) < 1e-11, f"the projection is not self-adjoint: {_worst(gap):.1e}"


def tangency(case: Case) -> None:
    """Projected vectors are velocities of curves on the manifold: x + tv is off the manifold by O(t²) alone."""
    manifold: Manifold = case.make()
    x, v = _draw(manifold)
    offs = [_worst(manifold.normalize(x + t * v) - (x + t * v)) for t in (1e-2, 1e-3)]
    assert offs[1] <= 1.5e-2 * offs[0] + 1e-13, f"off the manifold by {offs[0]:.1e} at t=1e-2 and still {offs[1]:.1e} at 1e-3"


def retraction_stays(case: Case) -> None:
    """Retractions of short and long vectors, and three hundred in a row, stay on the manifold to rounding."""
    manifold: Manifold = case.make()
    for dtype in case.tags.get("dtypes", (torch.float32, _F64)):
        x, v = _draw(manifold, dtype=dtype)
        allowed = 20 * torch.finfo(dtype).eps
        for length in (0.0, 1e-3, 1.0, 10.0):
            _on(manifold, manifold.retract(x, length * v), allowed, f"the retraction of a vector of length {length} in {dtype}")
        for _ in range(300):
            y = manifold.retract(x, 0.1 * v)
            x, v = y, _scaled(manifold, y, manifold.transport(x, y, v), 1.0)
        _on(manifold, x, allowed, f"the point after 300 retractions in {dtype}")


def retraction_order(case: Case) -> None:
    """A retraction starts at x, and agrees with the geodesic (where there is none, with x + tv) up to O(t²)."""
    manifold: Manifold = case.make()
    x, v = _draw(manifold)
    assert _worst(manifold.retract(x, 0 * v) - x) < 1e-13, "retracting by zero moves the point"
    closed = _has(manifold, "exp")
    errors = []
    for t in (1e-2, 1e-3):
        true = manifold.exp(x, t * v) if closed else x + t * v
        errors.append(_worst(manifold.retract(x, t * v) - true))
    assert errors[1] <= 1.5e-2 * errors[0] + 1e-13, (
        f"the error falls from {errors[0]:.1e} to {errors[1]:.1e} for t ten times less"
    )


def transports(case: Case) -> None:
    """Transport lands in the tangent space at the target, is linear, and to the same point changes nothing."""
    manifold: Manifold = case.make()
    x, v = _draw(manifold)
    y = manifold.retract(x, 0.5 * v)
    w = manifold.random_tangent(x, generator=_generator(7))
    moved = manifold.transport(x, y, w)
    assert _worst(manifold.project(y, moved) - moved) < 1e-12, "the transported vector is not tangent at the target"
    both = manifold.transport(x, y, w + 2 * v) - moved - 2 * manifold.transport(x, y, v)
    assert _worst(both) < 1e-12, "transport is not linear"
    assert _worst(manifold.transport(x, x, w) - w) < 1e-12, "transport to the same point changes the vector"


def gradient(case: Case) -> None:
    """The Riemannian gradient is tangent and gives the derivative of a function along every retraction."""
    manifold: Manifold = case.make()
    x, v = _draw(manifold)
    a = torch.randn(x.shape, generator=_generator(8), dtype=_F64)

    def f(point: Tensor) -> Tensor:
        return (a * point.sin()).sum()

    rgrad = manifold.gradient(x, torch.func.grad(f)(x))
    assert _worst(manifold.project(x, rgrad) - rgrad) < 1e-12, "the gradient is not tangent"
    t = 1e-5
    measured = float(f(manifold.retract(x, t * v)) - f(manifold.retract(x, -t * v))) / (2 * t)
    promised = float(manifold.inner(x, rgrad, v).sum())
    assert abs(measured - promised) < 1e-7, f"the derivative is {measured:.9f}, the gradient promises {promised:.9f}"


def geodesics(case: Case) -> None:
    """Exp runs at constant speed: distances along it are the lengths, to the middle half of them, and nothing is nearer."""
    manifold: Manifold = case.make()
    if not (_has(manifold, "exp") and _has(manifold, "distance")):
        return
    x, v = _draw(manifold)
    reach = float(case.tags.get("injectivity", 1.0))
    for length in (1e-6, 0.1 * reach, reach):
        y, middle = manifold.exp(x, length * v), manifold.exp(x, 0.5 * length * v)
        _on(manifold, y, 1e-13, "the end of a geodesic")
        for name, measured, true in (
            ("from start to end", manifold.distance(x, y), length),
            ("from the middle on", manifold.distance(middle, y), length / 2),
            ("back", manifold.distance(y, x), length),
        ):
            off = _worst(measured - true) / length
            assert off < 1e-7, f"a geodesic of length {length}: distance {name} is off by {off:.1e} of it"
    other = manifold.random_point(5, generator=_generator(9), dtype=_F64)
    detour = manifold.distance(x, other) + manifold.distance(other, y)
    assert _worst((manifold.distance(x, y) - detour).clamp_min(0)) < 1e-9, "the triangle inequality does not hold"


def gauge(case: Case) -> None:
    """Nothing depends on which of the tensors of one point is taken."""
    manifold: Manifold = case.make()
    if "gauge" not in case.tags:
        return
    turn: Callable[[Tensor], Tensor] = case.tags["gauge"](manifold, _generator(10), _F64)
    x, v = _draw(manifold)
    w = torch.randn(x.shape, generator=_generator(11), dtype=_F64)
    pairs = {"project": (manifold.project(turn(x), turn(w)), turn(manifold.project(x, w)))}
    if _has(manifold, "exp"):
        pairs["exp"] = (manifold.exp(turn(x), turn(v)), turn(manifold.exp(x, v)))
    y = manifold.retract(x, v)
    if case.tags.get("equivariant", True):
        pairs["retract"] = (manifold.retract(turn(x), turn(v)), turn(y))
        u = manifold.project(x, w)
        pairs["transport"] = (manifold.transport(turn(x), turn(y), turn(u)), turn(manifold.transport(x, y, u)))
    pairs["inner"] = (manifold.inner(turn(x), turn(v), turn(w)), manifold.inner(x, v, w))
    if _has(manifold, "distance"):
        pairs["distance"] = (manifold.distance(turn(x), y), manifold.distance(x, y))
        for name, far in (
            ("x and its other frame", manifold.distance(x, turn(x))),
            ("the retractions of both", manifold.distance(manifold.retract(turn(x), turn(v)), y)),
        ):
            assert _worst(far) < 1e-12, f"the distance of {name} is {_worst(far):.1e}, must be 0"
    for name, (ours, true) in pairs.items():
        assert _worst(ours - true) < 1e-11, f"{name} depends on the representative, by {_worst(ours - true):.1e}"


def copies(case: Case) -> None:
    """A manifold is a value: copies and unpickled copies are equal to it, hash alike, and print alike."""
    manifold: Manifold = case.make()
    for other in (copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold)), case.make()):
        assert other == manifold, f"{other} is not equal to {manifold}"
        assert hash(other) == hash(manifold), f"{other} hashes otherwise than {manifold}"
        assert repr(other) == repr(manifold), f"{other!r} prints otherwise than {manifold!r}"


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        shapes, batching, seeded, refusals, projection, tangency, retraction_stays, retraction_order, transports, gradient,
        geodesics, gauge, copies,
    )
}  # fmt: skip


def check_manifold(make: Callable[[], Manifold], **tags: Any) -> None:
    """Run every check of this module on the manifold that ``make()`` builds.

    Args:
        make: builds the manifold.
        **tags: what it promises; see the module's table.

    Raises:
        AssertionError: names the first check that fails and why.

    Example:
        >>> from corollary.linalg import Grassmann
        >>> check_manifold(lambda: Grassmann(6, 2))
    """
    run_checks("manifold", Case(make, tags))
