"""Concrete masks: for every weight the odds of lying in the subspace that all tasks share; drawn, saved and loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corollary.adapt.merging.lazy import MergeError
from corollary.data import CheckpointWriter, SafetensorsFile, TensorSpec, load_safetensors
from corollary.data.loaders import LoadError

_FORMAT = "corollary-concrete-masks"
DRAWS = ("sample", "mean", "binary")


def concrete_sample(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    r"""The binary Concrete variable of uniform noise: :math:`\sigma((x + \log u - \log(1 - u)) / \lambda)`, differentiable in x.

    Args:
        logits: x, of any shape.
        noise: u, of the same shape, in [0, 1].
        temperature: λ > 0; towards 0 it becomes a Bernoulli variable with probability σ(x) of being 1.

    Returns:
        The mask, in (0, 1).
    """
    # Neither end of the interval has a finite logarithm.
    tiny = torch.finfo(noise.dtype).eps / 2
    u = noise.clamp(tiny, 1 - tiny)
    return torch.sigmoid((logits + u.log() - (-u).log1p()) / temperature)


def uniform_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise for logits: the same numbers whatever their dtype and device, in single precision at least."""
    noise = torch.rand(like.shape, generator=generator)
    return noise.to(like.device, torch.promote_types(like.dtype, noise.dtype))


class ConcreteMasks(Mapping[str, Tensor]):
    r"""One mask for all tasks, as logits: a mapping from a tensor's name to the logits x of its entries' masks.

    `draw` makes the mask of a tensor, :math:`m = \sigma((x + \log u - \log (1 - u)) / \lambda)` with u uniform, and rescales it
    to mean 1. The noise of a tensor hangs on the seed and its name alone: in whatever order tensors are merged, and by
    whichever process, the mask is the same.

    Args:
        logits: name to logits; a lazy mapping is read as masks are drawn.
        scales: name to the factors of the T task vectors in that tensor, as the fit left them.
        temperature: λ of the draw, above 0.
        seed: of the noise.
        how: ``"sample"``, the Concrete variable itself, which the authors evaluate; ``"mean"``, the probability σ(x), without
            noise; ``"binary"``, a sample rounded to 0 or 1.

    Raises:
        MergeError: where an option is out of range.

    Example:
        >>> import torch
        >>> from corollary.adapt import ConcreteMasks
        >>> masks = ConcreteMasks({"w": torch.tensor([0.0, 30.0])}, {"w": torch.tensor([0.3, 0.3])}, how="mean")
        >>> masks.draw("w")
        tensor([0.6667, 1.3333])

    Source: A. Tang et al., arXiv 2312.06173, section 3.2 and appendix A; C. Maddison et al., arXiv 1611.00712.
    """

    def __init__(
        self,
        logits: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        *,
        temperature: float = 0.5,
        seed: int = 0,
        how: str = "sample",
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise MergeError(f"'temperature' must be finite and above 0, not {temperature}")
        if how not in DRAWS:
            raise MergeError(f"'how' is '{how}'; allowed: {', '.join(DRAWS)}")
        self.logits, self.scales = logits, dict(scales)
        self.temperature, self.seed, self.how = float(temperature), int(seed), how

    def __getitem__(self, name: str) -> Tensor:
        return self.logits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.logits)

    def __len__(self) -> int:
        return len(self.logits)

    def __contains__(self, name: object) -> bool:
        return name in self.logits  # Mapping's own would read the tensor

    def draw(self, name: str) -> Tensor:
        """The mask of one tensor, rescaled to mean 1, in single precision at least.

        Raises:
            MergeError: where the mask is 0 everywhere, or not finite.
        """
        logits = self[name]
        if not logits.is_floating_point():
            raise MergeError(f"the mask of tensor '{name}' has logits of {logits.dtype}; they must be floating")
        if self.how == "mean":
            mask = logits.sigmoid()
        else:
            digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            mask = concrete_sample(logits, uniform_noise(logits, generator), self.temperature)
            if self.how == "binary":
                mask = (mask > 0.5).to(mask.dtype)
        mean = float(mask.detach().mean())
        if mask.numel() and not 0 < mean < math.inf:
            raise MergeError(f"the mask of tensor '{name}' has mean {mean} and cannot be rescaled to mean 1")
        return mask / mask.mean()

    def save(self, path: str | Path) -> Path:
        """Write the logits to a ``.safetensors`` file, with the rest in its metadata; whole or not at all.

        Raises:
            corollary.data.WriteError: where the file cannot be written.
        """
        facts = {
            "format": _FORMAT,
            "version": "1",
            "temperature": repr(self.temperature),
            "seed": str(self.seed),
            "how": self.how,
            "scales": json.dumps({name: factors.tolist() for name, factors in self.scales.items()}),
        }
        specs = {name: TensorSpec(logits.dtype, logits.shape) for name, logits in self.items()}
        with CheckpointWriter(path, specs, metadata=facts, fresh=True) as writer:
            for name in writer.pending:
                writer.append(name, self[name])
        return writer.path


def load_concrete_masks(path: str | Path | SafetensorsFile, *, device: str = "cpu") -> ConcreteMasks:
    """Masks that `ConcreteMasks.save` wrote; the logits are read as they are asked for.

    Args:
        path: of the file, or the file opened by `corollary.data.load_safetensors`.
        device: where the logits are put; an open file has its own.

    Raises:
        corollary.data.LoadError: where the file is missing, broken, or holds no masks.
    """
    from safetensors import safe_open

    logits = path if isinstance(path, SafetensorsFile) else load_safetensors(path, device=device)
    path = logits.path
    facts: dict[str, Any] = {}
    for shard in logits.files[:1]:
        with safe_open(str(shard), framework="pt") as file:
            facts = file.metadata() or {}
    if facts.get("format") != _FORMAT:
        raise LoadError(f"{path}: holds no Concrete masks; they come from fit_concrete_masks(...).save(...)")
    try:
        scales = {name: torch.tensor([float(f) for f in factors]) for name, factors in json.loads(facts["scales"]).items()}
        masks = ConcreteMasks(
            logits, scales, temperature=float(facts["temperature"]), seed=int(facts["seed"]), how=facts["how"]
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LoadError(f"{path}: the metadata of the masks is broken: {error}") from error
    if not set(scales) >= set(logits):
        raise LoadError(f"{path}: the metadata has no factors for tensor '{min(set(logits) - set(scales))}'")
    return masks
