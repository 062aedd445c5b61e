"""Each check of functions passes a sound one and catches the fault that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from corollary.testing import Case, check_function
from corollary.testing.function import CHECKS


def draw(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype),)


TAGS = {"inputs": draw}


def sound(x: Tensor) -> Tensor:
    """The Frobenius norm."""
    if not x.is_floating_point():
        raise TypeError(f"'x' has dtype {x.dtype}; allowed: floating")
    if 0 in x.shape:
        raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: none of the sizes 0")
    return (x if x.dtype == torch.float64 else x.float()).square().sum((-2, -1)).sqrt()


def test_a_sound_function_passes() -> None:
    check_function(lambda: sound, **TAGS)


def test_inputs_are_required() -> None:
    with pytest.raises(ValueError, match="needs the tag 'inputs'"):
        check_function(lambda: sound)


def in_place(x: Tensor) -> Tensor:
    x *= 2
    return sound(x / 2)


class OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sound(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad[..., None, None] * ctx.saved_tensors[0] / sound(ctx.saved_tensors[0])[..., None, None]


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        ("finite", lambda x: sound(x) / 0, "not finite"),
        ("precision", lambda x: sound(x) * (1 if x.dtype == torch.float64 else 1.2), "relative error"),
        ("precision", lambda x: sound(x).float(), "gave torch.float32"),
        ("batch", lambda x: sound(x - x.mean(0, keepdim=True)), "differs from the samples' own"),
        ("batch", lambda x: x.square().sum().sqrt().expand(2), "has shape"),
        ("determinism", lambda x: sound(x) + torch.rand(()), "random state moved"),
        ("inputs_unchanged", in_place, "in place"),
        ("strides", lambda x: sound(x) + float(x.is_contiguous()), "lie in memory"),
        ("gradient", OwnGradient.apply, "."),
        ("nan_input", lambda x: sound(x.nan_to_num()), "vanished"),
        ("nan_input", lambda x: sound(x[..., :-1]), "vanished"),
        ("bad_input", lambda x: x.double().square().sum((-2, -1)), "int64 as input 0: was accepted"),
        ("bad_input", lambda x: x.norm() if x.numel() == 0 else sound(x), "no rows in input 0: was accepted"),
    ],
)
def test_each_check_catches_its_fault(check: str, broken: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](Case(lambda: broken, TAGS))


def test_a_bad_argument_that_is_accepted_is_caught() -> None:
    with pytest.raises(AssertionError, match="a plain matrix: was accepted"):
        CHECKS["bad_input"](Case(lambda: sound, {**TAGS, "bad": {"a plain matrix": (torch.ones(2, 2),)}}))
