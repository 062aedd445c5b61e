"""Making a trained model smaller: low-rank factors in the metric that counts, compensation, quantizers, key-value caches."""

from corollary.compress.maestro import (
    MaestroConv2d,
    MaestroLinear,
    RankSampler,
    decompose,
    hierarchical_group_lasso,
    maestro_layers,
    ranks_set,
    shrink,
)
from corollary.compress.trp import TrainedRankPruning, energy_truncation, fold_weight, rank_pruning_groups, unfold_weight

__all__ = [
    "MaestroConv2d",
    "MaestroLinear",
    "RankSampler",
    "decompose",
    "hierarchical_group_lasso",
    "maestro_layers",
    "ranks_set",
    "shrink",
    "TrainedRankPruning",
    "energy_truncation",
    "fold_weight",
    "rank_pruning_groups",
    "unfold_weight",
]
