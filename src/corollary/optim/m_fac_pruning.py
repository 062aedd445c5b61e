"""One-shot pruning by optimal brain surgeon with M-FAC's inverse Fisher matrix, of any module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from corollary.optim.matrix_free_fisher import MatrixFreeFisher

_PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def mfac_prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    sparsity: float,
    *,
    parameters: Sequence[tuple[nn.Module, str]] | None = None,
    damp: float = 1e-5,
    block_size: int | None = None,
    update: str = "joint",
    recomputations: int = 1,
) -> dict[str, Tensor]:
    r"""Prune the weights that the loss can best do without, and move the others to make up for them.

    With F the damped empirical Fisher matrix of one gradient a batch (`MatrixFreeFisher`), the weights with the least

    .. math::
        ρ_i = \frac{w_i^2}{2 \, [F^{-1}]_{ii}}

    over all given parameters are removed, and the remaining ones take the step of `MatrixFreeFisher.removal_step`. The result is
    pruned as ``torch.nn.utils.prune`` prunes: ``prune.remove(module, "weight")`` makes it permanent, and entries that such a mask
    has removed before stay so and count in ``sparsity``.

    Args:
        model: any module. It is in eval mode while gradients are taken, and in its former mode afterwards.
        batches: each gives one gradient; as many as there are make m. Small batches tell more: the Fisher matrix is one of
            samples. With ``recomputations`` above 1 it is gone through that many times, so give a list or a DataLoader.
        loss: ``loss(model, batch)`` gives the batch's scalar loss.
        sparsity: share of the entries of ``parameters`` that are zero afterwards, in (0, 1).
        parameters: pairs of a module and a parameter's name, as in ``prune.global_unstructured``; None takes the weights of all
            linear and convolutional layers.
        damp: λ > 0. To be chosen by a held-out loss: large values turn to magnitude pruning.
        block_size: consecutive remaining weights in a block of F; None keeps F whole.
        update: 'joint' (the best step for all removed weights together), 'separate' (the authors' sum of single steps) or 'none'.
        recomputations: go to the sparsity in so many parts, removing an equal share of what is left in each, with new gradients.

    Returns:
        For each parameter, by its name in the model, the mask: bool, True where a weight remains.

    Memory: the gradients of the remaining entries, m times 4 bytes each in float32, and some megabytes.

    Raises:
        ValueError: a number out of range, no batch, no parameter, one given twice, a sparsity below the present one, or gradients
            that are not finite.
        TypeError: a parameter that is not real and floating, a module without it, or a loss that is no tensor.

    When not to use it: where the model is trained on after pruning for long: then magnitudes do nearly as well. A loss that is at
    its minimum for every single sample has no gradients and says nothing.

    Deviations from the paper: 'joint', where the paper sums single steps. The authors' code leaves the last of its m gradients
    zero; here all are used.

    Example:
        >>> import torch
        >>> from torch.nn.functional import mse_loss
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> model, x = torch.nn.Linear(6, 4), torch.randn(40, 6)
        >>> y = model(x).detach() + torch.randn(40, 4)
        >>> batches = [(x[i : i + 1], y[i : i + 1]) for i in range(40)]
        >>> masks = mfac_prune(model, batches, lambda m, batch: mse_loss(m(batch[0]), batch[1]), 0.5, damp=1e-3)
        >>> int(masks["weight"].sum()), int((model.weight == 0).sum())
        (12, 12)

    Reference:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arXiv 2107.03356, pruning by the static algorithm; saliency and update after Hassibi and Stork, 1992.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"'sparsity' must be in (0, 1), not {sparsity}")
    if recomputations < 1:
        raise ValueError(f"'recomputations' must be at least 1, not {recomputations}")
    if update not in ("joint", "separate", "none"):
        raise ValueError(f"'update' must be one of joint, separate, none, not {update!r}")
    chosen = _chosen(model, parameters)
    leaves = [_leaf(module, name) for module, name in chosen]
    masks = torch.cat([_mask(module, name).reshape(-1) for module, name in chosen])
    total, dense = masks.numel(), float(masks.double().mean())
    if round(sparsity * total) < total - int(masks.sum()):
        raise ValueError(f"'sparsity' is {sparsity}, but masks have removed a share of {1 - dense:.4f} already")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for part in range(1, recomputations + 1):
            share = dense * ((1 - sparsity) / dense) ** (part / recomputations)
            count = int(masks.sum()) - (total - round((1 - share) * total))
            rows = _gradient_rows(model, batches, loss, leaves, masks)
            with torch.no_grad():
                weight = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
                kept, removed = obs_step(weight[masks], rows, count, damp, block_size=block_size, update=update)
                weight[~masks] = 0
                weight[masks] = kept
                masks[masks.clone()] = ~removed
                for leaf, piece in zip(leaves, torch.split(weight, [leaf.numel() for leaf in leaves]), strict=True):
                    leaf.copy_(piece.view_as(leaf))
    finally:
        for module, training in modes:
            module.training = training
    pieces = [piece.view_as(leaf) for piece, leaf in zip(torch.split(masks, [p.numel() for p in leaves]), leaves, strict=True)]
    for (module, name), piece in zip(chosen, pieces, strict=True):
        prune.custom_from_mask(module, name, piece)  # type: ignore[no-untyped-call]
    names = {id(module): name for name, module in model.named_modules()}
    return {
        ".".join(filter(None, (names.get(id(module), ""), name))): piece
        for (module, name), piece in zip(chosen, pieces, strict=True)
    }


def obs_step(
    weight: Tensor, gradients: Tensor, count: int, damp: float, *, block_size: int | None = None, update: str = "joint"
) -> tuple[Tensor, Tensor]:
    """Remove the ``count`` entries of least saliency from a vector of weights; see `mfac_prune`.

    Args:
        weight: (d,).
        gradients: (m, d), overwritten.
        count: how many entries go, from 0 to d.
        damp: λ > 0.
        block_size: as in `mfac_prune`.
        update: as in `mfac_prune`.

    Returns:
        The new weights (d,), and which are removed, bool (d,).
    """
    fisher = MatrixFreeFisher(gradients, damp, block_size=block_size, in_place=True)
    saliency = weight.square() / (2 * fisher.inverse_diagonal())
    removed = torch.zeros_like(weight, dtype=torch.bool)
    removed[saliency.argsort(stable=True)[:count]] = True
    if update != "none":
        weight = weight + fisher.removal_step(weight, removed, joint=update == "joint")
    return weight.masked_fill(removed, 0), removed


def _chosen(model: nn.Module, parameters: Sequence[tuple[nn.Module, str]] | None) -> list[tuple[nn.Module, str]]:
    if parameters is None:
        parameters = [(module, "weight") for module in model.modules() if isinstance(module, _PRUNABLE)]
    if not parameters:
        raise ValueError("'parameters' is empty; without it the model must have a linear or convolutional layer")
    leaves = []
    for i, (module, name) in enumerate(parameters):
        leaf = getattr(module, f"{name}_orig", getattr(module, name, None))
        if not isinstance(leaf, nn.Parameter):
            raise TypeError(f"'parameters[{i}]': {type(module).__name__} has no parameter '{name}'")
        if not leaf.is_floating_point():
            raise TypeError(f"'parameters[{i}]' is {leaf.dtype}; allowed: real floating")
        if not leaf.numel():
            raise ValueError(f"'parameters[{i}]' is empty, of shape {tuple(leaf.shape)}")
        if not leaf.requires_grad:
            raise ValueError(f"'parameters[{i}]' does not require gradients; call requires_grad_() on it")
        leaves.append(leaf)
    if len({id(leaf) for leaf in leaves}) < len(leaves):
        raise ValueError("'parameters' has one parameter twice; give a shared one once")
    return list(parameters)


def _leaf(module: nn.Module, name: str) -> nn.Parameter:
    """The trainable tensor: under a mask of ``torch.nn.utils.prune`` it is called ``<name>_orig``."""
    leaf = getattr(module, f"{name}_orig", None)
    return leaf if isinstance(leaf, nn.Parameter) else getattr(module, name)


def _mask(module: nn.Module, name: str) -> Tensor:
    mask = getattr(module, f"{name}_mask", None)
    return torch.ones_like(_leaf(module, name), dtype=torch.bool) if mask is None else mask.bool()


def _gradient_rows(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    leaves: Sequence[nn.Parameter],
    masks: Tensor,
) -> Tensor:
    """One gradient a batch, of the remaining entries: (m, remaining)."""
    every, kept = bool(masks.all()), int(masks.sum())
    # One that knows its length gets its room at once; stacking afterwards would need it twice.
    room = torch.empty(len(batches), kept, dtype=leaves[0].dtype, device=masks.device) if isinstance(batches, Sized) else None
    rows: list[Tensor] = []
    for batch in batches:
        with torch.enable_grad():
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                kind = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"'loss' must give a scalar tensor, not {kind}")
            gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        row = torch.cat([gradient.reshape(-1) for gradient in gradients])
        row = row if every else row[masks]
        rows.append(row if room is None else room[len(rows)].copy_(row))
    if not rows:
        raise ValueError("'batches' is empty; with recomputations above 1 it must be possible to go through it again")
    return torch.stack(rows) if room is None else room[: len(rows)]
