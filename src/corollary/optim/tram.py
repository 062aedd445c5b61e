"""TRAM: ASAM whose radius is how far the model's outputs lie from those of a reference, a trust region in function space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.optim.asam import magnitudes
from corollary.optim.sharpness import SharpnessAware, check_at_least_zero, frozen_running_stats

_REGIONS = ("previous", "initial", "input")


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    r"""Mean over the samples of :math:`D_{KL}(p \,\|\, q)`, p given by the logits ``target`` and q by ``logits``.

    Args:
        target: (n, ..., classes), floating.
        logits: (m, ..., classes) with m at least n; the first n rows are compared.

    Returns:
        A number at least 0, in float32 or wider, without a graph.

    Raises:
        ValueError: where the shapes do not fit, or there is no sample.

    Example:
        >>> import torch
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [5.0, 0.0]])).item()
        0.0
    """
    if target.dim() < 2 or target.shape[1:] != logits.shape[1:] or not 0 < len(target) <= len(logits):
        raise ValueError(
            f"'target' has shape {tuple(target.shape)} and 'logits' {tuple(logits.shape)}; allowed: (n, ..., classes), alike "
            "but for the first number, which is from 1 to that of 'logits'"
        )
    dtype = torch.promote_types(torch.promote_types(target.dtype, logits.dtype), torch.float32)
    log_p = log_softmax(target.detach(), -1, dtype=dtype)
    log_q = log_softmax(logits[: len(target)].detach(), -1, dtype=dtype)
    return ((log_p - log_q) * log_p.exp()).sum(-1).mean().clamp_min(0)


class TRAM(SharpnessAware):
    r"""Trust region aware minimization: a sharpness-aware step as wide as the model's outputs have moved, for fine-tuning.

    With p the class probabilities on the batch and products taken entry by entry,

    .. math::
        d = κ \, \mathbb{E}_x\, D_{KL}\big(p(· \mid x, θ') \,\|\, p(· \mid x, θ)\big), \quad
        ε = d \, \frac{(|θ| + η)^2 ⊙ ∇L(θ)}{\|(|θ| + η) ⊙ ∇L(θ)\|_2 + 10^{-12}}, \quad
        θ ← \mathrm{base}\big(θ, ∇L(θ + ε)\big)

    ``trust_region`` chooses what θ is held against: ``'previous'``, the parameters one step ago; ``'initial'``, those before the
    first step (the pre-trained ones); ``'input'``, θ itself on noised inputs x + z. ASAM is the case of a fixed d.

    Args:
        params: parameters or groups, or an optimizer that is already made, to be wrapped.
        base_optimizer: class of the optimizer that takes the step; None where ``params`` is an optimizer.
        trust_region: ``'previous'``, ``'initial'`` or ``'input'``; one for all groups.
        scale: κ; 1 in the paper, while the authors' code divides d by the number of classes and twice by that of samples.
        max_radius: upper bound of d, or None. The paper's bound on the loss assumes one.
        eta: η, 0 in the paper: a parameter at zero then never moves in the climb.
        model: its batch norms keep their running statistics in every pass but the first; None leaves them alone.
        foreach: treat all parameters of a dtype and device together; None means yes. The base gets it too where it is given.
        base_options: given to ``base_optimizer``: ``lr`` and the like.

    One step costs two forward and backward passes, and one forward pass without a graph over as many samples as ``target``
    runs: d is a mean over samples, so a part of the batch estimates it. Before the first step, θ' is θ, so that d = 0 with
    ``'previous'`` and ``'initial'``, and the first step is the base's own. Dropout in training mode adds to d.

    State: ``state_dict()`` is the base's with a ``reference`` (θ') added for each parameter that has one.

    Raises:
        TypeError: no ``base_optimizer``, a complex parameter, or a DTensor: a forward pass with other parameters would be left
            gathered by ``fully_shard`` and used again.
        ValueError: an option out of range, ``trust_region`` differing between groups, or a reference of another shape loaded.
        RuntimeError: ``step`` without its two functions, ``second_step`` without ``first_step``, or a sparse gradient.

    When not to use it: to train from scratch, where there is nothing to stay near; for outputs that are no logits.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> model = torch.nn.Linear(3, 4)
        >>> x, y = torch.randn(64, 3), torch.randint(4, (64,))
        >>> optimizer = TRAM(model.parameters(), torch.optim.AdamW, lr=0.1, trust_region="input")
        >>> def closure():
        ...     logits = model(x)
        ...     loss = cross_entropy(logits, y)
        ...     loss.backward()
        ...     return loss, logits
        >>> def target():
        ...     return model(x[:16] + 0.1 * torch.randn(16, 3))
        >>> losses = [optimizer.step(closure, target).item() for _ in range(30)]
        >>> losses[-1] < losses[0]
        True

    Reference:
        Sherborne, Saphra, Dasigi, Peng, "TRAM: Bridging Trust Regions and Sharpness Aware Minimization", arXiv 2310.03646,
        Algorithm 1, equations 4, 5 and 7.
    """

    shards = False

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        trust_region: str = "previous",
        *,
        scale: float = 1.0,
        max_radius: float | None = None,
        eta: float = 0.0,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        **base_options: Any,
    ) -> None:
        own = {"trust_region": trust_region, "scale": scale, "max_radius": max_radius, "eta": eta, "foreach": foreach}
        if foreach is not None:
            base_options["foreach"] = foreach
        self._reference: dict[Tensor, Tensor] = {}
        super().__init__(params, base_optimizer, model, own, base_options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reference": self._reference}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        region, first = group["trust_region"], self.param_groups[0].get("trust_region", group["trust_region"])
        if region not in _REGIONS:
            raise ValueError(f"'trust_region' must be one of {', '.join(_REGIONS)}, not {region!r}")
        if region != first:
            raise ValueError(f"'trust_region' must be the same in every group; the first has {first!r}, this one {region!r}")
        check_at_least_zero(group, "scale", "eta")
        if group["max_radius"] is not None:
            check_at_least_zero(group, "max_radius")

    def _scales(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Tensor] | None:
        return magnitudes(params, group["eta"])

    @property
    def trust_region(self) -> str:
        """What the outputs are held against."""
        return str(self.param_groups[0]["trust_region"])

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @torch.no_grad()
    def _remember(self) -> None:
        """Keep θ as the reference of parameters that have none yet."""
        if self.trust_region != "input":
            for p in self._trained():
                if p not in self._reference:
                    self._reference[p] = p.detach().clone(memory_format=torch.preserve_format)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the parameters are θ' (with ``'input'``: as they are), gradients are off and batch norms only look on."""
        self._remember()
        params = [p for p in self._trained() if p in self._reference]
        with torch.no_grad(), frozen_running_stats(self._model):
            kept = [p.detach().clone(memory_format=torch.preserve_format) for p in params]
            if params:
                torch._foreach_copy_(params, [self._reference[p] for p in params])
            try:
                yield
            finally:
                if params:
                    torch._foreach_copy_(params, kept)

    @torch.no_grad()
    def first_step(self, divergence: float | Tensor, zero_grad: bool = False) -> None:
        """Climb to θ + ε by the gradients that ``backward`` left; then run forward and backward again, then `second_step`.

        Args:
            divergence: d / κ, a number at least 0, as `kl_divergence` gives; take the target's logits within `reference`.
            zero_grad: reset the gradients afterwards.
        """
        if isinstance(divergence, Tensor) and divergence.numel() != 1:
            raise ValueError(f"'divergence' must be one number, not a tensor of shape {tuple(divergence.shape)}")
        self._remember()
        d = (divergence if isinstance(divergence, Tensor) else torch.tensor(divergence, dtype=torch.float64)).reshape(())

        def radius(group: Mapping[str, Any]) -> Tensor:
            scaled: Tensor = d * group["scale"]
            if group["max_radius"] is not None:
                scaled = scaled.clamp(max=group["max_radius"])
            return scaled.nan_to_num(nan=0.0, posinf=0.0)

        self._climb(radius, zero_grad)

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to θ and let the base optimizer step with the gradients that were taken at θ + ε.

        Raises:
            RuntimeError: `first_step` did not come before.
        """
        begin = dict(self._begin)
        if self.trust_region == "previous":
            still = [p for p in self._reference if p not in begin]  # without a gradient: where they are is where they began
            if still:
                torch._foreach_copy_([self._reference[p] for p in still], still)
        super().second_step(zero_grad)
        if self.trust_region == "previous":
            self._reference.update(begin)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # backward passes of a closure cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], tuple[Any, Tensor]] | None = None, target: Callable[[], Tensor] | None = None) -> Any:
        """Take one step; gives the loss of the first call of ``closure``.

        Args:
            closure: computes logits (m, ..., classes) and loss, calls ``backward`` and returns (loss, logits). It is called
                twice: at θ and at θ + ε.
            target: gives the logits of the batch's first n samples, n at most m; called once, without gradients, with θ' in
                place. For ``'input'`` it adds the noise.

        Raises:
            RuntimeError: without either.
            TypeError: where ``closure`` gives no (loss, logits).
        """
        self._need("closure", closure)
        self._need("target", target)
        assert closure is not None
        assert target is not None
        self._remember()
        given = self._evaluate(closure)
        if not (isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Tensor)):
            raise TypeError(f"'closure' must give (loss, logits), not {type(given).__name__}")
        loss, logits = given
        with self.reference():
            divergence = kl_divergence(target(), logits)
        self.first_step(divergence)
        self._evaluate_again(closure)
        self.second_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The base's state, with each parameter's ``reference`` in it."""
        whole = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        kept = {i: {"reference": self._reference[p]} for i, p in enumerate(params) if p in self._reference}
        state = {i: {**whole["state"].get(i, {}), **kept.get(i, {})} for i in {**whole["state"], **kept}}
        return {**whole, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave; the next step equals that of the saved run bit by bit."""
        base = {i: {k: v for k, v in entry.items() if k != "reference"} for i, entry in state_dict["state"].items()}
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        kept = {}
        for number, (i, p) in enumerate(zip(ids, params, strict=False)):
            saved = state_dict["state"].get(i, {}).get("reference")
            if saved is None:
                continue
            if saved.shape != p.shape:
                raise ValueError(
                    f"'state_dict' holds a reference of shape {tuple(saved.shape)} for parameter {number}, which has shape "
                    f"{tuple(p.shape)}; they must be equal"
                )
            kept[p] = saved.detach().to(p.device, p.dtype, copy=True)
        super().load_state_dict({**state_dict, "state": {i: entry for i, entry in base.items() if entry}})
        self._reference = kept
