"""The Grassmann head against a naive per-class loop, finite differences, and the theorems of its logit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.linalg import Grassmann, Transposed
from corollary.nn import GrassmannLinear


def naive(x: np.ndarray, weight: np.ndarray, gamma: float) -> np.ndarray:
    """One sample, one class, one basis vector at a time."""
    logits = np.zeros((len(x), len(weight)))
    for b, feature in enumerate(x):
        unit = feature / np.sqrt(sum(f * f for f in feature))
        for c, basis in enumerate(weight):
            logits[b, c] = gamma * np.sqrt(sum(float(unit @ row) ** 2 for row in basis))
    return logits


@pytest.mark.parametrize(("n", "classes", "dim"), [(7, 4, 3), (5, 1, 5), (6, 9, 1)])
def test_forward_is_the_naive_loop(n: int, classes: int, dim: int) -> None:
    torch.manual_seed(0)
    head = GrassmannLinear(n, classes, dim, gamma=13.0, dtype=torch.float64)
    x = torch.randn(11, n, dtype=torch.float64)
    np.testing.assert_allclose(head(x).detach(), naive(x.numpy(), head.weight.detach().numpy(), 13.0), rtol=1e-12)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 8), dim=st.integers(1, 8), scale=st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_logits_depend_on_subspace_and_direction_alone(seed: int, n: int, dim: int, scale: float) -> None:
    dim = min(dim, n)
    torch.manual_seed(seed)
    head = GrassmannLinear(n, 3, dim, dtype=torch.float64)
    x = torch.randn(4, n, dtype=torch.float64)
    logits = head(x).detach()
    assert float(logits.max()) <= 25 * (1 + 1e-12)
    torch.testing.assert_close(head(-scale * x).detach(), logits, rtol=1e-10, atol=1e-10)
    q = torch.linalg.qr(torch.randn(3, dim, dim, dtype=torch.float64)).Q
    with torch.no_grad():
        head.weight.copy_(q @ head.weight)
    torch.testing.assert_close(head(x).detach(), logits, rtol=1e-10, atol=1e-10)
    inside = torch.randn(dim, dtype=torch.float64) @ head.weight[1]  # a feature in the subspace has the full logit
    assert head(inside)[1].item() == pytest.approx(25.0, rel=1e-10)


def test_derivatives_of_two_orders() -> None:
    torch.manual_seed(0)
    head = GrassmannLinear(5, 3, 2, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (x,))

    weight = head.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_blows_up_where_a_norm_is_zero(dtype: torch.dtype) -> None:
    head = GrassmannLinear(4, 2, 2).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4, dtype=dtype).reshape(2, 2, 4))
    # A zero feature, one orthogonal to class 1, an ordinary one.
    x = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0], [1, 2, 3, 4]], dtype=dtype, requires_grad=True)
    logits = head(x)
    assert logits.dtype == dtype
    assert logits[0].tolist() == [0, 0]
    assert logits[1, 1] == 0
    grads = torch.autograd.grad(logits.sum(), (x, head.weight), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (x, head.weight))
    for tensor in (*grads, *second):
        assert tensor.isfinite().all()
    assert not grads[0][0].any()


def test_gradient_under_vmap_is_the_per_sample_gradient() -> None:
    torch.manual_seed(0)
    head = GrassmannLinear(5, 3, 2).double()  # the sine of a large sum amplifies float32's rounding
    x = torch.randn(4, 5, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(lambda row: head(row).square().sum().sin()))(x)
    loop = torch.stack([torch.func.grad(lambda row: head(row).square().sum().sin())(row) for row in x])
    torch.testing.assert_close(each, loop)


def test_a_fresh_head_is_uniform_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    first = GrassmannLinear(8, 4000, 2)
    Transposed(Grassmann(8, 2)).check_point(first.weight.detach())
    mean = (first.weight.mT @ first.weight).mean(0)
    torch.testing.assert_close(mean, torch.eye(8) / 4, atol=0.02, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(GrassmannLinear(8, 4000, 2).weight, first.weight)


def test_copies_and_meta_device() -> None:
    head = GrassmannLinear(8, 3, 2)
    twin = copy.deepcopy(head)
    assert twin.weight.manifold == head.weight.manifold
    empty = GrassmannLinear(8, 3, 2, device="meta")
    assert empty.weight.is_meta
    filled = empty.to_empty(device="cpu")
    filled.reset_parameters()
    assert "dim=2, gamma=25.0" in repr(filled)
    filled.weight.manifold.check_point(filled.weight)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: GrassmannLinear(4, 3, 5), ValueError, "dim must be at most in_features = 4, got 5"),
        (lambda: GrassmannLinear(4, 0, 1), ValueError, "num_classes must be an integer of at least 1, got 0"),
        (lambda: GrassmannLinear(4, 3, 2, gamma=-1), ValueError, "gamma must be above 0"),
        (lambda: GrassmannLinear(4, 3, 2, gamma=float("nan")), ValueError, "gamma must be above 0"),
        (lambda: GrassmannLinear(4, 3, 2, retraction="euler"), ValueError, "retraction must be one of"),
        (lambda: GrassmannLinear(4, 3, 2)(torch.zeros(2, 5)), ValueError, r"\(..., 4\), got \(2, 5\)"),
        (lambda: GrassmannLinear(4, 3, 2)(torch.tensor(1.0)), ValueError, r"got \(\)"),
        (lambda: GrassmannLinear(4, 3, 2)(torch.zeros(2, 4, dtype=torch.int64)), TypeError, "got torch.int64"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
