"""TriAdaptLoRA: a core between LoRA's factors whose triangles grow with the rank, where it has grown most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, LowRankAdapter, need_finite, need_probability, need_rank
from corollary.adapt.base import cast as cast_input
from corollary.adapt.inject import layers_of
from corollary.adapt.site import Site


class TriAdaptLoRAAdapter(LowRankAdapter):
    """ΔM = (α / r) B C A, of which the leading r rows and columns act; see `TriAdaptLoRA`."""

    active: Tensor
    blocks: Tensor
    last_norm: Tensor

    def __init__(self, site: Site, weight: Tensor, config: TriAdaptLoRA) -> None:
        super().__init__(site, config.dropout)
        rank = config.max_rank
        self.alpha = float(config.rank if config.alpha is None else config.alpha)
        self.lora_A = nn.Parameter(0.02 * torch.randn(rank, site.in_features, device=weight.device).to(weight.dtype))
        self.lora_C = nn.Parameter(torch.eye(rank, device=weight.device, dtype=weight.dtype))
        self.lora_B = nn.Parameter(weight.new_zeros(site.out_features, rank))
        active = weight.new_zeros(rank)
        active[: config.rank] = 1
        # Buffers, so that a saved adapter comes back at the rank that it has grown to.
        self.register_buffer("active", active)
        self.register_buffer("blocks", weight.new_ones(()))
        self.register_buffer("last_norm", weight.new_zeros(()))

    @property
    def rank(self) -> int:
        """How many rows of A act."""
        return int(self.active.sum())

    def core(self) -> Tensor:
        """C without what rests, scaled by α / r."""
        return self.alpha / self.active.sum() * (self.active[:, None] * self.lora_C * self.active)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B @ self.core(), self.lora_A

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        h = self.site.mix(self.site.reduce(cast_input(self.inner(x), self.lora_A), self.lora_A), self.core())
        return self.site.expand_add(out, h, self.lora_B)

    @torch.no_grad()
    def importance(self) -> Tensor:
        """By how much ‖C‖ over the number of blocks has grown since the last call."""
        norm = (self.active[:, None] * self.lora_C * self.active).norm() / self.blocks
        grown = norm - self.last_norm
        self.last_norm.copy_(norm)
        return grown  # type: ignore[no-any-return]

    def grow(self, increment: int) -> int:
        """Let as many more rows and columns act, as far as there are any; gives how many that was."""
        rank = self.rank
        added = min(increment, len(self.active) - rank)
        self.active[rank : rank + added] = 1
        self.blocks += added > 0
        return added


@dataclass(frozen=True)
class TriAdaptLoRA(AdapterConfig):
    r"""TriAdaptLoRA: B C A with a full core C, whose rank grows during training in the layers where C grows.

    .. math:: \Delta W = \frac{\alpha}{r} B\, C\, A, \qquad
        C = \begin{pmatrix} C_{11} & c_{12} \\ c_{21} & C_{22} \end{pmatrix}

    A step of growth adds rows to A, columns to B, a row block under C (its lower triangle) and a column block beside it (its upper
    triangle). `RankGrowth` decides when and where. Give it to `adapt`.

    Args:
        rank: r at the start.
        max_rank: the most that a layer can grow to; factors are allocated for it, and what rests is masked.
        alpha: α; None takes ``rank``. The scale falls as r grows, as in the authors' code.
        dropout: of the layer's input on its way into A, in training.

    Trains r (m + n) + r² numbers a layer at rank r; optimizer state is kept for ``max_rank``.

    Raises:
        ValueError, TypeError: where a field is out of range.

    Deviations: in the authors' code as it was found B and C begin at zero, where no gradient reaches anything; here C begins as the
    identity, so that training begins as LoRA's. On its diagonal blocks their code trains both triangles and adds them; here once.

    When not to use it: where a fixed rank is enough: growth makes the rank of every layer one more thing that training decides.

    Example:
        >>> import torch
        >>> from corollary.adapt import RankGrowth, TriAdaptLoRA, adapt
        >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), TriAdaptLoRA(rank=1, max_rank=4))
        >>> growth = RankGrowth(model, target_rank=2, total_steps=4, interval=1)
        >>> for _ in range(4):
        ...     growth.step()  # after optimizer.step()
        >>> sum(growth.ranks.values())
        4

    Reference:
        Liang, Wang, Zeng, "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
        Fine-Tuning", arXiv 2501.08008; details from the authors' code.
    """

    rank: int = 1
    max_rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        need_rank(self.rank)
        if isinstance(self.max_rank, bool) or not isinstance(self.max_rank, int) or self.max_rank < self.rank:
            raise ValueError(f"'max_rank' must be an int of at least 'rank' = {self.rank}, not {self.max_rank!r}")
        need_probability("dropout", self.dropout)
        if self.alpha is not None:
            need_finite("alpha", self.alpha)

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> TriAdaptLoRAAdapter:
        return TriAdaptLoRAAdapter(site, weight, self)


class RankGrowth:
    r"""Lets the rank grow in the layers whose core has grown most: call ``step()`` after each step of the optimizer.

    At step t > ``warmup``, every ``interval`` steps while the total rank is below ``target_rank`` times the number of layers, the

    .. math:: k = \max\left(1,\ \lfloor (R - r_t)\, \tfrac{t - t_0}{T - t_0} \rfloor\right) \quad\text{(linear)}, \qquad
        k = \max\left(1,\ \lfloor (R - r_t)^{(t - t_0) / (T - t_0)} \rfloor\right) \quad\text{(exponential)}

    layers of highest importance grow by ``increment``, where R is the target, :math:`r_t` the total rank and importance is the
    growth of :math:`\|C\|_F` over the number of blocks since it was last asked for.

    Args:
        model: adapted with `TriAdaptLoRA`.
        target_rank: mean rank of the layers at the end.
        total_steps: T.
        warmup: :math:`t_0`.
        interval: steps between two decisions.
        increment: ranks added to a chosen layer at once.
        threshold: ``"linear"``, ``"exponential"``, or a fixed number of layers.
        name: of the adapter.

    Raises:
        ValueError: where an argument is out of range or the adapter is of another method.

    Deviation: the last growth is cut so that the total never exceeds the target; the authors' code may overshoot by one increment
    for each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_rank: int,
        total_steps: int,
        warmup: int = 0,
        interval: int = 1,
        increment: int = 1,
        threshold: str | int = "linear",
        name: str = "default",
    ) -> None:
        for key, value in (
            ("target_rank", target_rank),
            ("total_steps", total_steps),
            ("interval", interval),
            ("increment", increment),
        ):
            if value < 1:
                raise ValueError(f"'{key}' must be at least 1, not {value}")
        if not 0 <= warmup < total_steps:
            raise ValueError(f"'warmup' must be at least 0 and below 'total_steps' = {total_steps}, not {warmup}")
        if threshold not in ("linear", "exponential") and not (isinstance(threshold, int) and threshold >= 1):
            raise ValueError(f"'threshold' must be 'linear', 'exponential' or a number of layers, not {threshold!r}")
        self.adapters: dict[str, TriAdaptLoRAAdapter] = {}
        for site, _, adapters in layers_of(model, name):
            adapter = adapters[name]
            if not isinstance(adapter, TriAdaptLoRAAdapter):
                raise ValueError(f"'model': adapter '{name}' is not of TriAdaptLoRA")
            self.adapters[site] = adapter
        self.target = target_rank * len(self.adapters)
        self.total_steps, self.warmup, self.interval, self.increment = total_steps, warmup, interval, increment
        self.threshold = threshold
        self.count = 0

    @property
    def ranks(self) -> dict[str, int]:
        """Layer's name to its rank now."""
        return {site: adapter.rank for site, adapter in self.adapters.items()}

    def chosen(self, left: int) -> int:
        """k, how many layers may grow at this step, with so many ranks left to the target."""
        if isinstance(self.threshold, int):
            return self.threshold
        progress = min(1.0, (self.count - self.warmup) / (self.total_steps - self.warmup))
        wanted = left * progress if self.threshold == "linear" else left**progress
        return max(1, int(wanted))

    def step(self) -> None:
        """Count one step of training, and grow where that is due."""
        self.count += 1
        left = self.target - sum(self.ranks.values())
        if left <= 0 or self.count <= self.warmup or self.count % self.interval:
            return
        adapters = list(self.adapters.values())
        scores = torch.stack([adapter.importance().float() for adapter in adapters])
        # A layer at its limit cannot be chosen.
        full = torch.tensor([a.rank == len(a.active) for a in adapters], device=scores.device)
        order = torch.argsort(scores.masked_fill(full, -torch.inf), descending=True)[: self.chosen(left)].tolist()
        for index in order:
            left -= adapters[index].grow(min(self.increment, left))

    def state_dict(self) -> dict[str, Any]:
        """The count of steps; ranks and norms are in the adapter's own state."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.count = cast(int, state["count"])
