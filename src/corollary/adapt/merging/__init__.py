"""Merging checkpoints of one pretrained model, tensor by tensor."""

from corollary.adapt.merging.adamerging import fit_adamerging
from corollary.adapt.merging.average import average
from corollary.adapt.merging.concrete import concrete
from corollary.adapt.merging.fit_masks import fit_concrete_masks
from corollary.adapt.merging.lazy import MergedCheckpoint, MergeError
from corollary.adapt.merging.masks import ConcreteMasks, load_concrete_masks
from corollary.adapt.merging.task_arithmetic import task_arithmetic
from corollary.adapt.merging.ties import ties

__all__ = [
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
]
