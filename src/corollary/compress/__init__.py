"""Making a trained model smaller: low-rank factors in the metric that counts, compensation, quantizers, key-value caches."""

from corollary.compress.maestro import (
    MaestroConv2d,
    MaestroLinear,
    RankSampler,
    decompose,
    deploy,
    hierarchical_group_lasso,
    maestro_layers,
    ranks_set,
    shrink,
)
from corollary.compress.splitting import factorize, fold_weight, split_layer, splittable, unfold_weight
from corollary.compress.trp import TrainedRankPruning, energy_truncation, rank_pruning_groups

__all__ = [
    "MaestroConv2d",
    "MaestroLinear",
    "RankSampler",
    "decompose",
    "deploy",
    "hierarchical_group_lasso",
    "maestro_layers",
    "ranks_set",
    "shrink",
    "factorize",
    "fold_weight",
    "split_layer",
    "splittable",
    "unfold_weight",
    "TrainedRankPruning",
    "energy_truncation",
    "rank_pruning_groups",
]
