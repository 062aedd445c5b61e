"""Matrices too large to be copied: moments, Gram matrices and products, block by block along the longer side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from corollary.linalg import spectral_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")
R = TypeVar("R")

_BLOCK = 1 << 19  # elements of a block: it stays in the cache from its conversion to its last use


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor of two dimensions or more as (first dimension, all others): a convolution's kernels become rows."""
    return tensor.detach().flatten(1) if tensor.dim() > 2 else tensor.detach()


class Blocks:
    r"""A matrix as blocks B along its longer side, converted one at a time into one buffer: :math:`G = \sum B^\top B`.

    Behaves as the symmetric operator G of the shorter side s. A block is only good until the next one.

    Args:
        matrix: (m, n), of any real dtype; never copied as a whole.
        minus: (m, n), subtracted block by block.
        dtype: of the blocks.
    """

    def __init__(self, matrix: Tensor, minus: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.matrix, self.minus, self.dtype = matrix, minus, dtype
        self.tall = matrix.shape[0] >= matrix.shape[1]
        self.short, self.long = min(matrix.shape), max(matrix.shape)
        self.shape, self.device = torch.Size((self.short, self.short)), matrix.device
        self.buffers: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        for block in self._along(0 if self.tall else 1):
            yield block if self.tall else block.T

    def _along(self, axis: int) -> Iterator[Tensor]:
        length = self.matrix.shape[axis]
        step = max(1, _BLOCK // max(1, self.matrix.shape[1 - axis]))
        for begin in range(0, length, step):
            parts = [m.narrow(axis, begin, min(step, length - begin)) for m in (self.matrix, self.minus) if m is not None]
            block = self._converted(0, parts[0])
            if self.minus is not None:
                block.sub_(self._converted(1, parts[1]))
            yield block

    def _converted(self, number: int, part: Tensor) -> Tensor:
        if number == len(self.buffers):
            self.buffers.append(
                torch.empty(min(max(_BLOCK, self.long), self.matrix.numel()), dtype=self.dtype, device=self.device)
            )
        return self.buffers[number][: part.numel()].view(part.shape).copy_(part)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        given = vectors.unsqueeze(1) if vectors.dim() == 1 else vectors
        if self.tall:
            out = torch.zeros(given.shape[1], self.short, dtype=given.dtype, device=self.device)
            for block in self:
                out.addmm_((block @ given).T, block)
            product = out.T
        else:
            # Two passes over rows, which lie together in memory, are faster than one over columns.
            across = self._across(given)
            product = torch.cat([block @ across for block in self._along(0)])
        return product[:, 0] if vectors.dim() == 1 else product

    def _across(self, vectors: Tensor) -> Tensor:
        """Wᵀ times vectors, for a wide W."""
        out: Tensor = vectors.new_zeros(vectors.shape[1], self.long)
        begin = 0
        for block in self._along(0):
            out.addmm_(vectors[begin : begin + len(block)].T, block)
            begin += len(block)
        return out.T

    def lengths(self, vectors: Tensor) -> Tensor:
        """Of the images of vectors of the shorter side (s, k) on the longer one, (k,) float64."""
        if not self.tall:
            lengths: Tensor = torch.linalg.vector_norm(self._across(vectors).double(), dim=0)
            return lengths
        squares = torch.zeros(vectors.shape[1], dtype=torch.float64, device=self.device)
        for block in self:
            squares += (block @ vectors).square().sum(0)
        return squares.sqrt()

    def in_dtype(self, dtype: torch.dtype) -> Blocks:
        """The same matrix in blocks of another dtype."""
        return Blocks(self.matrix, self.minus, dtype)

    def gram(self) -> Tensor:
        """G itself (s, s), float64."""
        total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for block in self.in_dtype(torch.float64):
            total.addmm_(block.T, block)
        return total

    def lift(self, vectors: Tensor) -> Tensor:
        """B times ``vectors`` (s, k) for every block, one after the other: (long, k)."""
        return torch.cat([block @ vectors for block in self])


def cross_gram(left: Blocks, right: Blocks) -> Tensor:
    """The sum of Lᵀ R over blocks of two matrices of one shape, float64."""
    total = torch.zeros(left.shape, dtype=torch.float64, device=left.device)
    for a, b in zip(left.in_dtype(torch.float64), right.in_dtype(torch.float64), strict=True):
        total.addmm_(a.T, b)
    return total


def leading(operator: Blocks, rank: int, generator: torch.Generator, steps: int = 6) -> tuple[Tensor, Tensor]:
    """The largest singular values (rank,) float64 and their vectors of the shorter side (s, rank), by randomized block Krylov.

    All blocks of the iteration of `corollary.linalg.randomized_right_vectors` are kept for the Rayleigh-Ritz step, which needs far
    fewer passes where the spectrum falls slowly; and the matrix is never held in float32 as a whole.

    Source: Musco, Musco, "Randomized Block Krylov Methods", arXiv 1504.05477, Algorithm 2.
    """
    width = min(max(16, -(-(rank + 8) // 3)), operator.short)
    block = torch.randn(operator.short, width, generator=generator).to(operator.device, operator.dtype)
    basis = block[:, :0]
    images = []
    while True:
        scale = float(block.norm(dim=0).max())
        block, triangle = torch.linalg.qr(block - basis @ (basis.T @ block))
        spent = triangle.diagonal().abs() <= 1e-5 * scale  # the matrix has no more directions: what is left is rounding
        fresh = torch.randn(block.shape, generator=generator).to(block)
        block = torch.where(spent, fresh, block)
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        block = block[:, : operator.short - basis.shape[1]]
        basis = torch.cat([basis, block], dim=1)
        images.append(operator @ block)
        if len(images) == steps or basis.shape[1] == operator.short:
            break
        block = images[-1]
    small = basis.double().T @ torch.cat(images, dim=1).double()
    rotation = torch.linalg.eigh((small + small.T) / 2).eigenvectors
    vectors = basis @ rotation.flip(1)[:, :rank].to(basis.dtype)
    # From the eigenvalues, singular values below a thousandth of the largest would be lost in rounding.
    top, order = operator.lengths(vectors).sort(descending=True)
    return top, vectors[:, order]


@dataclass(frozen=True)
class Moments:
    """Sums over the finite entries of a tensor, and how many entries are none."""

    count: int
    nan: int
    inf: int
    zeros: int
    low: float
    high: float
    total: float
    absolute: float
    squares: float

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2)) if self.count else math.nan


def moments(parts: Iterable[Tensor]) -> Moments:
    """One pass over a tensor's parts; each is float32 or float64."""
    count = nan = inf = zeros = 0
    low, high, total, absolute, squares = math.inf, -math.inf, 0.0, 0.0, 0.0
    for part in parts:
        least, most = (float(v) for v in torch.aminmax(part))
        if not (math.isfinite(least) and math.isfinite(most)):
            bad = int(part.isnan().sum())
            finite = part[part.isfinite()]
            nan, inf = nan + bad, inf + part.numel() - bad - finite.numel()
            if not finite.numel():
                continue
            part = finite
            least, most = (float(v) for v in torch.aminmax(part))
        count += part.numel()
        zeros += part.numel() - int(part.count_nonzero())
        low, high = min(low, least), max(high, most)
        if not 1e-10 < max(-least, most) < 1e15:
            part = part.double()  # its squares would leave float32
        total += float(part.sum())
        absolute += float(torch.linalg.vector_norm(part, 1))
        squares += float(torch.dot(part, part))
    return Moments(count, nan, inf, zeros, low, high, total, absolute, squares)


def far_out(parts: Iterable[Tensor], centre: float, reach: float) -> int:
    """How many entries lie further than ``reach`` from ``centre``; what is not finite does not count."""
    return sum(int((((part - centre).abs() > reach) & part.isfinite()).sum()) for part in parts)


def flat_parts(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor's entries, converted in pieces."""
    flat = tensor.detach().reshape(-1)
    for begin in range(0, flat.numel(), _BLOCK):
        yield flat[begin : begin + _BLOCK].to(dtype)


class _Deflated:
    """A block operator between projections away from orthonormal vectors (s, k)."""

    def __init__(self, operator: Blocks, vectors: Tensor) -> None:
        self.operator, self.vectors = operator, vectors
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def _away(self, x: Tensor) -> Tensor:
        return x - self.vectors @ (self.vectors.T @ x)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self._away(self.operator @ self._away(vectors))


@dataclass(frozen=True)
class Spectrum:
    """An estimated spectrum: counted places, from 1, with singular values, their sum, and their effective rank."""

    places: tuple[float, ...]
    values: tuple[float, ...]
    nuclear: float
    effective_rank: float


def estimated_spectrum(operator: Blocks, generator: torch.Generator) -> Spectrum:
    r"""The spectrum of a matrix that is too large for a decomposition.

    The leading 32 singular values by subspace iteration, the rest by stochastic Lanczos quadrature on what is orthogonal to
    them: 12 probes of 12 steps. Without the first part the chance in a probe's share of the largest singular value would drown
    the others.
    """
    top, vectors = leading(operator, 32, generator)
    vectors = torch.linalg.qr(vectors).Q
    probes = 12
    rest = spectral_density(_Deflated(operator, vectors), steps=12, samples=probes, generator=generator)
    nodes, order = rest.nodes.reshape(-1).sort(descending=True)
    # What rounding makes of eigenvalues of zero would count for much under the root.
    nodes = torch.where(nodes > float(top[0]) ** 2 * torch.finfo(operator.dtype).eps, nodes, 0.0).sqrt()
    weights = rest.weights.reshape(-1)[order] * (operator.short / probes)
    values, counts = torch.cat([top, nodes]), torch.cat([torch.ones_like(top), weights])
    nuclear = float(counts @ values)
    entropy = float(counts @ torch.special.entr(values / nuclear)) if nuclear else 0.0
    places = counts.cumsum(0)
    drawn = (counts > 1e-3) & (values > 0) & (places <= operator.short)
    return Spectrum(tuple(places[drawn].tolist()), tuple(values[drawn].tolist()), nuclear, math.exp(entropy))


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values taken as a distribution (Roy and Vetterli, 2007); 0 for a zero matrix."""
    total = float(singular_values.sum())
    if not total > 0:
        return 0.0
    shares = singular_values / total
    return float(torch.special.entr(shares).sum().exp())


def tail_exponent(eigenvalues: Tensor, least: int = 20, candidates: int = 200) -> float | None:
    r"""Exponent α of a power law :math:`p(λ) \propto λ^{-α}` fitted to the largest eigenvalues.

    Maximum likelihood above a cut, :math:`α = 1 + j / \sum_{i \le j} \ln(λ_i / λ_j)`, with the cut at the eigenvalue that
    brings the law nearest to the data in the Kolmogorov-Smirnov distance.

    Args:
        eigenvalues: falling, (n,).
        least: fewest eigenvalues in the tail; with fewer than that in all there is no fit.
        candidates: most cuts that are tried.

    Source: Clauset, Shalizi, Newman, "Power-law distributions in empirical data", arXiv 0706.1062, equations 3.1 and 3.9; Martin,
    Mahoney, arXiv 1810.01075, for what it says of weights.
    """
    positive = eigenvalues[eigenvalues > eigenvalues[0] * 1e-14] if len(eigenvalues) and eigenvalues[0] > 0 else eigenvalues[:0]
    n = len(positive)
    if n < least:
        return None
    logs = positive.log()
    places = torch.linspace(least, n, min(candidates, n - least + 1)).round().long()
    sizes = sorted(set(places.tolist()))
    best, exponent = math.inf, None
    sums = logs.cumsum(0)
    for j in sizes:
        spread = float(sums[j - 1]) - j * float(logs[j - 1])
        if spread <= 0:
            continue
        alpha = 1 + j / spread
        # The law's share above each eigenvalue against the data's, from both sides of its steps.
        above = ((logs[j - 1] - logs[:j]) * (alpha - 1)).exp()
        steps = torch.arange(j, dtype=above.dtype) / j
        distance = max(float((above - steps).abs().max()), float((above - steps - 1 / j).abs().max()))
        if distance < best:
            best, exponent = distance, alpha
    return exponent


def walk(items: Iterable[tuple[T, int]], work: Callable[[T], R], workers: int, room: int = 512 << 20) -> Iterator[tuple[T, R]]:
    """Results of ``work`` as they come, so few at once that what they hold stays within ``room`` bytes (or is one alone)."""
    if workers <= 1:
        for item, _ in items:
            yield item, work(item)
        return
    waiting = iter(items)
    head = next(waiting, None)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future[R], tuple[T, int]] = {}
        try:
            while head is not None or running:
                while head is not None and len(running) < workers:
                    if running and sum(size for _, size in running.values()) + head[1] > room:
                        break
                    running[pool.submit(work, head[0])] = head
                    head = next(waiting, None)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item, _ = running.pop(future)
                    yield item, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def new_axes(ax: Axes | None) -> Axes:
    """The axes given, or new ones on a figure that no window shows."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(layout="constrained").add_subplot()
