"""Each conformance check of losses passes a sound loss and catches one that is broken in its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.losses import CompSumLoss, comp_sum_loss
from corollary.testing import Case, check_loss
from corollary.testing.loss import CHECKS


class Sound(CompSumLoss):
    """Cross-entropy; the broken losses change one thing in it."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(1.0, reduction=reduction)

    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits, target

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(*self.spoil(logits, target))


class MeanIsSum(Sound):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return comp_sum_loss(logits, target, reduction="sum" if self.reduction == "mean" else self.reduction)


class TakesAnyReduction(CompSumLoss):
    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction if reduction != "average" else "mean")


class WrongGradient(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits + 0.5 * (logits - logits.detach()), target


class Overflows(Sound):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        loss = -p.gather(1, target[:, None])[:, 0].log()
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else loss


class GradientOverflows(Sound):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        exploding = logits.abs().amax(1).double().exp()
        safe = torch.where(exploding.isfinite(), exploding, 0.0)
        loss = comp_sum_loss(logits, target, reduction="none") + (safe * 0).to(logits.dtype)
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else loss


class AlwaysFloat32(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits.float(), target


class Imprecise(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits * (1.3 if logits.dtype == torch.bfloat16 else 1.0), target


class BoundToCpu(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits * torch.ones(logits.shape[1:2], dtype=logits.dtype, device="cpu")[None], target


class ReadsValues(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return (logits if float(logits.flatten()[0]) < 1e30 else logits * 2), target


class InPlace(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        target.copy_(target.roll(1))
        return logits, target


class LooksAtNeighbours(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits - logits.mean(0, keepdim=True), target


class OrderMatters(Sound):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        ramp = torch.arange(len(target), dtype=logits.dtype, device=logits.device)
        loss = comp_sum_loss(logits, target, reduction="none") * (1 + ramp)
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else loss


class AssumesContiguous(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return torch.as_strided(logits, logits.shape, logits.new_empty(logits.shape, device="meta").stride()), target


class ClassesLast(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if logits.ndim > 2:
            logits = logits.flip(2)
        return logits, target


class HardensProbabilities(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits, target.argmax(1) if target.is_floating_point() else target


class ClampsClasses(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits, target.clamp(0, logits.shape[1] - 1)


class RawErrors(nn.CrossEntropyLoss):
    def __repr__(self) -> str:
        return f"RawErrors({self.reduction})"


class EmptyIsNan(Sound):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction=self.reduction)


class HidesNan(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits.nan_to_num(), target


class BreaksTheGraph(Sound):
    def spoil(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        torch._dynamo.graph_break()
        return logits, target


class NoState(Sound):
    def extra_repr(self) -> str:
        return ""


class ForgetsState(Sound):
    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.scale = nn.Buffer(torch.rand(()))
        self.hidden = torch.rand(())

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(logits, target) * self.hidden


def other_function(logits: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    return comp_sum_loss(logits, target, tau=1.1, reduction=reduction)


TAGS: dict[str, Any] = {"spatial": True, "probabilities": True, "function": comp_sum_loss}


def test_a_sound_loss_passes() -> None:
    check_loss(Sound, **TAGS)
    check_loss(CompSumLoss, inputs=1, example=lambda g, dtype: (torch.randn(4, 3, generator=g).to(dtype), torch.arange(4) % 3))


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        ("reductions", MeanIsSum, "mean against the mean of none"),
        ("reductions", TakesAnyReduction, "reduction 'average': no error"),
        ("gradient", WrongGradient, "Jacobian mismatch"),
        ("finite_at_extremes", Overflows, "loss"),
        ("finite_at_extremes", GradientOverflows, "gradient is not finite"),
        ("dtypes", AlwaysFloat32, "is torch.float32"),
        ("dtypes", Imprecise, "in torch.bfloat16"),
        ("device", BoundToCpu, "fails on meta"),
        ("device", ReadsValues, "fails on meta"),
        ("inputs_unchanged", InPlace, "changed in place"),
        ("order_of_batch", LooksAtNeighbours, "half the batch"),
        ("order_of_batch", OrderMatters, "permuted batch"),
        ("memory_layout", AssumesContiguous, "strided inputs"),
        ("spatial", ClassesLast, "spatial inputs"),
        ("probabilities", HardensProbabilities, "mixture of two targets"),
        ("refuses_wrong_classes", ClampsClasses, "no error"),
        ("refuses_wrong_classes", RawErrors, "not IndexError"),
        ("refuses_empty", EmptyIsNan, "no error"),
        ("nan_is_seen", HidesNan, "NaN in argument 0 gives"),
        ("compiles", BreaksTheGraph, "does not compile as one graph"),
        ("vmap", ReadsValues, "vmap fails"),
        ("state_and_repr", NoState, "repr does not show"),
        ("state_and_repr", ForgetsState, "after loading the state"),
    ],
)
def test_a_broken_loss_is_caught(check: str, broken: Callable[..., nn.Module], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](Case(broken, TAGS))


def test_a_function_that_differs_is_caught() -> None:
    with pytest.raises(AssertionError, match="reduction none: they differ"):
        CHECKS["function_agrees"](Case(Sound, {"function": other_function}))


def test_every_check_has_a_broken_loss() -> None:
    (mark,) = [m for m in test_a_broken_loss_is_caught.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert {row[0] for row in mark.args[1]} | {"function_agrees"} == set(CHECKS)
