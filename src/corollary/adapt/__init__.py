"""Changing a pretrained model cheaply: adapters, merging, steering, continual learning and unlearning."""

from corollary.adapt.base import Adapter, AdapterConfig, LowRankAdapter
from corollary.adapt.continual import ContinualLearner
from corollary.adapt.contrastive_entropy import contrastive_entropy
from corollary.adapt.cuber import CUBER
from corollary.adapt.ewc import EWC
from corollary.adapt.g_act import GACT, SteeringHandle
from corollary.adapt.gpm import GPM
from corollary.adapt.inject import adapt, adapter_penalty, delete_adapter, disable_adapters, set_adapters
from corollary.adapt.interop import from_peft, to_peft
from corollary.adapt.loldu import LoLDU
from corollary.adapt.lora import LoRA
from corollary.adapt.lora_limits import LoRAGradient, NormThreshold, lora_attention_gradient, norm_threshold
from corollary.adapt.lora_sb import LoRASB, mean_gradients
from corollary.adapt.lora_xs import LoRAXS
from corollary.adapt.merged import merge_adapters, merge_and_unload, unmerge_adapters
from corollary.adapt.merging import (
    ConcreteMasks,
    MergedCheckpoint,
    MergeError,
    average,
    concrete,
    fit_adamerging,
    fit_concrete_masks,
    load_concrete_masks,
    task_arithmetic,
    ties,
)
from corollary.adapt.ood_detector import OODDetector
from corollary.adapt.orthogonal_lora import OrthogonalLoRA, add_request
from corollary.adapt.pego import PEGO
from corollary.adapt.polynomial_attention import polynomial_attention
from corollary.adapt.randlora import RandLoRA
from corollary.adapt.relora import ReLoRA
from corollary.adapt.report import AdapterReport, adapter_report
from corollary.adapt.sara import ProgressiveAdjustment, SaRA
from corollary.adapt.site import Site
from corollary.adapt.snnk import BundledSNNK, SNNKLinear
from corollary.adapt.snnk_adapter import SNNKAdapter
from corollary.adapt.soft_loading import SoftLoading
from corollary.adapt.sst import SparseSpectralTraining, SSTLinear, from_sst, to_sst
from corollary.adapt.state import adapter_state_dict, load_adapter, load_adapter_state_dict, save_adapter
from corollary.adapt.svfit import SVFit
from corollary.adapt.triadaptlora import RankGrowth, TriAdaptLoRA
from corollary.adapt.urf import urf_input, urf_weight
from corollary.adapt.vera import VeRA

__all__ = [
    "adapt",
    "set_adapters",
    "disable_adapters",
    "delete_adapter",
    "merge_adapters",
    "unmerge_adapters",
    "merge_and_unload",
    "adapter_state_dict",
    "load_adapter_state_dict",
    "save_adapter",
    "load_adapter",
    "to_peft",
    "from_peft",
    "adapter_report",
    "AdapterReport",
    "adapter_penalty",
    "Adapter",
    "LowRankAdapter",
    "AdapterConfig",
    "Site",
    "LoRA",
    "LoRAXS",
    "VeRA",
    "RandLoRA",
    "PEGO",
    "TriAdaptLoRA",
    "RankGrowth",
    "SaRA",
    "ProgressiveAdjustment",
    "SSTLinear",
    "to_sst",
    "from_sst",
    "SparseSpectralTraining",
    "ReLoRA",
    "SVFit",
    "LoLDU",
    "LoRASB",
    "SNNKAdapter",
    "SNNKLinear",
    "BundledSNNK",
    "urf_input",
    "urf_weight",
    "mean_gradients",
    "polynomial_attention",
    "lora_attention_gradient",
    "LoRAGradient",
    "norm_threshold",
    "NormThreshold",
    "average",
    "task_arithmetic",
    "ties",
    "concrete",
    "fit_concrete_masks",
    "ConcreteMasks",
    "load_concrete_masks",
    "fit_adamerging",
    "MergedCheckpoint",
    "MergeError",
    "ContinualLearner",
    "GPM",
    "CUBER",
    "EWC",
    "OrthogonalLoRA",
    "add_request",
    "contrastive_entropy",
    "OODDetector",
    "SoftLoading",
    "GACT",
    "SteeringHandle",
]
