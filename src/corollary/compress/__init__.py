"""Making a trained model smaller: low-rank factors in the metric that counts, compensation, quantizers, key-value caches."""

from corollary.compress.base import CompressConfig, compress, compression_report
from corollary.compress.budget import Allocation, allocate_ranks, uniform_ranks
from corollary.compress.calibration import Calibration, Moments, calibrate, load_calibration
from corollary.compress.checkpoint import compress_checkpoint, linear_layers
from corollary.compress.ctr_lowrank import CTRLowRank, FactoredFields
from corollary.compress.eora import EoRA, Quantize
from corollary.compress.gaqat import GAQAT, gaqat_groups, gradient_disorder
from corollary.compress.kv_cache import MatryoshkaCache
from corollary.compress.layers import Factored, factored, set_factors
from corollary.compress.lord import LoRD
from corollary.compress.lowrank import SVD, FeaturePCA, LowRank
from corollary.compress.lsq import (
    LSQConfig,
    LSQConv2d,
    LSQLinear,
    LSQQuantizer,
    lsq_layers,
    lsq_quantize,
    quantize_aware,
)
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
from corollary.compress.matryoshka_kv import (
    MatryoshkaAttention,
    cayley,
    decode,
    drawn_kv_ranks,
    inverse_cayley,
    kv_distillation_loss,
    kv_ranks,
    matryoshka_kv,
    search_kv_ranks,
    set_kv_ranks,
)
from corollary.compress.packed import PackedLinear
from corollary.compress.quantizers import gptq, round_to_nearest, two_four, two_four_mask
from corollary.compress.report import CompressionReport, LayerReport
from corollary.compress.splitting import factorize, fold_weight, split_layer, splittable, unfold_weight
from corollary.compress.state import load, save
from corollary.compress.trp import TrainedRankPruning, energy_truncation, rank_pruning_groups

__all__ = [
    "compress",
    "calibrate",
    "compress_checkpoint",
    "linear_layers",
    "save",
    "load",
    "CompressConfig",
    "LowRank",
    "SVD",
    "FeaturePCA",
    "LoRD",
    "CTRLowRank",
    "FactoredFields",
    "Quantize",
    "EoRA",
    "Calibration",
    "Moments",
    "load_calibration",
    "compression_report",
    "CompressionReport",
    "LayerReport",
    "Allocation",
    "allocate_ranks",
    "uniform_ranks",
    "Factored",
    "factored",
    "set_factors",
    "PackedLinear",
    "round_to_nearest",
    "two_four",
    "two_four_mask",
    "gptq",
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
    "MatryoshkaAttention",
    "MatryoshkaCache",
    "matryoshka_kv",
    "kv_ranks",
    "set_kv_ranks",
    "drawn_kv_ranks",
    "kv_distillation_loss",
    "search_kv_ranks",
    "decode",
    "cayley",
    "inverse_cayley",
    "TrainedRankPruning",
    "energy_truncation",
    "rank_pruning_groups",
    "GAQAT",
    "gaqat_groups",
    "gradient_disorder",
    "LSQConfig",
    "LSQConv2d",
    "LSQLinear",
    "LSQQuantizer",
    "lsq_layers",
    "lsq_quantize",
    "quantize_aware",
]
