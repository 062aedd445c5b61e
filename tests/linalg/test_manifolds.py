"""Manifolds against dense float64 formulas in numpy and scipy, and the conformance checks against broken manifolds."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch import Tensor

from corollary.linalg import Euclidean, Grassmann, Manifold, ManifoldParameter, Transposed, manifold_of
from corollary.testing import check_manifold


def turn(manifold: Grassmann, generator: torch.Generator, dtype: torch.dtype):
    q = torch.linalg.qr(torch.randn(5, manifold.k, manifold.k, generator=generator, dtype=dtype)).Q
    return lambda x: x @ q


def exp_by_svd(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The textbook geodesic of one frame, through the singular vectors."""
    u, s, wt = np.linalg.svd(v, full_matrices=False)
    return x @ wt.T @ np.diag(np.cos(s)) @ wt + u @ np.diag(np.sin(s)) @ wt


@given(n=st.integers(1, 9), k=st.integers(1, 9), length=st.floats(0, 20), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_exp_is_the_geodesic_of_the_textbook(n: int, k: int, length: float, seed: int) -> None:
    manifold = Grassmann(n, min(k, n))
    generator = torch.Generator().manual_seed(seed)
    x = manifold.random_point(generator=generator, dtype=torch.float64)
    v = length * manifold.random_tangent(x, generator=generator)
    expected = exp_by_svd(x.numpy(), v.numpy())
    np.testing.assert_allclose(manifold.exp(x, v), expected, atol=1e-11 * max(1.0, length**2))


def test_exp_holds_for_rank_deficient_and_repeated_directions() -> None:
    x = torch.eye(6, dtype=torch.float64)[:, :3]
    v = torch.zeros_like(x)
    v[3:5, :2] = 0.7 * torch.eye(2, dtype=torch.float64)  # two equal singular values and a zero one
    y = Grassmann(6, 3).exp(x, v)
    expected = torch.zeros_like(x)
    expected[[0, 1], [0, 1]], expected[[3, 4], [0, 1]], expected[2, 2] = np.cos(0.7), np.sin(0.7), 1.0
    torch.testing.assert_close(y, expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("length", [0.0, 1e-44, 1e-38, 1e-25, 1e-21, 1e-19, 1e3])
def test_steps_of_any_length_are_taken(length: float) -> None:
    """Squares of such lengths underflow in float32, down to entries that no eigensolver takes."""
    manifold = Grassmann(64, 8)
    generator = torch.Generator().manual_seed(0)
    x = manifold.random_point(10, generator=generator)
    y = manifold.exp(x, length * torch.randn(x.shape, generator=generator))
    assert y.isfinite().all()
    if length < 1:
        torch.testing.assert_close(y, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("retraction", ["geodesic", "qr", "polar"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_spoils_its_own_point_alone(retraction: str, bad: float) -> None:
    manifold = Grassmann(6, 2, retraction)
    x = manifold.random_point(3, generator=torch.Generator().manual_seed(0))
    v = manifold.random_tangent(x)
    v[1, 0, 0] = bad
    y = manifold.retract(x, v)
    assert not y[1].isfinite().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("n", "k"), [(7, 2), (7, 5), (4, 3), (5, 1), (4, 4)])
def test_distance_is_the_norm_of_the_principal_angles(n: int, k: int) -> None:
    manifold = Grassmann(n, k)
    generator = torch.Generator().manual_seed(0)
    x, y = (manifold.random_point(20, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = [np.linalg.norm(linalg.subspace_angles(a, b)) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_allclose(manifold.distance(x, y), expected, atol=1e-12)


def test_small_distances_keep_their_digits() -> None:
    x = torch.eye(5, dtype=torch.float64)[:, :2]
    v = torch.zeros_like(x)
    v[2, 0] = 1e-11
    assert float(Grassmann(5, 2).distance(x, Grassmann(5, 2).exp(x, v))) == pytest.approx(1e-11, rel=1e-4)


def test_retractions_are_the_factors_they_are_named_after() -> None:
    generator = torch.Generator().manual_seed(0)
    x = Grassmann(6, 3).random_point(generator=generator, dtype=torch.float64)
    v = Grassmann(6, 3).random_tangent(x, generator=generator)
    np.testing.assert_allclose(Grassmann(6, 3, "polar").retract(x, v), linalg.polar((x + v).numpy())[0], atol=1e-13)
    q, r = np.linalg.qr((x + v).numpy())
    np.testing.assert_allclose(Grassmann(6, 3, "qr").retract(x, v), q * np.sign(np.diag(r)), atol=1e-13)
    noise = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    np.testing.assert_allclose(Grassmann(6, 3).normalize(noise), linalg.polar(noise.numpy())[0], atol=1e-13)


def test_random_points_are_uniform() -> None:
    x = Grassmann(5, 2).random_point(20_000, generator=torch.Generator().manual_seed(0))
    projectors = x @ x.mT
    # A uniform subspace has mean projector (k/n) I, and E[P_11²] = k(k+2) / (n(n+2)).
    torch.testing.assert_close(projectors.mean(0), 0.4 * torch.eye(5), atol=0.01, rtol=0)
    assert float(projectors[:, 0, 0].square().mean()) == pytest.approx(8 / 35, abs=0.005)


@pytest.mark.parametrize(
    ("n", "k", "retraction"), [(5, 3, "geodesic"), (4, 1, "geodesic"), (32, 8, "geodesic"), (6, 2, "qr"), (5, 3, "polar")]
)
def test_grassmann_conforms(n: int, k: int, retraction: str) -> None:
    check_manifold(lambda: Grassmann(n, k, retraction), gauge=turn, equivariant=retraction != "qr")


def test_flat_space_and_transposed_frames_conform() -> None:
    check_manifold(Euclidean)
    check_manifold(lambda: Transposed(Grassmann(6, 2)))


@dataclass(frozen=True)
class Broken(Grassmann):
    """A Grassmann manifold with one member spoiled."""

    what: str = ""

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        if self.what == "no projection":
            return v
        if self.what == "half a projection":
            return v - 0.5 * x @ (x.mT @ v)
        if self.what == "Stiefel's projection":
            return v - 0.5 * x @ (x.mT @ v + v.mT @ x)
        return super().project(x, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        if self.what == "straight line":
            return x + v
        if self.what == "too fast":
            return super().retract(x, 1.01 * v)
        return super().retract(x, v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        return super().exp(x, v * 0.99) if self.what == "slow geodesic" else super().exp(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v if self.what == "no transport" else super().transport(x, y, v)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        if self.what == "distance of frames":
            return torch.linalg.matrix_norm(x - y)
        return super().distance(x, y)


@pytest.mark.parametrize(
    ("what", "check"),
    [
        ("no projection", "tangency"),
        ("half a projection", "projection"),
        ("Stiefel's projection", "gauge|transports|geodesics|retraction"),
        ("straight line", "retraction_stays"),
        ("too fast", "retraction_order"),
        ("slow geodesic", "retraction_order|geodesics"),
        ("no transport", "transports|retraction_stays"),
        ("distance of frames", "geodesics"),
    ],
)
def test_the_checks_find_a_broken_manifold(what: str, check: str) -> None:
    retraction = "geodesic" if "geodesic" not in what else "polar"
    with pytest.raises(AssertionError, match=f"check '({check})"):
        check_manifold(lambda: Broken(6, 2, retraction, what=what), gauge=turn)


def test_a_parameter_keeps_its_manifold_through_copies_and_moves() -> None:
    manifold = Grassmann(5, 2)
    module = torch.nn.Module()
    module.weight = ManifoldParameter(manifold.random_point(3), manifold)
    twin = copy.deepcopy(module)
    assert manifold_of(twin.weight) == manifold
    assert twin.weight is not module.weight
    assert torch.equal(twin.weight, module.weight)
    assert manifold_of(module.double().weight) == manifold
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert manifold_of(torch.load(buffer, weights_only=False).weight) == manifold
    assert manifold_of(torch.nn.Parameter(torch.zeros(2))) is None
    shared = torch.nn.ModuleList([module, module])
    pair = copy.deepcopy(shared)
    assert pair[0].weight is pair[1].weight


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Grassmann(3, 4), ValueError, "k must be at most n = 3, got 4"),
        (lambda: Grassmann(0, 1), ValueError, "n must be an integer of at least 1, got 0"),
        (lambda: Grassmann(3, 1.5), ValueError, "k must be an integer"),
        (lambda: Grassmann(3, 1, "cayley"), ValueError, "geodesic, qr, polar, got 'cayley'"),
        (lambda: Transposed(Euclidean()), ValueError, "manifold of matrices"),
        (lambda: ManifoldParameter(torch.zeros(3, 2), Grassmann(4, 2)), ValueError, r"\(..., 4, 2\).*got \(3, 2\)"),
        (lambda: ManifoldParameter(torch.zeros(4), Grassmann(4, 2)), ValueError, r"got \(4,\)"),
        (lambda: ManifoldParameter(torch.zeros(4, 2), "grassmann"), TypeError, "must be a Manifold, got str"),
        (lambda: Grassmann(4, 2).check_point(torch.zeros(4, 2, dtype=torch.int32)), TypeError, "int32"),
        (lambda: Grassmann(4, 2).check_point(torch.ones(4, 2)), ValueError, "see normalize"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


class Flat(Euclidean):
    """A manifold that leaves out what may be left out."""

    exp, distance = Manifold.exp, Manifold.distance


def test_what_has_no_closed_form_says_so() -> None:
    with pytest.raises(NotImplementedError, match="no closed-form exponential; use retract"):
        Flat().exp(torch.zeros(1), torch.zeros(1))
    check_manifold(Flat)
