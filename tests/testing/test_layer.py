"""Each check of layers passes a sound layer and catches the layer that breaks just its promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corollary.testing import Case, check_layer, run_checks
from corollary.testing.layer import CHECKS

TAGS: dict[str, Any] = {"inputs": ((5,), (5,)), "output": (3,), "exact_tables": True}


class Sound(nn.Module):
    """A bilinear map of two vectors with one table that the state does not hold."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("scale", torch.full((5,), 1 / 8), persistent=False)

    def check(self, x: Tensor, y: Tensor) -> None:
        for name, value in (("x", x), ("y", y)):
            if value.dtype != self.weight.dtype:
                raise TypeError(f"{name} is {value.dtype}, but the layer is {self.weight.dtype}")
            if value.shape[-1] != 5:
                raise ValueError(f"{name} must have shape (..., 5), not {tuple(value.shape)}")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.check(x, y)
        return self.product(x, y)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y * self.scale) @ self.weight.mT


class ExtraAxis(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x, y)[..., None]


class BatchMean(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x - x.mean(0), y)


class FlattensOnlyOnce(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        out = super().product(x, y)
        return out + out.sum(0, keepdim=True) if x.ndim > 2 else out


class NoEmpty(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x, y) if x.numel() else x.new_zeros(1, 3)


class Upcasts(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x, y).double()


class HalfPrecision(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x, y)


class RoundedTable(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((5,), 1 / 3, dtype=torch.float64)


class Noisy(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x, y) * (1 + 0.01 * torch.rand(()))


class NoisyTraining(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x, y) * (1 + 0.01 * torch.rand(()) if self.training else 1)


class HiddenDropout(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x, y) * (2 if self.training else 1)


class Detached(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x.detach(), y)


class _WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]  # the factor two is missing


class WrongGradient(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(_WrongSquare.apply(x), y)


class InPlace(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        out = super().product(x, y)
        if not x.requires_grad:
            x.mul_(1.5)
        return out


class HiddenState(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.factor = float(torch.rand(()))

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x, y) * self.factor


class GraphBreak(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().product(x, y)


class NoShapeCheck(Sound):
    def check(self, x: Tensor, y: Tensor) -> None:
        if not x.is_floating_point() or not y.is_floating_point():
            raise TypeError(f"x and y must be floating, not {x.dtype}, {y.dtype}")


class VagueError(Sound):
    def check(self, x: Tensor, y: Tensor) -> None:
        if x.shape[-1] != 5 or y.shape[-1] != 5:
            raise ValueError("bad shape")


class TakesIntegers(Sound):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.to(self.weight.dtype), y.to(self.weight.dtype)
        self.check(x, y)
        return self.product(x, y)


class SwallowsNaN(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x.nan_to_num(), y)


class LeaksNaN(Sound):
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return super().product(x + 0 * x.sum(), y)


BROKEN = {
    "shape": [ExtraAxis],
    "leading_dims": [BatchMean, FlattensOnlyOnce],
    "empty_batch": [NoEmpty],
    "dtype": [Upcasts, HalfPrecision, RoundedTable],
    "determinism": [Noisy, NoisyTraining],
    "train_eval": [HiddenDropout, NoisyTraining],
    "gradients": [Detached],
    "gradcheck": [WrongGradient],
    "inputs_unchanged": [InPlace],
    "state_dict": [HiddenState],
    "compiled": [GraphBreak],
    "wrong_shape": [NoShapeCheck, VagueError],
    "wrong_dtype": [TakesIntegers],
    "nan_input": [SwallowsNaN, LeaksNaN],
}


def test_every_check_has_a_layer_that_it_must_catch() -> None:
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_layer_passes(name: str) -> None:
    CHECKS[name](Case(Sound, TAGS))


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, layers in BROKEN.items() for layer in layers])
def test_a_broken_layer_is_caught(name: str, layer: type[nn.Module]) -> None:
    with pytest.raises(AssertionError):
        CHECKS[name](Case(layer, TAGS))


def test_bfloat16_dropout_and_image_layers_pass_with_their_tags() -> None:
    check_layer(lambda: Checked(nn.Dropout(0.3), 7), inputs=((7,),), output=(7,), stochastic=True, dtypes=(torch.bfloat16,))
    check_layer(
        lambda: Checked(nn.Conv2d(2, 3, 3, bias=False), 6),
        inputs=((2, 6, 6),),
        output=(3, 4, 4),
        leading=((3,), ()),
        free=((0, 0), (0, 1)),
    )


class Checked(nn.Module):
    """Torch's own layers raise RuntimeError at a wrong shape; here the last axis and the dtype are checked first."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size or not x.is_floating_point():
            raise ValueError(f"x must be floating and end in {self.size}, not {x.dtype} {tuple(x.shape)}")
        out: Tensor = self.layer(x)
        return out


def test_a_missing_tag_is_named() -> None:
    with pytest.raises(ValueError, match="'output'"):
        check_layer(Sound, inputs=((5,),))


def test_a_known_failure_must_fail() -> None:
    with pytest.raises(AssertionError, match="passes, but stands in xfail"):
        run_checks("layer", Case(Sound, TAGS, {"shape": "no reason"}))
