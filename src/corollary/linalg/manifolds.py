"""Matrix manifolds as the Riemannian optimizers see them: project, retract, transport.

A point is a tensor whose trailing ``len(point_shape)`` dimensions have the manifold's ``point_shape``; every leading dimension
is a batch of points. A tangent vector at a point has the point's shape. To add a manifold, give the five abstract members;
``exp`` and ``distance`` only where a closed form exists.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RETRACTIONS = ("geodesic", "qr", "polar")


def _working(*tensors: Tensor) -> list[Tensor]:
    """The tensors in a precision that eigensolvers know: half precision becomes float32."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def _times(x: Tensor, s: Tensor) -> Tensor:
    """``x @ s`` for tall x (n×k) and small s (k×k): batched products are three times as fast when the long side comes last."""
    return (s.mT @ x.mT).mT


class Manifold(ABC):
    """A Riemannian manifold embedded in a space of tensors, batched over leading dimensions."""

    @property
    @abstractmethod
    def point_shape(self) -> tuple[int, ...]:
        """Shape of one point."""

    @abstractmethod
    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Orthogonal projection of any ``v`` to the tangent space at ``x``."""

    @abstractmethod
    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """The point reached from ``x`` along the tangent vector ``v``; agrees with the geodesic to first order."""

    @abstractmethod
    def normalize(self, x: Tensor) -> Tensor:
        """The point of the manifold nearest to ``x``."""

    @abstractmethod
    def random_point(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Points of shape ``(*batch, *point_shape)``, uniform where the manifold has a uniform distribution."""

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """The geodesic from ``x`` with velocity ``v``, after unit time."""
        raise NotImplementedError(f"{type(self).__name__} has no closed-form exponential; use retract")

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Geodesic distance of ``x`` and ``y``, one number for each pair of points."""
        raise NotImplementedError(f"{type(self).__name__} has no closed-form distance")

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Take ``v`` from the tangent space at ``x`` to the one at ``y``; here by projection."""
        return self.project(y, v)

    def gradient(self, x: Tensor, egrad: Tensor) -> Tensor:
        """The Riemannian gradient that belongs to the Euclidean gradient ``egrad``; here its projection."""
        return self.project(x, egrad)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Inner product of tangent vectors at ``x``, one number for each point; here the Euclidean one."""
        return (u * v).flatten(u.ndim - len(self.point_shape)).sum(-1) if self.point_shape else u * v

    def random_tangent(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A standard normal tensor projected to the tangent space at ``x``."""
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return self.project(x, noise)

    def check_shape(self, x: Tensor, name: str = "x") -> None:
        """Raise ``ValueError`` unless the trailing dimensions of ``x`` are a point's, ``TypeError`` unless it is floating."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {got}")
        shape, trailing = self.point_shape, tuple(x.shape[x.ndim - min(x.ndim, len(self.point_shape)) :])
        if trailing != shape:
            wanted = ", ".join(("...", *map(str, shape)))
            raise ValueError(f"{name} must have shape ({wanted}) to be points of {self}, got {tuple(x.shape)}")

    def check_point(self, x: Tensor, *, tolerance: float | None = None, name: str = "x") -> None:
        """Raise ``ValueError`` unless every point of ``x`` lies on the manifold.

        Args:
            x: points ``(..., *point_shape)``.
            tolerance: largest deviation of an entry from the nearest point; by default 100 rounding errors of the dtype.
            name: how the message calls ``x``.
        """
        self.check_shape(x, name)
        if x.numel() == 0 or x.is_meta:
            return
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite, it holds NaN or infinity")
        allowed = 100 * torch.finfo(x.dtype).eps if tolerance is None else tolerance
        off = float((self.normalize(x.detach()) - x.detach()).abs().max())
        if off > allowed:
            raise ValueError(f"{name} must lie on {self}: it is {off:.3g} away, allowed is {allowed:.3g}; see normalize")


@dataclass(frozen=True)
class Euclidean(Manifold):
    r"""Flat space: every tensor is a point, and the optimizers become the ordinary ones.

    Example:
        >>> import torch
        >>> Euclidean().retract(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    @property
    def point_shape(self) -> tuple[int, ...]:
        return ()

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        return x + v

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        return x + v

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs()

    def normalize(self, x: Tensor) -> Tensor:
        return x

    def random_point(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return torch.randn(batch, generator=generator, dtype=dtype, device=device)


@dataclass(frozen=True)
class Grassmann(Manifold):
    r"""The k-dimensional subspaces of :math:`\mathbb R^n`, each held as a frame: an n×k matrix with orthonormal columns.

    Two frames :math:`X` and :math:`XQ` with orthogonal :math:`Q` are the same point. Tangent vectors are held as horizontal
    lifts, :math:`X^\top V = 0`, and the metric is the canonical one, :math:`\langle U, V\rangle = \operatorname{tr} U^\top V`:

    .. math::
        \operatorname{Proj}_X(V) &= (I - XX^\top)V, \\
        \operatorname{Exp}_X(V) &= XW\cos(\Sigma)W^\top + U\sin(\Sigma)W^\top, \qquad V = U\Sigma W^\top, \\
        d(X, Y) &= \|\theta\|_2, \qquad \cos\theta = \sigma(X^\top Y).

    The exponential needs no singular vectors of the n×k matrix. Cosine and :math:`\sin(s)/s` are entire functions of
    :math:`s^2`, so that :math:`\operatorname{Exp}_X(V) = X\cos\sqrt G + V\,\tfrac{\sin\sqrt G}{\sqrt G}` with the k×k matrix
    :math:`G = V^\top V` holds at every rank and loses no accuracy; one Newton-Schulz step then takes rounding errors off the
    frame, so that long runs do not drift. The frame is carried along (it is not turned within the new subspace), which is
    what makes projection a transport between neighbouring frames.

    Args:
        n: dimension of the space.
        k: dimension of the subspaces, from 1 to n.
        retraction: what ``retract`` does: ``"geodesic"`` (the exponential), ``"qr"`` (QR factor of X + V with a positive
            diagonal of R; it turns the frame) or ``"polar"`` (orthogonal polar factor of X + V).

    Raises:
        ValueError: where n, k or the retraction is none of these.

    Example:
        >>> import torch
        >>> planes = Grassmann(5, 2)
        >>> x = planes.random_point(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> v = 0.1 * planes.random_tangent(x)
        >>> y = planes.exp(x, v)
        >>> torch.allclose(planes.distance(x, y), planes.inner(x, v, v).sqrt())
        True

    Source: Edelman, Arias and Smith, "The geometry of algorithms with orthogonality constraints" (1998), theorem 2.3 and
    section 4.3.
    """

    n: int
    k: int
    retraction: str = "geodesic"

    def __post_init__(self) -> None:
        for name in ("n", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.k > self.n:
            raise ValueError(f"k must be at most n = {self.n}, got {self.k}")
        if self.retraction not in RETRACTIONS:
            raise ValueError(f"retraction must be one of {', '.join(RETRACTIONS)}, got {self.retraction!r}")

    @property
    def point_shape(self) -> tuple[int, ...]:
        return (self.n, self.k)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        return v - _times(x, x.mT @ v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        frame, step = _working(x, v)
        # Scaled first, or the squares of a small step (the end of a schedule) underflow and the eigensolver gives up.
        scale = step.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(step.dtype).tiny)
        scaled = step / scale
        # A NaN in a gradient must reach its own point, as in every optimizer, and not end in the eigensolver's error.
        squares, basis = torch.linalg.eigh((scaled.mT @ scaled).nan_to_num(0.0, 0.0, 0.0))
        angles = squares.clamp_min(0).sqrt() * scale.squeeze(-1)
        # The cosine less one, so that what is added is as exact as the step is small.
        cosine = (basis * (-2 * (angles / 2).sin().square()).unsqueeze(-2)) @ basis.mT
        sine = (basis * torch.sinc(angles / torch.pi).unsqueeze(-2)) @ basis.mT
        y = frame + (_times(frame, cosine) + _times(step, sine))
        y = torch.sub(1.5 * y, _times(y, y.mT @ y), alpha=0.5)
        return y.to(x.dtype)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        if self.retraction == "geodesic":
            return self.exp(x, v)
        frame, step = _working(x, v)
        y: Tensor = frame + step
        if self.retraction == "qr":
            q, r = torch.linalg.qr(y)
            # LAPACK leaves the signs of R's diagonal open; a negative one would turn a column against its momentum.
            signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
            y = torch.mul(q, signs.unsqueeze(-2))
            return y.to(x.dtype)
        # YᵀY = I + VᵀV has no eigenvalue under 1, so its inverse square root is safe.
        squares, basis = torch.linalg.eigh((y.mT @ y).nan_to_num(1.0, 1.0, 1.0))
        y = _times(y, (basis * squares.rsqrt().unsqueeze(-2)) @ basis.mT)
        return y.to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """The nearest frame: the orthogonal polar factor, by SVD, which stands any condition number."""
        u, _, wt = torch.linalg.svd(_working(x)[0], full_matrices=False)
        nearest: Tensor = u @ wt
        return nearest.to(x.dtype)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = _working(x, y)
        cosines = torch.linalg.svdvals(first.mT @ second)
        sines = torch.linalg.svdvals(self.project(first, second)).flip(-1)
        if self.k > self.n - self.k:  # more columns than the complement has room for: the surplus angles are zero
            sines = torch.where(torch.arange(self.k, device=x.device) < 2 * self.k - self.n, 0.0, sines)
        # Angles from both, because the arc cosine alone loses half the digits of small angles.
        norm: Tensor = torch.linalg.vector_norm(torch.atan2(sines, cosines), dim=-1)
        return norm.to(x.dtype)

    def random_point(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        dtype = dtype or torch.get_default_dtype()
        work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        # The span of a Gaussian matrix is uniform on the Grassmannian.
        noise = torch.randn(*batch, self.n, self.k, generator=generator, dtype=work, device=device)
        frame: Tensor = torch.linalg.qr(noise).Q
        return frame.to(dtype)


@dataclass(frozen=True)
class Transposed(Manifold):
    """A manifold of matrices whose points are stored transposed, so that a layer can keep them as rows of its weight.

    Args:
        base: the manifold whose points are n×k; here they are k×n.

    Example:
        >>> rows = Transposed(Grassmann(5, 2))
        >>> rows.random_point(3).shape
        torch.Size([3, 2, 5])
    """

    base: Manifold

    def __post_init__(self) -> None:
        if len(self.base.point_shape) != 2:
            raise ValueError(f"base must be a manifold of matrices, got {self.base} with points {self.base.point_shape}")

    @property
    def point_shape(self) -> tuple[int, ...]:
        return self.base.point_shape[::-1]

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        return self.base.project(x.mT, v.mT).mT

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        return self.base.retract(x.mT, v.mT).mT

    def normalize(self, x: Tensor) -> Tensor:
        return self.base.normalize(x.mT).mT

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.base.exp(x.mT, v.mT).mT

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return self.base.distance(x.mT, y.mT)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.base.transport(x.mT, y.mT, v.mT).mT

    def gradient(self, x: Tensor, egrad: Tensor) -> Tensor:
        return self.base.gradient(x.mT, egrad.mT).mT

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return self.base.inner(x.mT, u.mT, v.mT)

    def random_point(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return self.base.random_point(*batch, generator=generator, dtype=dtype, device=device).mT.contiguous()


class ManifoldParameter(nn.Parameter):
    """An ``nn.Parameter`` that carries its manifold; the Riemannian optimizers read it, every other code sees a parameter.

    Args:
        data: points ``(..., *manifold.point_shape)``.
        manifold: where they live.
        requires_grad: as for ``nn.Parameter``.

    Example:
        >>> import torch
        >>> weight = ManifoldParameter(Grassmann(5, 2).random_point(3), Grassmann(5, 2))
        >>> manifold_of(weight)
        Grassmann(n=5, k=2, retraction='geodesic')
    """

    manifold: Manifold

    def __new__(cls, data: Tensor, manifold: Manifold, requires_grad: bool = True) -> ManifoldParameter:
        if not isinstance(manifold, Manifold):
            raise TypeError(f"manifold must be a Manifold, got {type(manifold).__name__}")
        manifold.check_shape(data, "data")
        parameter: ManifoldParameter = super().__new__(cls, data, requires_grad)
        parameter.manifold = manifold
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> ManifoldParameter:
        if id(self) in memo:
            known: ManifoldParameter = memo[id(self)]
            return known
        # nn.Parameter's own would call the constructor without the manifold.
        data = self.data.clone(memory_format=torch.preserve_format)
        result = type(self)(data, copy.deepcopy(self.manifold, memo), self.requires_grad)
        memo[id(self)] = result
        return result


def manifold_of(parameter: Tensor) -> Manifold | None:
    """The manifold that a parameter carries, or None for an ordinary one."""
    return getattr(parameter, "manifold", None)
