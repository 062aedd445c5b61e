"""Making a trained model smaller: low-rank factors in the metric that counts, compensation, quantizers, key-value caches."""

from corollary.compress.trp import TrainedRankPruning, energy_truncation, fold_weight, rank_pruning_groups, unfold_weight

__all__ = ["TrainedRankPruning", "energy_truncation", "fold_weight", "rank_pruning_groups", "unfold_weight"]
