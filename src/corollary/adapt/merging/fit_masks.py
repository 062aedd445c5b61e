"""Concrete masks learned without labels, in two levels: masks above, merging below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corollary.adapt.merging.adamerging import Factors, adapt_factors
from corollary.adapt.merging.lazy import MergeError
from corollary.adapt.merging.masks import ConcreteMasks, concrete_sample, uniform_noise
from corollary.adapt.merging.objective import Head, UnlabelledTasks

MERGING = ("task_arithmetic", "taskwise_adamerging", "layerwise_adamerging")


def fit_concrete_masks(
    model: nn.Module,
    checkpoints: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor | Iterable[Any]],
    *,
    heads: Sequence[Head] | None = None,
    merging: str = "task_arithmetic",
    scale: float = 0.3,
    temperature: float = 0.5,
    steps: int = 2000,
    lr: float = 1e-3,
    inner_lr: float = 1.0,
    adapt_steps: int = 1000,
    adapt_lr: float = 1e-3,
    how: str = "sample",
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> ConcreteMasks:
    r"""Learn the subspace that all tasks share, by making the model merged within it sure of itself on every task.

    One mask m with logits x for all task vectors; the upper level minimizes over x, the lower one over the factors of merging:

    .. math::
        \min_x \; \mathbb{E}_{m \sim x} \sum_t H\Big(f\big(D_t;\; \theta_0 + \tfrac{m}{\bar m} \odot
        \textstyle\sum_s \lambda^*_s(m)\, \tau_s\big)\Big)

    Each step draws a mask. With AdaMerging below, the factors start anew, take one step of Adam on the entropy, and are held
    while the logits take theirs, on other inputs: the gradient is of first order, as in the authors' code. After the logits, the
    factors are adapted with the final mask held. Task arithmetic has no lower level: its factor is ``scale``.

    Args:
        model: has the base's weights θ₀ in its trainable parameters; left as it is.
        checkpoints: T mappings that hold the fine-tuned parameters by name.
        inputs: for each task a tensor (n, ...), or an iterable of batches such as a DataLoader; labels in it are ignored.
        heads: for each task what maps the model's output to logits; None where the model gives them itself.
        merging: ``"task_arithmetic"``, ``"taskwise_adamerging"`` or ``"layerwise_adamerging"``.
        scale: λ of task arithmetic, and where AdaMerging's factors start.
        temperature: of the Concrete variables.
        steps: of Adam on the logits, which start at 0.
        lr: of that.
        inner_lr: of the lower level's step.
        adapt_steps: of Adam on the factors at the end; without effect for task arithmetic.
        adapt_lr: of that.
        how: how the final mask is made of the logits, as in `ConcreteMasks`.
        batch_size: of batches drawn from tensors.
        seed: of masks and batches.
        progress: called after each step with its number and the loss.

    Returns:
        `ConcreteMasks` for the model's trainable parameters, with the factors: what `concrete` takes, and ``corollary merge
        --masks`` once they are saved.

    Raises:
        MergeError: where something does not fit; the message names it.

    When not to use it: where the merged model is hardly better than chance on some task: entropy then rewards predicting one
    class for everything. Look at the task's accuracy on a few labelled samples afterwards.

    Example:
        >>> import torch
        >>> from corollary.adapt import concrete, fit_concrete_masks
        >>> model = torch.nn.Linear(4, 3)
        >>> tuned = [{"weight": torch.randn(3, 4), "bias": torch.randn(3)} for _ in range(2)]
        >>> masks = fit_concrete_masks(model, tuned, [torch.randn(8, 4)] * 2, steps=3, lr=0.1)
        >>> merged = concrete(model.state_dict(), tuned, masks)
        >>> _ = model.load_state_dict(merged)

    Source: A. Tang et al., Concrete Subspace Learning, arXiv 2312.06173, section 3.3; defaults, rescaling and the order of steps
    from github.com/tanganke/subspace_fusion, one mask for both levels of a step from the authors' later github.com/tanganke/fusion_bench.
    """
    if merging not in MERGING:
        raise MergeError(f"'merging' is '{merging}'; allowed: {', '.join(MERGING)}")
    tasks = UnlabelledTasks(model, checkpoints, inputs, heads, batch_size, seed)
    factors = Factors(tasks, scale, layerwise=merging == "layerwise_adamerging")
    logits = {name: torch.zeros_like(start, requires_grad=True) for name, start in tasks.base.items()}
    made = ConcreteMasks(logits, factors.detached(), temperature=temperature, seed=seed, how=how)  # checks its options first
    generator = torch.Generator().manual_seed(seed)
    upper = torch.optim.Adam(logits.values(), lr=lr)
    lower = torch.optim.Adam([factors.raw], lr=inner_lr)
    for step in range(steps):
        masks = {name: _sample(x, temperature, generator) for name, x in logits.items()}
        if merging != "task_arithmetic":
            factors.reset()
            loss = tasks.entropy(tasks.merged(factors(), {name: mask.detach() for name, mask in masks.items()}))
            (factors.raw.grad,) = torch.autograd.grad(loss, [factors.raw])
            lower.step()
        loss = tasks.entropy(tasks.merged(factors.detached(), masks))
        for x, gradient in zip(logits.values(), torch.autograd.grad(loss, list(logits.values())), strict=True):
            x.grad = gradient
        upper.step()
        if progress is not None:
            progress(step, float(loss.detach()))
    final = {name: x.detach() for name, x in logits.items()}
    if merging != "task_arithmetic":
        factors.reset()
        made = ConcreteMasks(final, {}, temperature=temperature, seed=seed, how=how)
        adapt_factors(tasks, factors, {name: made.draw(name) for name in final}, adapt_steps, adapt_lr, progress)
    return ConcreteMasks(final, factors.detached(), temperature=temperature, seed=seed, how=how)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A mask with mean 1, differentiable in the logits."""
    mask = concrete_sample(logits, uniform_noise(logits, generator), temperature)
    return mask / mask.mean()
