"""AdAdaGrad's rule: grow the batch when the variance of its gradient outweighs the gradient itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("norm", "coordinate", "inner_product")
_LARGEST = 2.0**53  # what stands for "no batch is large enough": JSON has no infinity
_Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class NormTest:
    """What `norm_test` found, and the batch size it asks for.

    Attributes:
        kind, eta: as they were given.
        samples: b, how many samples were seen.
        gradient_norm: norm of the mean gradient.
        variance: what the test compares with it: the trace of the samples' covariance (``norm``, ``coordinate``), or the
            variance of their inner products with the mean gradient (``inner_product``).
        required: smallest batch, as a real number, of which the test would hold; at most 2⁵³, also where the gradient is 0.
        passed: whether b is at least that.
        batch_size: the next batch size: ``required`` rounded up, never below b.
        names, layer_required: for each parameter, its name and what the test would ask for if it were the only one.
    """

    kind: str
    eta: float
    samples: int
    gradient_norm: float
    variance: float
    required: float
    passed: bool
    batch_size: int
    names: list[str]
    layer_required: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every field."""
        return asdict(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of the batch size that each parameter asks for, with a line at the samples seen."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(layout="constrained").add_subplot()
        ax.barh(range(len(self.names)), [max(r, 1.0) for r in self.layer_required])
        ax.set_yticks(range(len(self.names)), self.names)
        ax.axvline(self.samples, color="black", linestyle="--", label=f"samples seen: {self.samples}")
        ax.set_xscale("log")
        ax.set_xlabel(f"batch size for the {self.kind.replace('_', ' ')} test at η = {self.eta:g}")
        ax.legend()
        return ax

    @classmethod
    def from_micro_batches(
        cls,
        gradients: Iterable[Sequence[Tensor] | Mapping[str, Tensor]],
        micro_batch_size: int,
        *,
        eta: float = 0.5,
        kind: str = "norm",
        quantile: float = 1.0,
    ) -> NormTest:
        r"""The test from gradients of micro-batches or of data-parallel workers, where those of single samples are not to be had.

        The mean of m independent samples has 1/m of a sample's variance, so m times the variance between the micro-batches
        stands for that of the samples. Batch normalization, for which a single sample has no gradient, needs this form.

        Args:
            gradients: one entry for each of K >= 2 micro-batches: its mean gradient, a tensor for each parameter. Read once, or
                twice for ``inner_product``.
            micro_batch_size: m, the same for all.
            eta, kind, quantile: as for `norm_test`.

        Raises:
            ValueError: fewer than two micro-batches, or one with other tensors than the first.

        Example:
            >>> import torch
            >>> a, b = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 2.0])]
            >>> NormTest.from_micro_batches([a, b], micro_batch_size=4, eta=0.5).batch_size  # Var 4·2, mean (2, 2): 8 / (1/4 · 8)
            8
        """
        if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise ValueError(f"'micro_batch_size' must be an integer of at least 1, not {micro_batch_size!r}")
        _check_options(eta, kind, quantile, None)
        named = _Twice(gradients, kind, lambda g: dict(g) if isinstance(g, Mapping) else {str(i): t for i, t in enumerate(g)})
        moments = _Moments()
        for entry in named:
            moments.add({name: t.detach().unsqueeze(0) for name, t in entry.items()})
        if moments.count < 2:
            raise ValueError(f"'gradients' holds {moments.count} micro-batches; their variance needs at least 2")
        along = [_inner({k: t.unsqueeze(0) for k, t in e.items()}, moments.mean) for e in named] if kind == KINDS[2] else []
        return _decide(moments, along, eta, kind, quantile, micro_batch_size)


def norm_test(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    eta: float = 0.5,
    kind: str = "norm",
    quantile: float = 1.0,
    chunk_size: int | None = None,
) -> NormTest:
    r"""Whether a batch is large enough for its gradient to be trusted, and the batch size that would be.

    With the gradients :math:`g_i` of b samples, their mean :math:`\bar g` and sample variances (divided by b - 1) taken entry
    by entry, the batch passes where

    .. math::
        \text{norm:} \; \frac{\|\mathrm{Var}_i(g_i)\|_1}{b} \le η^2 \|\bar g\|^2, \quad
        \text{coordinate:} \; \frac{\mathrm{Var}_i(g_{ij})}{b} \le η^2 \bar g_j^2 \text{ for all } j, \quad
        \text{inner product:} \; \frac{\mathrm{Var}_i(\langle g_i, \bar g \rangle)}{b} \le η^2 \|\bar g\|^4

    and where it does not, the next batch size is the smallest b for which it would, for example
    :math:`\lceil \|\mathrm{Var}_i(g_i)\|_1 / (η^2 \|\bar g\|^2) \rceil`. The norm test goes with `AdaGradNorm` and SGD, the
    coordinate test with ``torch.optim.Adagrad`` and Adam; the inner-product test asks for less, as it only wants a direction
    of descent.

    Args:
        model: gives the output of a batch of inputs. Its parameters that require gradients count. Modes are left as they are.
        loss: of (output, target), the mean over a batch, as a scalar; it is called on batches of one.
        batches: the batch, as one or more parts (inputs, targets): tensors with the samples first. Read once, so that it may
            be a generator of micro-batches; ``inner_product`` reads it twice, for which a list is needed.
        eta: η in (0, ∞), in the theorems below 1; smaller asks for larger batches. (θ for the inner product.)
        kind: ``norm``, ``coordinate`` or ``inner_product``.
        quantile: share of coordinates that must pass the coordinate test, in (0, 1]. The paper's is 1, with which a single
            coordinate at its optimum asks for any batch size.
        chunk_size: at most so many samples' gradients are held at a time; None holds those of one part.

    Returns:
        The verdict as a `NormTest`. Memory: twice ``chunk_size`` gradients, whatever the number of samples.

    Raises:
        ValueError: fewer than 2 samples, gradients with NaN or infinity, no parameter that requires gradients, options out of
            range, or batch normalization in training mode, where a single sample has no gradient (see
            `NormTest.from_micro_batches`).
        TypeError: a part that is not a pair of tensors.

    Cost: the gradients of b samples are b times the parameters in numbers, so on a CPU the test of a multilayer perceptron takes
    many times the backward pass of the same batch, though a seventh of b backward passes. Test a part of the batch, or every few
    steps. Dropout in training mode draws from torch's global generator, for each sample anew.

    Deviations: the authors' code sums the inner products' variances over tensors, without their cross terms, and squares the
    norm of each tensor by itself; here both are over all parameters, as in the definition. ``quantile`` is ours.

    When not to use it: where gradients of samples are far from independent (sequences packed into one batch), or where the
    batch is already as large as the memory or the data.

    Example:
        >>> import torch
        >>> from corollary.optim import AdaptiveBatchSampler, norm_test
        >>> x, y = torch.randn(512, 4), torch.randn(512, 1)
        >>> data, model = torch.utils.data.TensorDataset(x, y), torch.nn.Linear(4, 1)
        >>> optimizer, loss = torch.optim.Adagrad(model.parameters(), lr=0.1), torch.nn.functional.mse_loss
        >>> sampler = AdaptiveBatchSampler(data, batch_size=4, seed=0)
        >>> for inputs, targets in torch.utils.data.DataLoader(data, batch_sampler=sampler):
        ...     optimizer.zero_grad()
        ...     loss(model(inputs), targets).backward()
        ...     if len(inputs) > 1:
        ...         sampler.grow(norm_test(model, loss, [(inputs, targets)], eta=0.5).batch_size)
        ...     optimizer.step()
        >>> sampler.batch_size > 4
        True

    Reference:
        Lau, Liu, Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", arXiv 2402.11215; norm test of
        Byrd, Chin, Nocedal, Wu (2012), inner-product test of Bollapragada, Byrd, Nocedal (2018).
    """
    _check_options(eta, kind, quantile, chunk_size)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("'model' has no parameter that requires gradients")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"'model' has batch normalization in training mode ('{name}'), where one sample has no gradient of its own; "
                "call model.eval(), or give the gradients of micro-batches to NormTest.from_micro_batches"
            )
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())

    def sample_loss(params: _Tensors, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, (params, fixed), (x.unsqueeze(0),)), y.unsqueeze(0))

    of_samples = vmap(grad(sample_loss), in_dims=(None, 0, 0), randomness="different")

    def chunks(part: Any) -> Iterator[_Tensors]:
        x, y = _pair(part)
        size = len(x) if chunk_size is None else chunk_size
        for begin in range(0, len(x), max(size, 1)):
            yield of_samples(params, x[begin : begin + size], y[begin : begin + size])

    parts = _Twice(batches, kind, chunks)
    moments = _Moments()
    for part in parts:
        for gradients in part:
            moments.add(gradients)
    if moments.count < 2:
        raise ValueError(f"'batches' holds {moments.count} samples; their variance needs at least 2 (is it empty or read out?)")
    along = [_inner(g, moments.mean) for part in parts for g in part] if kind == "inner_product" else []
    return _decide(moments, along, eta, kind, quantile, 1)


class _Moments:
    """Running mean and sum of squared deviations, merged part by part without the cancellation of E[g²] - E[g]²."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: _Tensors = {}
        self.squares: _Tensors = {}

    def add(self, samples: _Tensors) -> None:
        if self.mean and {k: v.shape for k, v in self.mean.items()} != {k: v.shape[1:] for k, v in samples.items()}:
            raise ValueError("'gradients': a micro-batch has other tensors or shapes than the first one")
        for name, value in samples.items():
            wide = value if value.dtype == torch.float64 else value.float()
            n, m = self.count, len(wide)
            mean = wide.mean(0)
            squares = (wide - mean).square_().sum(0)
            if not n:
                self.mean[name], self.squares[name] = mean, squares
                continue
            delta = mean - self.mean[name]
            self.mean[name].add_(delta, alpha=m / (n + m))
            self.squares[name].add_(squares).addcmul_(delta, delta, value=n * m / (n + m))
        self.count += len(next(iter(samples.values()))) if samples else 0


class _Twice:
    """An iterable with a function over it, refused beforehand where a test has to read twice what can be read once."""

    def __init__(self, source: Iterable[Any], kind: str, call: Callable[[Any], Any]) -> None:
        if kind == "inner_product" and iter(source) is source:
            raise ValueError("kind 'inner_product' reads its data twice: give a list, not an iterator")
        self.source, self.call = source, call

    def __iter__(self) -> Iterator[Any]:
        return map(self.call, self.source)


def _inner(samples: _Tensors, mean: _Tensors) -> Tensor:
    """⟨g_i, mean⟩ for each sample, in float64."""
    parts = [(samples[k].reshape(len(samples[k]), -1).to(m.dtype) @ m.flatten()).double() for k, m in mean.items()]
    return torch.stack(parts).sum(0)


def _decide(moments: _Moments, along: list[Tensor], eta: float, kind: str, quantile: float, size: int) -> NormTest:
    """The verdict from the moments of ``count`` gradients, each the mean of ``size`` samples."""
    count = moments.count
    variances = {k: s * (size / (count - 1)) for k, s in moments.squares.items()}
    # In float64: sums of squares of small gradients would underflow in float32, and products of two of them sooner.
    traces = {k: float(v.double().sum()) for k, v in variances.items()}
    norms = {k: float(m.double().square().sum()) for k, m in moments.mean.items()}
    norm, variance = math.fsum(norms.values()), math.fsum(traces.values())
    if not math.isfinite(norm + variance):
        raise ValueError(f"gradients must be finite; their mean has squared norm {norm} and their variance is {variance}")
    samples = count * size
    by_layer = [_quotient(traces[k], eta**2 * norms[k]) for k in norms]
    if kind == "coordinate":
        pieces = [_quotients(variances[k].double(), eta**2 * moments.mean[k].double().square()).flatten() for k in norms]
        required = _quantile(torch.cat(pieces), quantile)
        by_layer = [_quantile(piece, quantile) for piece in pieces]
    elif kind == "inner_product":
        variance = float(torch.cat(along).var(correction=1)) * size
        required = _quotient(variance, eta**2 * norm**2)
    else:
        required = _quotient(variance, eta**2 * norm)
    return NormTest(
        kind=kind,
        eta=float(eta),
        samples=samples,
        gradient_norm=math.sqrt(norm),
        variance=variance,
        required=required,
        passed=required <= samples,
        batch_size=max(samples, math.ceil(required)),
        names=list(norms),
        layer_required=by_layer,
    )


def _quotient(variance: float, bound: float) -> float:
    """variance / bound; nothing is asked for where there is no variance, and the largest number where there is no gradient."""
    if variance == 0:
        return 0.0
    return min(variance / bound, _LARGEST) if bound > 0 else _LARGEST


def _quotients(variance: Tensor, bound: Tensor) -> Tensor:
    return torch.where(variance > 0, variance / bound, 0.0).clamp_(max=_LARGEST)


def _quantile(values: Tensor, quantile: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    if not values.numel():
        return 0.0
    place = max(1, math.ceil(quantile * values.numel()))
    return float(values.kthvalue(place).values)


def _pair(part: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(part, Sequence) and len(part) == 2 and all(isinstance(t, Tensor) for t in part)):
        got = [type(t).__name__ for t in part] if isinstance(part, Sequence) else type(part).__name__
        raise TypeError(f"'batches' must hold pairs of tensors (inputs, targets), not {got}")
    x, y = part
    if not x.dim() or not y.dim() or len(x) != len(y):
        raise ValueError(
            f"'batches': inputs {tuple(x.shape)} and targets {tuple(y.shape)} must have equally many samples first"
        )
    return x, y


def _check_options(eta: float, kind: str, quantile: float, chunk_size: int | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"'kind' must be one of {', '.join(KINDS)}, not {kind!r}")
    if not 0 < eta < math.inf:
        raise ValueError(f"'eta' must be above 0 and finite, not {eta}")
    if not 0 < quantile <= 1:
        raise ValueError(f"'quantile' must be in (0, 1], not {quantile}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"'chunk_size' must be at least 1, not {chunk_size}")
