"""Losses as ``nn.Module`` with ``reduction``, and as functions."""

from corollary.losses.adversarial import TradesLoss, kl_shift, pgd, trades_loss
from corollary.losses.comp_sum import CompSumLoss, comp_sum_bound, comp_sum_loss, comp_sum_transform
from corollary.losses.smooth_adversarial import (
    SmoothAdversarialCompSumLoss,
    margin_shift,
    smooth_adversarial_comp_sum_loss,
)

__all__ = [
    "CompSumLoss",
    "comp_sum_loss",
    "comp_sum_transform",
    "comp_sum_bound",
    "SmoothAdversarialCompSumLoss",
    "smooth_adversarial_comp_sum_loss",
    "margin_shift",
    "TradesLoss",
    "trades_loss",
    "kl_shift",
    "pgd",
]
