"""Optimizers and schedules with the interface of ``torch.optim``."""

from corollary.optim.adadagrad import NormTest, norm_test
from corollary.optim.adagrad_norm import AdaGradNorm
from corollary.optim.adahessian import AdaHessian
from corollary.optim.adamp import SGDP, AdamP
from corollary.optim.armijo import ArmijoGD
from corollary.optim.asam import ASAM
from corollary.optim.badam import BAdam
from corollary.optim.batch_sampler import AdaptiveBatchSampler
from corollary.optim.dct_adamw import DCTAdamW
from corollary.optim.fira import Fira
from corollary.optim.frugal import Frugal
from corollary.optim.galore import GaLore
from corollary.optim.gradient_normalized_smoothness import GradientNormalizedNewton
from corollary.optim.int8_weight import Int8Weight
from corollary.optim.joint import JointOptimizer, split_parameters
from corollary.optim.kappas import L1, Entropic, GroupL2, Huber, Kappa, LogCosh, Lp
from corollary.optim.large_step_perceptron import BatchPerceptron, LogisticGD, NormalizedLogisticGD
from corollary.optim.last_iterate_sgd import CompositeMirrorDescent, LastIterateLR
from corollary.optim.lion_k import LionK
from corollary.optim.lr_vs_batch import SLQLearningRate, batch_eigenvalues, batch_noise, scale_lr
from corollary.optim.m_fac import MFAC
from corollary.optim.m_fac_pruning import mfac_prune
from corollary.optim.matrix_free_fisher import MatrixFreeFisher
from corollary.optim.multiplier_lr import MultiplierLR
from corollary.optim.projected import ProjectedAdamW, low_rank_groups
from corollary.optim.q_galore import QGaLore
from corollary.optim.quantize_weights import quantize_weights_
from corollary.optim.refined_schedules import GradNormRecorder, LinearDecay, RefinedSchedule, refine_schedule
from corollary.optim.rsgd import RiemannianSGD
from corollary.optim.sam import SAM
from corollary.optim.sliding_fisher import SlidingFisher
from corollary.optim.state_bytes import state_bytes, weight_bytes
from corollary.optim.target_surrogates import SSO, TargetSurrogate
from corollary.optim.tram import TRAM, kl_divergence

__all__ = [
    "AdaGradNorm",
    "AdaptiveBatchSampler",
    "NormTest",
    "norm_test",
    "AdaHessian",
    "ArmijoGD",
    "ASAM",
    "Int8Weight",
    "quantize_weights_",
    "JointOptimizer",
    "split_parameters",
    "SLQLearningRate",
    "batch_eigenvalues",
    "batch_noise",
    "scale_lr",
    "CompositeMirrorDescent",
    "LastIterateLR",
    "MultiplierLR",
    "GradNormRecorder",
    "LinearDecay",
    "RefinedSchedule",
    "refine_schedule",
    "RiemannianSGD",
    "SAM",
    "SSO",
    "TargetSurrogate",
    "TRAM",
    "kl_divergence",
    "BAdam",
    "DCTAdamW",
    "Fira",
    "Frugal",
    "GaLore",
    "GradientNormalizedNewton",
    "ProjectedAdamW",
    "QGaLore",
    "low_rank_groups",
    "state_bytes",
    "weight_bytes",
    "AdamP",
    "SGDP",
    "LionK",
    "Kappa",
    "L1",
    "Lp",
    "GroupL2",
    "Huber",
    "LogCosh",
    "Entropic",
    "MFAC",
    "MatrixFreeFisher",
    "SlidingFisher",
    "mfac_prune",
    "LogisticGD",
    "NormalizedLogisticGD",
    "BatchPerceptron",
]
