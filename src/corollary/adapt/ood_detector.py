"""O3's detector of what was unlearnt: how like one set of texts an input is, from every layer of an encoder at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from sklearn.svm import OneClassSVM
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt.base import need_finite
from corollary.adapt.contrastive_entropy import contrastive_entropy
from corollary.adapt.g_act import _matching, _stream

_FITTED = ("mean", "precision", "bank", "normal", "boundary", "centers", "spread")


class OODDetector(nn.Module):
    r"""Tells inputs like one set of texts from all others, having seen that set alone.

    With :math:`f_l` the mean over tokens of layer l of an encoder, and :math:`\mu_l, \Sigma_l` their mean and covariance over the set,

    .. math:: s_l(x) = \tfrac12 (f_l - \mu_l)^\top \Sigma_l^{-1} (f_l - \mu_l)
              - \gamma \max_{u \in \text{set}} \cos(f_l(x), f_l(u)),

    global and local distance in one. The layers' scores go into a linear one-class SVM, whose signed distance from the boundary is
    `score`, d. A quarter of the set takes no part so far; with the mean :math:`m_1` of d over the used part, :math:`m_2` and the
    deviation :math:`\sigma` over the rest, F the distribution function of the two normals' mixture, and :math:`d_0 = (m_1 + m_2) / 2`,

    .. math:: w = \operatorname{sigmoid}\big(\zeta\, (1 - |F(d) - F(2 d_0 - d)|) - b\big),

    the weight that a call gives (Σ⁻¹ is the pseudoinverse): near 1 for inputs like the set, and 0 where it falls below ``floor``. Beforehand `learn` trains the
    encoder on the set by `contrastive_entropy` and a loss of tokens. Call it under ``torch.no_grad()`` to weigh inputs.

    Args:
        backbone: the encoder, any module whose named layers give streams (batch, tokens, width). It becomes part of the detector; a
            copy of the model that unlearns does, with a ``LoRA`` on it for `learn`.
        layers: names of these layers, or patterns of names (``"blocks.*"``).
        gamma: γ, weight of the cosine.
        nu: share of the set that the SVM may leave outside.
        holdout: share of the set that only says how scores of unseen texts spread, at least two texts.
        zeta, offset: ζ and b. A greater ζ loads more, for what was unlearnt and for the rest.
        floor: weights below are 0.
        seed: chooses the texts held out.

    Attributes:
        mean, precision, bank: by layer; normal, boundary: of the SVM; centers, spread: of the mixture. Buffers, empty until `fit`.

    Raises:
        ValueError, TypeError: an option is out of range; no layer matches; fewer than four texts; use before `fit`.

    Deviations: the authors' code subtracts half the squared Mahalanobis distance instead of adding it, and so sets it against the
    cosine. Its cuts of the weight, at 0.3, 0.4 and 0.9 with 1.2 above, are the one ``floor`` here. The hypersphere of the text is a
    linear SVM's boundary in code and here. Means over tokens leave padding out, given an ``attention_mask``; the authors' do not.

    When not to use it: where what is to be unlearnt and what is not are said in the same words. It keeps the set's features: they
    tell whoever has them something of the texts.

    Example:
        >>> import torch
        >>> from corollary.adapt import OODDetector
        >>> from corollary.models import GPT
        >>> tokens = torch.arange(16).repeat(40, 1) + torch.randint(3, (40, 16), generator=torch.Generator().manual_seed(0))
        >>> detector = OODDetector(GPT(256, dim=16, depth=2, heads=2, context=16), ["blocks.*"]).fit(tokens)
        >>> with torch.no_grad():
        ...     weights = detector(torch.cat([tokens[:2], tokens[:2] + 100]))
        >>> (weights > 0.5).tolist()
        [True, True, False, False]

    Reference:
        Gao et al., arXiv 2407.10223, equations 7 to 13 and algorithm 1; the authors' code for the constants.
    """

    mean: Tensor
    precision: Tensor
    bank: Tensor
    normal: Tensor
    boundary: Tensor
    centers: Tensor
    spread: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        layers: Iterable[str],
        *,
        gamma: float = 1000.0,
        nu: float = 0.1,
        holdout: float = 0.25,
        zeta: float = 10.0,
        offset: float = 2.0,
        floor: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"'backbone' must be a torch.nn.Module, not {type(backbone).__name__}")
        for name, value in (("gamma", gamma), ("zeta", zeta), ("offset", offset)):
            need_finite(name, value)
        for name, value in (("nu", nu), ("holdout", holdout)):
            if not 0 < value < 1:
                raise ValueError(f"'{name}' must lie between 0 and 1, not {value}")
        if not 0 <= floor <= 1:
            raise ValueError(f"'floor' must be at least 0 and at most 1, not {floor}")
        self.layers = tuple(_matching(backbone, layers))
        self.backbone = backbone
        self.gamma, self.nu, self.holdout, self.seed = gamma, nu, holdout, seed
        self.zeta, self.offset, self.floor = zeta, offset, floor
        for name in _FITTED:
            self.register_buffer(name, torch.empty(0))

    # ----------------------------------------------------------------------------------------------------------- features

    def _run(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """The backbone's output, and every layer's mean over tokens: (batch, layers, width)."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, inputs, out: seen.__setitem__(name, _stream(name, out))

        handles = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in self.layers]
        try:
            out = backbone(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.layers if name not in seen]
        if missing:
            raise ValueError(f"layer '{missing[0]}' gave nothing while the backbone ran; leave it out of 'layers'")
        widths = sorted({h.shape[-1] for h in seen.values()})
        if len(widths) > 1:
            raise ValueError(f"'layers' have widths {widths}; allowed: layers of one width")
        stack = torch.stack([seen[name] for name in self.layers], 1)
        mask = kwargs.get("attention_mask")
        if mask is None:
            return out, stack.mean(2)
        mask = mask.to(stack.dtype)[:, None, :, None]
        return out, (stack * mask).sum(2) / mask.sum(2).clamp(min=1)

    def _scores(self, features: Tensor) -> Tensor:
        """The scores s of every layer: (batch, layers)."""
        f = features.to(self.mean.dtype).transpose(0, 1)
        centred = f - self.mean[:, None]
        far = ((centred @ self.precision) * centred).sum(-1) / 2
        near = (F.normalize(f, dim=-1) @ self.bank.mT).amax(-1)
        return (far - self.gamma * near).mT

    # ----------------------------------------------------------------------------------------------------------- learning

    def learn(
        self,
        batches: Iterable[Any],
        mask: Callable[[Any], Any],
        *,
        lr: float = 1e-3,
        token_loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> list[float]:
        """Train what trains in the backbone, one AdamW step a batch: `contrastive_entropy` summed over layers, and a loss of tokens.

        Args:
            batches: of the set, each a tensor, a tuple of arguments or a dict of keywords.
            mask: a batch to the same with tokens masked.
            lr: AdamW's rate.
            token_loss: of the backbone's output on the masked batch, and the batch itself: the masked language model's part.

        Returns:
            The loss of every step.
        """
        trained = [p for p in self.backbone.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of 'backbone' trains; put a LoRA on it, or let some train")
        key = copy.deepcopy(self.backbone).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(trained, lr=lr)
        losses = []
        for batch in batches:
            with torch.no_grad():
                _, keys = self._run(key, *_arguments(batch))
            out, queries = self._run(self.backbone, *_arguments(mask(batch)))
            loss = contrastive_entropy(queries.transpose(0, 1), keys.transpose(0, 1)).sum()
            if token_loss is not None:
                loss = loss + token_loss(out, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        optimizer.zero_grad()
        return [float(loss) for loss in losses]

    @torch.no_grad()
    def fit(self, *args: Any, **kwargs: Any) -> Self:
        """Take over the set, as the backbone is called with it; gives the detector itself."""
        training = self.training
        self.eval()
        try:
            _, features = self._run(self.backbone, args, kwargs)
        finally:
            self.train(training)
        if not bool(features.isfinite().all()):
            raise ValueError("the backbone's features are not finite")
        n = len(features)
        rest = max(2, round(self.holdout * n))
        if n - rest < 2:
            raise ValueError(f"{n} texts with 'holdout' = {self.holdout} leave {max(n - rest, 0)} to fit; allowed: at least 2")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).to(features.device)
        used = features[order[rest:]].double().transpose(0, 1)
        mean = used.mean(1)
        centred = used - mean[:, None]
        covariance = centred.mT @ centred / used.shape[1]
        dtype = torch.promote_types(features.dtype, torch.float32)
        self.mean = mean.to(dtype)
        self.precision = torch.linalg.pinv(covariance, hermitian=True).to(dtype)
        self.bank = F.normalize(used, dim=-1).to(dtype)
        scores = self._scores(features)
        # A linear SVM does not mind the unit of its inputs, but its solver does.
        unit = scores.abs().mean().clamp(min=torch.finfo(dtype).tiny)
        inside = scores[order[rest:]] / unit
        svm = OneClassSVM(kernel="linear", nu=self.nu).fit(inside.double().cpu().numpy())
        normal = torch.tensor(svm.coef_[0])
        length = normal.norm().clamp(min=torch.finfo(torch.float64).tiny)
        self.normal = (normal / length).to(scores)
        self.boundary = (torch.tensor(svm.offset_[0]) / length).to(scores) * unit
        distance = self._distance(scores)
        unseen, seen = distance[order[:rest]], distance[order[rest:]]
        self.centers = torch.stack([seen.mean(), unseen.mean()])
        least = torch.finfo(dtype).eps * unit
        self.spread = unseen.std(correction=0).clamp(min=least)
        return self

    # ------------------------------------------------------------------------------------------------------------ weighing

    def _distance(self, scores: Tensor) -> Tensor:
        return scores @ self.normal - self.boundary

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        """d, the signed distance from the SVM's boundary: (batch,); above 0 inside."""
        if not self.bank.numel():
            raise ValueError("the detector is not fitted; call 'fit' first, or load the state of one that is")
        return self._distance(self._scores(self._run(self.backbone, args, kwargs)[1]))

    def weight(self, distance: Tensor) -> Tensor:
        """w of distances that `score` gave: of the same shape, in [0, 1]."""
        below = self._below(distance) - self._below(self.centers.sum() - distance)
        w = torch.sigmoid(self.zeta * (1 - below.abs()) - self.offset)
        return torch.where(w < self.floor, torch.zeros_like(w), w)

    def _below(self, distance: Tensor) -> Tensor:
        return torch.special.ndtr((distance[..., None] - self.centers) / self.spread).mean(-1)  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weight of every input, called as the backbone is: (batch,) in [0, 1]."""
        return self.weight(self.score(*args, **kwargs))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name in _FITTED:  # their sizes are the set's: take them as they come
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, tuple):
        return batch, {}
    raise TypeError(f"a batch must be a tensor, a tuple or a dict, not {type(batch).__name__}")
