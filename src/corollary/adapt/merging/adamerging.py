"""How much of each task vector goes into each tensor, fitted to inputs without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corollary.adapt.merging.lazy import MergeError
from corollary.adapt.merging.objective import Head, UnlabelledTasks


class Factors:
    """Trainable λ of the task vectors, for each tensor or for all alike, kept in [0, 1] as the authors do.

    Args:
        tasks: gives the tensors' names.
        scale: where all of them start.
        layerwise: factors for each tensor; otherwise one row for all.
    """

    def __init__(self, tasks: UnlabelledTasks, scale: float, layerwise: bool) -> None:
        if not 0 <= scale <= 1:
            raise MergeError(f"'scale' must lie in [0, 1], not {scale}")
        self.names, self.scale = list(tasks.base), scale
        like = next(iter(tasks.base.values()))
        dtype = torch.promote_types(like.dtype, torch.float32)  # half precision would swallow the steps
        shape = (len(self.names) if layerwise else 1, len(tasks))
        self.raw = torch.full(shape, scale, device=like.device, dtype=dtype, requires_grad=True)

    def __call__(self) -> dict[str, Tensor]:
        rows = self.raw.clamp(0, 1).expand(len(self.names), -1)
        return dict(zip(self.names, rows, strict=True))

    def detached(self) -> dict[str, Tensor]:
        """The factors by tensor, cut off from the graph."""
        return {name: row.detach().clone() for name, row in self().items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Back to where they started."""
        self.raw.fill_(self.scale)


def adapt_factors(
    tasks: UnlabelledTasks,
    factors: Factors,
    masks: Mapping[str, Tensor] | None,
    steps: int,
    lr: float,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Minimize the entropy over the factors, in place; the masks stay as they are."""
    optimizer = torch.optim.Adam([factors.raw], lr=lr)
    for step in range(steps):
        loss = tasks.entropy(tasks.merged(factors(), masks))
        (factors.raw.grad,) = torch.autograd.grad(loss, [factors.raw])
        optimizer.step()
        if progress is not None:
            progress(step, float(loss.detach()))


def fit_adamerging(
    model: nn.Module,
    checkpoints: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor | Iterable[Any]],
    *,
    heads: Sequence[Head] | None = None,
    layerwise: bool = True,
    scale: float = 0.3,
    steps: int = 1000,
    lr: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    r"""AdaMerging: the factors of task arithmetic that make the merged model sure of itself on every task's unlabelled inputs.

    .. math:: \min_{\lambda} \sum_t \mathbb{E}_{x \sim D_t} H\big(f(x;\; \theta_0 + \textstyle\sum_s \lambda_s \tau_s)\big)

    Args:
        model: has the base's weights θ₀ in its trainable parameters; left as it is.
        checkpoints: T mappings that hold the fine-tuned parameters by name.
        inputs: for each task a tensor (n, ...), or an iterable of batches such as a DataLoader; labels in it are ignored.
        heads: for each task what maps the model's output to logits; None where the model gives them itself.
        layerwise: factors for each tensor, otherwise for each task alone.
        scale: where every factor starts.
        steps: of Adam.
        lr: of Adam.
        batch_size: of batches drawn from tensors.
        seed: of those draws.
        progress: called after each step with its number and the loss.

    Returns:
        Name of each trainable parameter to T factors in [0, 1]: what `task_arithmetic` takes as ``scale``. Buffers and frozen
        parameters are not among them.

    Raises:
        MergeError: where something does not fit; the message names it.

    When not to use it: where the merged model is hardly better than chance. Then the surest prediction is the same class for
    everything, and entropy finds that.

    Example:
        >>> import torch
        >>> from corollary.adapt import fit_adamerging
        >>> model = torch.nn.Linear(4, 3)
        >>> tuned = [{"weight": torch.randn(3, 4), "bias": torch.randn(3)} for _ in range(2)]
        >>> factors = fit_adamerging(model, tuned, [torch.randn(8, 4)] * 2, steps=2)
        >>> {name: tuple(f.shape) for name, f in factors.items()}
        {'weight': (2,), 'bias': (2,)}

    Source: E. Yang et al., AdaMerging, arXiv 2310.02575, equations 4 and 5; start, steps and rate as in the Concrete paper's code.
    """
    tasks = UnlabelledTasks(model, checkpoints, inputs, heads, batch_size, seed)
    factors = Factors(tasks, scale, layerwise)
    adapt_factors(tasks, factors, None, steps, lr, progress)
    return factors.detached()
