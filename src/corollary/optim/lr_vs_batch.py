"""Learning rates from the batch Hessian: its extreme eigenvalues by batch size, scaling rules, a learner of rate and momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from corollary.linalg.curvature import SymmetricOperator
from corollary.linalg.lanczos import lanczos
from corollary.optim.multiplier_lr import MultiplierLR

RULES = ("linear", "sqrt")
Rate = TypeVar("Rate", float, Tensor)


def batch_eigenvalues(
    eigenvalues: Tensor, noise: float | Tensor, batch_size: int, *, dataset_size: int | None = None
) -> Tensor:
    r"""Extreme eigenvalues of the Hessian of a batch, from those of the Hessian of the whole set.

    The batch Hessian is modelled as spikes in noise: the full Hessian, of low rank, plus a Wigner matrix whose entries have
    variance σ²/𝔟 for P parameters. An outlier λ is pushed away from zero; one that the noise drowns is replaced by the edge
    of the noise:

    .. math::
        λ' = \begin{cases} λ + \dfrac{s^2}{𝔟\, λ} & |λ| > s / \sqrt{𝔟} \\
        \operatorname{sign}(λ)\, 2 s / \sqrt{𝔟} & \text{otherwise} \end{cases}
        \qquad s^2 = P σ^2, \qquad 𝔟 = b \, \frac{N - 1}{N - b}

    Where the noise is not the same in every direction, s² is that of the outlier's own eigenvector, as `batch_noise` measures
    it: the shift is then second-order perturbation theory, :math:`\mathbb E \|(I - v v^T) E v\|^2 / λ`.

    Args:
        eigenvalues: λ, the largest or the smallest few of the full Hessian, any shape, floating. A zero is read as positive.
        noise: s², of one sample's Hessian; a number, or a tensor that broadcasts against ``eigenvalues``.
        batch_size: b.
        dataset_size: N, where batches are drawn from it without replacement; None for fresh samples, 𝔟 = b.

    Returns:
        λ', in the shape and dtype of ``eigenvalues`` (broadcast with ``noise``).

    Raises:
        TypeError: ``eigenvalues`` is no real floating tensor.
        ValueError: it is empty or has a NaN, the noise is negative or not finite, or the batch is below 1 or above N.

    When not to use it: where several outliers lie within s/√𝔟 of each other they push each other too, and the shift comes out
    up to two or three times too small; and for eigenvalues that are not the outermost.

    Example:
        >>> import torch
        >>> batch_eigenvalues(torch.tensor([10.0, -0.5]), noise=16.0, batch_size=4)
        tensor([10.4000, -4.0000])

    Reference:
        Granziol, Zohren, Roberts, arXiv 2006.09092, the theorem on the extreme eigenvalues of the batch Hessian; for Wigner
        noise around one spike, Benaych-Georges and Nadakuditi, arXiv 0910.2120.
    """
    if not isinstance(eigenvalues, Tensor) or not eigenvalues.is_floating_point():
        came = eigenvalues.dtype if isinstance(eigenvalues, Tensor) else type(eigenvalues).__name__
        raise TypeError(f"'eigenvalues' must be a real floating tensor, not {came}")
    if not eigenvalues.numel():
        raise ValueError(f"'eigenvalues' is empty, of shape {tuple(eigenvalues.shape)}; give at least one")
    if bool(eigenvalues.isnan().any()):
        raise ValueError("'eigenvalues' has a NaN")
    variance = torch.as_tensor(noise, dtype=eigenvalues.dtype, device=eigenvalues.device)
    if not bool((variance.isfinite() & (variance >= 0)).all()):
        raise ValueError(f"'noise' must be a finite variance, at least 0, not {noise}")
    variance = variance / _effective(batch_size, dataset_size)
    edge = variance.sqrt()
    size = eigenvalues.abs()
    outlier = size > edge
    pushed = eigenvalues + variance / torch.where(outlier, eigenvalues, torch.ones_like(eigenvalues))
    drowned = torch.where(eigenvalues < 0, -2 * edge, 2 * edge)
    return torch.where(outlier, pushed, drowned)


def batch_noise(
    full: SymmetricOperator,
    batches: Iterable[SymmetricOperator],
    vectors: Tensor,
    batch_size: int,
    *,
    dataset_size: int | None = None,
) -> Tensor:
    r"""Variance of one sample's Hessian along unit vectors: the s² that `batch_eigenvalues` takes.

    .. math:: s^2(v) = 𝔟 \; \mathbb E \big\| (I - v v^T)(H_b - H) v \big\|^2

    estimated without bias from any number of batches; what lies along v itself moves the eigenvalue up as often as down, and
    is left out. For Wigner noise it is (P - 1) σ², whatever v is.

    Args:
        full: H, the Hessian (or Gauss-Newton matrix) of the whole set.
        batches: those of batches of ``batch_size`` samples each, at the same parameters; read once, one at a time.
        vectors: v, unit eigenvectors of H as columns (n, k), as ``extreme_eigenvalues(..., vectors=True)`` gives them.
        batch_size: b.
        dataset_size: N, where batches are drawn from it without replacement.

    Returns:
        s² for each column, (k,).

    Raises:
        ValueError: ``vectors`` is not (n, k) with unit columns, there is no batch, or sizes are out of range.

    Example:
        >>> import torch
        >>> zero, noise = torch.zeros(2, 2), torch.tensor([[0.0, 3.0], [3.0, 0.0]])
        >>> batch_noise(zero, [noise, -noise], torch.eye(2), batch_size=1)
        tensor([9., 9.])
    """
    n = full.shape[0]
    if vectors.dim() != 2 or vectors.shape[0] != n or not vectors.shape[1]:
        raise ValueError(f"'vectors' must be ({n}, k) with k at least 1, not {tuple(vectors.shape)}")
    if not bool(((vectors.norm(dim=0) - 1).abs() < 1e-2).all()):
        raise ValueError("'vectors' must have unit columns")
    effective = _effective(batch_size, dataset_size)
    whole = full @ vectors
    total, count = torch.zeros(vectors.shape[1], dtype=vectors.dtype, device=vectors.device), 0
    for batch in batches:
        error = batch @ vectors - whole
        error = error - vectors * (vectors * error).sum(0)
        total += error.square().sum(0)
        count += 1
    if not count:
        raise ValueError("'batches' is empty; give at least one")
    return effective * total / count


def scale_lr(lr: Rate, from_batch: int, to_batch: int, *, rule: str = "linear", saturation: float = math.inf) -> Rate:
    r"""Carry a learning rate from one batch size to another.

    The largest stable rate of SGD is 2/λ' for the batch Hessian's largest eigenvalue λ' = λ + s²/(b λ), so that it grows with
    b and saturates where sampling noise no longer matters; an adaptive method divides by √v ~ 1/√b and keeps the square root:

    .. math::
        η_{to} = η_{from} \left( \frac{b_{to}}{b_{from}} \cdot \frac{b_{from} + b^*}{b_{to} + b^*} \right)^{p},
        \qquad b^* = s^2 / λ^2, \qquad p = 1 \text{ (SGD)}, \; \tfrac12 \text{ (Adam)}

    Far below b* these are the linear and the square-root rule; far above, the rate stays.

    Args:
        lr: rate that suits ``from_batch``; a float, or a floating tensor, which is not changed.
        from_batch: its batch size.
        to_batch: the new one.
        rule: 'linear' for SGD, with or without momentum, 'sqrt' for Adam and its kin.
        saturation: b*, in samples: the noise of `batch_noise` over the largest eigenvalue squared. Infinity scales for ever.

    Returns:
        The new rate, float or tensor as ``lr`` is.

    Raises:
        TypeError: ``lr`` is an integer or complex tensor.
        ValueError: the rate is negative or NaN, a batch size is below 1, ``saturation`` is not positive, or the rule unknown.

    When not to use it: to shrink or stretch a whole schedule (warm-up and decay count steps, which change too). The
    saturation of 'sqrt' is the square root of SGD's; beyond it theories differ, and some let Adam's rate fall again.

    Example:
        >>> scale_lr(0.1, 64, 256), scale_lr(0.001, 64, 256, rule="sqrt")
        (0.4, 0.002)
        >>> round(scale_lr(0.1, 64, 256, saturation=256), 3)
        0.25

    Reference:
        Granziol, Zohren, Roberts, arXiv 2006.09092, scaling rules as corollaries of the theorem on the batch Hessian.
    """
    if isinstance(lr, Tensor) and not lr.is_floating_point():
        raise TypeError(f"'lr' must be a float or a floating tensor, not {lr.dtype}")
    if isinstance(lr, Tensor) and not lr.numel():
        raise ValueError(f"'lr' is empty, of shape {tuple(lr.shape)}")
    if not bool((lr >= 0).all() if isinstance(lr, Tensor) else lr >= 0):
        raise ValueError(f"'lr' must be at least 0, not {lr}")
    for name, size in (("from_batch", from_batch), ("to_batch", to_batch)):
        if not size >= 1:
            raise ValueError(f"'{name}' must be at least 1, not {size}")
    if rule not in RULES:
        raise ValueError(f"'rule' is '{rule}'; allowed: {', '.join(RULES)}")
    if not saturation > 0:
        raise ValueError(f"'saturation' must be above 0, not {saturation}")
    factor = to_batch / from_batch
    if not math.isinf(saturation):
        factor *= (from_batch + saturation) / (to_batch + saturation)
    return lr * (factor if rule == "linear" else math.sqrt(factor))


class SLQLearningRate(MultiplierLR):
    r"""Set learning rate and momentum from the extreme Ritz values of the batch Hessian, every so many steps.

    A few Lanczos steps on the Hessian of a batch give its largest Ritz value L and its smallest. What the batch's noise makes
    of a flat direction lies between the smallest, which noise makes negative, and its mirror image: curvature below
    ν = \|smallest\| cannot be told from noise. With μ = ν, heavy-ball momentum and rate are those that are best on a quadratic
    with curvature in [μ, L] (Polyak, 1964):

    .. math::
        β = \left( \frac{\sqrt L - \sqrt μ}{\sqrt L + \sqrt μ} \right)^2, \qquad
        η = \frac{4}{(\sqrt L + \sqrt μ)^2}

    and without learning momentum the rate is η = 2 / (L + μ). One batch may show little curvature by chance, and then the rate
    would jump: a reading above the last L or μ counts at once, one below it moves them by a share 1 - ``memory`` only. Each group gets its own initial rate times η: **build the
    optimizer with** ``lr`` **as the fraction to take**, 1 for all of it, less for safety. Since L is that of a batch, the
    rate follows the batch size by itself, linearly while noise rules and not at all when it no longer does.

    ::

        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        schedule = SLQLearningRate(optimizer, lambda: HessianOperator(loss(next_batch()), net.parameters()), interval=100)
        for batch in batches:
            ...; optimizer.step(); schedule.step()

    Args:
        optimizer: any; to learn momentum, every group must have 'momentum', as those of ``torch.optim.SGD``. For a method that
            divides by √v (Adam) give the Hessian divided likewise on both sides, and ``learn_momentum=False``.
        hessian: called when a refresh is due; gives the Hessian of one batch, of the size that training uses, at the present
            parameters: a `HessianOperator`, a Gauss-Newton matrix, a square tensor.
        interval: refresh every so many steps, from step 0 on.
        lanczos_steps: products with the Hessian at each refresh; with `HessianOperator` each costs about two gradients.
        learn_momentum: set 'momentum' too.
        memory: share of L and μ that outlives a lower reading, in [0, 1); 0 follows every reading.
        max_momentum: at most this β, in [0, 1); μ is raised to what gives it, in the rate too.
        seed: of the Lanczos start vectors, which depend on seed and step alone, so that a run resumed from ``state_dict()``
            repeats the uninterrupted one bit by bit, as far as ``hessian`` does.
        last_epoch: number of the last step done, for building it in the middle of a run; -1 starts at step 0.

    Attributes:
        largest: largest Ritz value at the last refresh, its residual bound added.
        smallest: the smallest then.
        curvature: L, with its memory.
        floor: ν, with its memory.
        momentum: β, whether or not it was set.

    Raises:
        TypeError: ``optimizer`` is none, or ``hessian`` cannot be called.
        ValueError: an option out of range; momentum is to be learned and a group has none; the Hessian is not finite, or it is
            zero at the first refresh (at a later one the rate stays as it is).

    ``state_dict()`` leaves ``hessian`` out; give it anew when building the schedule to load into.

    A positive semidefinite matrix (Gauss-Newton) shows no noise below zero: its smallest Ritz value is tiny, and the momentum
    goes to ``max_momentum``.

    When not to use it: where a batch's loss has no second derivative; where the Hessian changes much within ``interval``
    steps; with a warm-up of its own, unless ``SequentialLR`` puts that first.

    Deviations from the paper: the authors' code for their learner was not found and the paper's own listing could not be
    read; what to take as μ is this library's choice.

    Example:
        >>> import torch
        >>> from corollary.linalg import HessianOperator
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> def loss():
        ...     return 4.5 * x[0] ** 2 + 0.5 * x[1] ** 2  # curvature 9 and 1
        >>> optimizer = torch.optim.SGD([x], lr=1.0)
        >>> schedule = SLQLearningRate(optimizer, lambda: HessianOperator(loss(), [x]))
        >>> group = optimizer.param_groups[0]
        >>> round(group["lr"], 4), round(group["momentum"], 4)
        (0.25, 0.25)

    Reference:
        Granziol, Zohren, Roberts, arXiv 2006.09092, the learner of learning rate and momentum by stochastic Lanczos quadrature.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        hessian: Callable[[], SymmetricOperator],
        *,
        interval: int = 100,
        lanczos_steps: int = 16,
        learn_momentum: bool = True,
        memory: float = 0.5,
        max_momentum: float = 0.95,
        seed: int = 0,
        last_epoch: int = -1,
    ) -> None:
        if not callable(hessian):
            raise TypeError(f"'hessian' must be a function that gives an operator, not {type(hessian).__name__}")
        for name, value in (("interval", interval), ("lanczos_steps", lanczos_steps)):
            if not value >= 1:
                raise ValueError(f"'{name}' must be at least 1, not {value}")
        for name, share in (("memory", memory), ("max_momentum", max_momentum)):
            if not 0 <= share < 1:
                raise ValueError(f"'{name}' must be in [0, 1), not {share}")
        if learn_momentum and isinstance(optimizer, Optimizer):
            _need_momentum(optimizer)
        self.hessian = hessian
        self.interval = interval
        self.lanczos_steps = lanczos_steps
        self.learn_momentum = learn_momentum
        self.memory = memory
        self.max_momentum = max_momentum
        self.seed = seed
        self.largest = self.smallest = self.curvature = self.floor = self.momentum = 0.0
        self.learned_rate = 0.0
        self.refreshed_at = -interval
        super().__init__(optimizer, last_epoch)

    def multiplier(self, step: int) -> float:
        """The learned rate η at ``step``, refreshed if it is due."""
        # Asked for anew at a refresh step it looks anew: SequentialLR builds it long before its own step 0.
        if step % self.interval == 0 or not 0 <= step - self.refreshed_at < self.interval:
            self._refresh(step)
        return self.learned_rate

    def get_lr(self) -> list[float | Tensor]:
        """The rates of step ``last_epoch``; sets each group's momentum, as ``OneCycleLR`` does."""
        rates = super().get_lr()
        if self.learn_momentum:
            _need_momentum(self.optimizer)
            for group in self.optimizer.param_groups:
                group["momentum"] = self.momentum
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and ``hessian``, as plain values."""
        return {key: value for key, value in super().state_dict().items() if key != "hessian"}

    def _refresh(self, step: int) -> None:
        with torch.enable_grad():
            operator = self.hessian()
        # One start for a seed and step on every device: drawn on the CPU. A prime keeps neighbouring seeds apart.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        start = torch.randn(operator.shape[0], generator=generator).to(operator.device)
        values, _, bounds = lanczos(operator, self.lanczos_steps, start=start).ritz()
        self.largest, self.smallest = float(values[-1] + bounds[-1]), float(values[0])
        top = self.largest if self.largest > 0 else -self.smallest
        if not top > 0:
            if self.learned_rate:  # a batch that the network fits to the last bit has no curvature: keep the rate
                self.refreshed_at = step
                return
            raise ValueError("'hessian' gave zero: there is no curvature to take a rate from")
        self.curvature = max(top, self.memory * self.curvature + (1 - self.memory) * top)
        low = abs(self.smallest)
        self.floor = max(low, self.memory * self.floor + (1 - self.memory) * low)
        root = math.sqrt(self.max_momentum)
        # β falls as μ/L grows: this is the μ/L at which it is max_momentum.
        least = ((1 - root) / (1 + root)) ** 2
        ratio = min(max(self.floor / self.curvature, least), 1.0)
        self.momentum = ((1 - math.sqrt(ratio)) / (1 + math.sqrt(ratio))) ** 2
        unit = 4 / (1 + math.sqrt(ratio)) ** 2 if self.learn_momentum else 2 / (1 + ratio)
        self.learned_rate = unit / self.curvature
        self.refreshed_at = step


def _need_momentum(optimizer: Optimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        if "momentum" not in group:
            raise ValueError(
                f"'learn_momentum' needs an optimizer with momentum, as torch.optim.SGD; group {i} of "
                f"{type(optimizer).__name__} has none"
            )


def _effective(batch_size: int, dataset_size: int | None) -> float:
    """𝔟: how many independent samples would give a batch's noise; infinite for the whole set."""
    if not batch_size >= 1:
        raise ValueError(f"'batch_size' must be at least 1, not {batch_size}")
    if dataset_size is None:
        return float(batch_size)
    if not dataset_size >= batch_size:
        raise ValueError(f"'dataset_size' must be at least 'batch_size' = {batch_size}, not {dataset_size}")
    if batch_size == dataset_size:
        return math.inf
    return batch_size * (dataset_size - 1) / (dataset_size - batch_size)
