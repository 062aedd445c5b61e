"""G-ACT: steer a Transformer by activation differences, chosen per token by probes that go on learning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle


class GACT:
    r"""Move the residual stream by the mean difference between two kinds of text, chosen from a few such differences by probes.

    From pairs of prompts, one of the source kind and one of the target kind, with activations :math:`h^s_{il}, h^t_{il}` at layer l:

    .. math:: d_{il} = h^t_{il} - h^s_{il}, \qquad
              \{d_i\} \to \text{clusters } 1 \dots C \text{ by } k\text{-means over all layers}, \qquad
              v_{lc} = \operatorname{mean}_{i \in c} d_{il},

    and for each layer a linear probe :math:`p_l(c \mid h)` that tells a prompt's cluster from its source activation alone. `refine`
    goes on training the probes on new pairs, one Adam step a batch: that is what G-ACT adds to ACT, whose probes stay as `fit`
    left them. While `steer` is on, every position of each chosen layer gets

    .. math:: h \leftarrow h + \alpha\, v_{l \hat c(h)}, \qquad \hat c(h) = \operatorname{argmax}_c p_l(c \mid h).

    A position's change depends on that position alone, so that generation with a key-value cache equals generation without.

    Args:
        model: any module whose named layers give the residual stream (batch, tokens, width), alone or first in a tuple: blocks of
            `corollary.models.GPT`, of transformers' decoders and encoders, ``nn.TransformerEncoderLayer`` with ``batch_first``.
        layers: names of these layers, or patterns of names (``"blocks.*"`` matches the blocks and nothing inside them).
        clusters: C.
        pool: which activation stands for a prompt: its 'last' token's, or the 'mean' over tokens.
        lr: rate of the probes' Adam.
        epochs: passes over the pairs in `fit`.
        seed: of k-means.

    Attributes:
        vectors: (layers, clusters, width) in float32; centroids: (clusters, layers * width).

    Raises:
        TypeError, ValueError: an argument is not of the allowed kind; no layer matches; a layer's output is no such stream; fewer
            pairs than clusters; use before `fit`.

    Deviations: only the abstract was at hand, and the paper on ACT that it builds on. The probe acts on the residual stream of whole
    layers and on each position, not on single attention heads; the intensity is one number, not scaled by a probability.

    When not to use it: where the two kinds of text differ in more than a shift of activations; and on models that return their
    blocks' outputs fused, so that a hook sees no stream.

    Example:
        >>> import torch
        >>> from corollary.models import GPT
        >>> model = GPT(256, dim=16, depth=2, heads=2, context=8)
        >>> tokens = torch.arange(48).view(6, 8)
        >>> steerer = GACT(model, ["blocks.*"], clusters=2).fit(tokens, tokens + 100)
        >>> plain = model(tokens)
        >>> with steerer.steer(strength=2.0):
        ...     moved = not torch.equal(model(tokens), plain)
        >>> moved, torch.equal(model(tokens), plain)
        (True, True)

    Reference:
        Sharma and Raman, "Steering Conceptual Bias via Transformer Latent-Subspace Activation", arXiv 2506.18887; Wang et al.,
        "Adaptive Activation Steering", arXiv 2406.00034, sections 3.2 and 3.3.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        *,
        clusters: int = 3,
        pool: Literal["last", "mean"] = "last",
        lr: float = 0.01,
        epochs: int = 100,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"'model' must be a torch.nn.Module, not {type(model).__name__}")
        for name, value in (("clusters", clusters), ("epochs", epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"'{name}' must be an int of at least 1, not {value!r}")
        if pool not in ("last", "mean"):
            raise ValueError(f"'pool' is {pool!r}; allowed: 'last', 'mean'")
        if not 0 < lr < float("inf"):
            raise ValueError(f"'lr' must be finite and above 0, not {lr}")
        self.model, self.clusters, self.pool, self.lr, self.epochs, self.seed = model, clusters, pool, lr, epochs, seed
        self.layers = _matching(model, layers)
        self._state: dict[str, Tensor] = {}

    # ---------------------------------------------------------------------------------------------------------- learning

    def fit(self, source: Any, target: Any) -> Self:
        """Cluster the differences of pairs and train the probes; gives the steerer itself.

        Args:
            source, target: what the model is called with, a tensor, a tuple of arguments or a dict of keywords, or a list of such
                batches; the i-th prompt of one is the pair of the i-th of the other.
        """
        h = self._activations(source)
        d = self._differences(h, target)
        if len(d) < self.clusters:
            raise ValueError(f"{len(d)} pairs for 'clusters' = {self.clusters}; allowed: at least as many pairs as clusters")
        flat = d.flatten(1)
        found = KMeans(self.clusters, n_init=10, random_state=self.seed).fit(flat.double().cpu().numpy())
        labels = torch.as_tensor(found.labels_, device=d.device, dtype=torch.int64)
        member = F.one_hot(labels, self.clusters).to(d.dtype)
        vectors = (torch.einsum("nc,nld->lcd", member, d) / member.sum(0).clamp(min=1)[:, None]).contiguous()
        scale = h.std(0, correction=0)
        width = d.shape[2]
        self._state = {
            "vectors": vectors,
            "centroids": vectors.transpose(0, 1).flatten(1).clone(),
            "mean": h.mean(0),
            "scale": torch.where(scale > 0, scale, torch.ones_like(scale)),
            "step": torch.zeros((), device=d.device),
        }
        for name, shape in (("weight", (len(self.layers), self.clusters, width)), ("bias", (len(self.layers), self.clusters))):
            for part in ("", "_avg", "_sq"):
                self._state[name + part] = d.new_zeros(shape)
        for _ in range(self.epochs):
            self._learn(h, labels)
        return self

    def refine(self, source: Any, target: Any) -> Self:
        """One step of the probes on new pairs, whose clusters are those of the nearest centroids; the vectors stay."""
        h = self._activations(source)
        self._learn(h, self._labels(self._differences(h, target)))
        return self

    def score(self, source: Any, target: Any) -> Tensor:
        """For each layer, the share of pairs whose cluster its probe tells from the source prompt: (layers,) in [0, 1]."""
        h = self._activations(source)
        labels = self._labels(self._differences(h, target))
        return (self._logits(h).argmax(-1) == labels[:, None]).float().mean(0)

    @property
    def vectors(self) -> Tensor:
        """The steering vectors (layers, clusters, width)."""
        return self._fitted()["vectors"]

    @property
    def centroids(self) -> Tensor:
        """The clusters' centres (clusters, layers * width)."""
        return self._fitted()["centroids"]

    def _fitted(self) -> dict[str, Tensor]:
        if not self._state:
            raise ValueError("the steerer is not fitted; call 'fit' or 'load_state_dict' first")
        return self._state

    def _labels(self, differences: Tensor) -> Tensor:
        return torch.cdist(differences.flatten(1), self.centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)

    def _logits(self, h: Tensor) -> Tensor:
        s = self._fitted()
        return torch.einsum("nld,lcd->nlc", (h - s["mean"]) / s["scale"], s["weight"]) + s["bias"]

    @torch.no_grad()
    def _learn(self, h: Tensor, labels: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        """One Adam step on the cross-entropy of all probes at once: its gradient is (softmax - one-hot) times the input."""
        s = self._fitted()
        wrong = (self._logits(h).softmax(-1) - F.one_hot(labels, self.clusters)[:, None]) / len(h)
        gradients = {"weight": torch.einsum("nlc,nld->lcd", wrong, (h - s["mean"]) / s["scale"]), "bias": wrong.sum(0)}
        s["step"] = s["step"] + 1
        for name, gradient in gradients.items():
            avg, sq = s[name + "_avg"], s[name + "_sq"]
            avg.lerp_(gradient, 1 - betas[0])
            sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            corrected = (sq / (1 - betas[1] ** s["step"])).sqrt().add_(1e-8)
            s[name].sub_(self.lr * avg / (1 - betas[0] ** s["step"]) / corrected)

    def _differences(self, h: Tensor, target: Any) -> Tensor:
        other = self._activations(target)
        if len(other) != len(h):
            raise ValueError(f"'source' holds {len(h)} prompts and 'target' {len(other)}; they must be pairs")
        return other - h

    @torch.no_grad()
    def _activations(self, batches: Any) -> Tensor:
        """Pooled activations of every prompt: (prompts, layers, width) in float32."""
        rows = []
        with self._recording() as seen:
            for batch in batches if isinstance(batches, list) else [batches]:
                seen.clear()
                _call(self.model, batch)
                missing = [name for name in self.layers if name not in seen]
                if missing:
                    raise ValueError(f"layer '{missing[0]}' gave nothing while the model ran; leave it out of 'layers'")
                widths = sorted({h.shape[-1] for h in seen.values()})
                if len(widths) > 1:
                    raise ValueError(f"'layers' have widths {widths}; allowed: layers of one residual stream")
                pooled = (seen[name][:, -1] if self.pool == "last" else seen[name].mean(1) for name in self.layers)
                rows.append(torch.stack([h.float() for h in pooled], 1))
        if not rows:
            raise ValueError("no prompts; allowed: a batch or a list of batches")
        found = torch.cat(rows)
        if not bool(found.isfinite().all()):
            raise ValueError("the model's activations are not finite")
        return found

    @contextmanager
    def _recording(self) -> Any:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, args, out: seen.__setitem__(name, _stream(name, out))

        handles = [layer.register_forward_hook(keep(name)) for name, layer in self.layers.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    # ---------------------------------------------------------------------------------------------------------- steering

    def steer(self, strength: float = 1.0, layers: Iterable[str] | None = None) -> SteeringHandle:
        """Steer from now on, until the handle's ``remove()`` or the end of its ``with``.

        Args:
            strength: α; 1 moves by the mean difference, a negative number away from the target.
            layers: names or patterns among the fitted layers; all where None.

        The probes act as they are now; what `refine` teaches them reaches the next call. Refine while no steering is on.
        """
        self._fitted()
        if not abs(strength) < float("inf"):
            raise ValueError(f"'strength' must be finite, not {strength}")
        names = list(self.layers)
        chosen = set(names if layers is None else _matching(self.model, layers))
        unknown = sorted(chosen - set(names))
        if unknown:
            raise ValueError(f"'layers' has '{unknown[0]}', which was not fitted; there are: {', '.join(names)}")
        return SteeringHandle(
            [
                self.layers[name].register_forward_hook(self._mover(index, name, strength))
                for index, name in enumerate(names)
                if name in chosen
            ]
        )

    def _mover(self, index: int, name: str, strength: float) -> Any:
        s = self._state
        # Standardizing is folded into the probe, so that a position costs one product with (width, clusters).
        weight = s["weight"][index] / s["scale"][index]
        bias = s["bias"][index] - weight @ s["mean"][index]
        vectors = strength * s["vectors"][index]

        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            h = _stream(name, out)
            choice = F.linear(h.detach().to(weight.dtype), weight, bias).argmax(-1)
            moved = h + F.embedding(choice, vectors).to(h.dtype)
            return moved if isinstance(out, Tensor) else (moved, *out[1:])

        return hook

    # ------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Vectors, centroids, probes and their Adam state, as tensors that safetensors can hold."""
        return dict(self._fitted())

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what a steerer of the same layers learnt; raises ``ValueError`` naming the key that does not fit."""
        layers, clusters = len(self.layers), self.clusters
        width = state_dict["vectors"].shape[-1] if "vectors" in state_dict else 0
        shapes: dict[str, tuple[int, ...]] = {
            "vectors": (layers, clusters, width), "centroids": (clusters, layers * width),
            "mean": (layers, width), "scale": (layers, width), "step": (),
        }  # fmt: skip
        for part in ("", "_avg", "_sq"):
            shapes |= {f"weight{part}": (layers, clusters, width), f"bias{part}": (layers, clusters)}
        for key in sorted(set(shapes) ^ set(state_dict)):
            raise ValueError(f"'state_dict': '{key}' is {'missing' if key in shapes else 'unknown'}")
        for key, shape in shapes.items():
            if tuple(state_dict[key].shape) != shape:
                raise ValueError(f"'state_dict': '{key}' has shape {tuple(state_dict[key].shape)}; allowed: {shape}")
        device = next(self.model.parameters()).device
        self._state = {key: tensor.to(device).clone() for key, tensor in state_dict.items()}


class SteeringHandle:
    """What `GACT.steer` gives: steering lasts until ``remove()``, or until the end of a ``with``. Removing twice does no harm."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _matching(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Modules by name, in the model's order; a ``*`` does not reach over a dot."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    named = {name: module for name, module in model.named_modules() if name}
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in named if n.count(".") == pattern.count(".") and fnmatchcase(n, pattern)}
        if not hits:
            raise ValueError(f"'layers' has '{pattern}', which matches no module; there are: {', '.join(named)}")
        found |= hits
    if not found:
        raise ValueError("'layers' is empty; allowed: at least one name or pattern")
    return {name: module for name, module in named.items() if name in found}


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        raise TypeError(f"a batch of prompts must be a tensor, a tuple or a dict, not {type(batch).__name__}")


def _stream(name: str, out: Any) -> Tensor:
    h = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(h, Tensor) or h.dim() != 3 or not h.is_floating_point():
        got = f"{h.dtype} of shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(
            f"layer '{name}' gave {got}; allowed: a floating stream (batch, tokens, width), alone or first in a tuple"
        )
    return h
