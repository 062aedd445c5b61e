"""Optimizers and schedules with the interface of ``torch.optim``."""

from corollary.optim.adahessian import AdaHessian
from corollary.optim.asam import ASAM
from corollary.optim.joint import JointOptimizer, split_parameters
from corollary.optim.multiplier_lr import MultiplierLR
from corollary.optim.rsgd import RiemannianSGD
from corollary.optim.sam import SAM
from corollary.optim.tram import TRAM, kl_divergence

__all__ = [
    "AdaHessian",
    "RiemannianSGD",
    "JointOptimizer",
    "MultiplierLR",
    "split_parameters",
    "SAM",
    "ASAM",
    "TRAM",
    "kl_divergence",
]
