"""Lanczos and stochastic Lanczos quadrature against dense eigenvalues in float64, closed forms and textbook recurrences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.linalg import (
    HessianOperator,
    SpectralDensity,
    extreme_eigenvalues,
    lanczos,
    spectral_density,
)


def _symmetric(n: int, seed: int, spectrum: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    values = torch.randn(n, dtype=torch.float64, generator=generator) if spectrum is None else spectrum
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


def _by_hand(matrix: np.ndarray, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """T's diagonals as Householder's reduction gives them: orthogonalize the Krylov matrix, then Qᵀ A Q."""
    krylov = [start / np.linalg.norm(start)]
    for _ in range(steps - 1):
        v = matrix @ krylov[-1]
        krylov.append(v / np.linalg.norm(v))
    q, _ = np.linalg.qr(np.stack(krylov, axis=1))
    t = q.T @ matrix @ q
    return np.diag(t), np.abs(np.diag(t, 1))


def test_the_tridiagonal_matrix_is_that_of_the_krylov_space() -> None:
    matrix, start = _symmetric(30, 0), torch.linspace(1, 2, 30, dtype=torch.float64)
    diagonal, off = _by_hand(matrix.numpy(), start.numpy(), 7)
    ours = lanczos(matrix, 7, start=start)
    np.testing.assert_allclose(ours.diagonal.numpy(), diagonal, atol=1e-8)
    np.testing.assert_allclose(ours.off_diagonal.numpy(), off, atol=1e-8)


@given(n=st.integers(1, 30), steps=st.integers(1, 40), seed=st.integers(0, 2**31 - 1), k=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_basis_is_orthonormal_and_carries_the_matrix_to_t(n: int, steps: int, seed: int, k: int) -> None:
    """A Q = Q T + β q eᵀ, so what is left over is a column in the last place, of norm β and orthogonal to Q."""
    matrix = _symmetric(n, seed)
    start = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    result = lanczos(matrix, steps, start=start, keep_basis=True)
    assert result.basis is not None
    m = min(n, steps)
    assert result.basis.shape == (k, n, m)
    for q, t, beta in zip(result.basis, result.dense(), result.remainder, strict=True):
        torch.testing.assert_close(q.T @ q, torch.eye(m, dtype=torch.float64), atol=1e-12, rtol=0)
        rest = matrix @ q - q @ t
        torch.testing.assert_close(rest[:, :-1], torch.zeros(n, m - 1, dtype=torch.float64), atol=1e-11, rtol=0)
        assert abs(float(rest[:, -1].norm() - beta)) < 1e-11
        assert float((q.T @ rest).abs().max()) < 1e-11


@given(n=st.integers(2, 25), steps=st.integers(1, 25), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_an_eigenvalue_lies_within_every_residual_bound(n: int, steps: int, seed: int) -> None:
    matrix = _symmetric(n, seed)
    true = torch.linalg.eigvalsh(matrix)
    values, weights, bounds = lanczos(matrix, steps, generator=torch.Generator().manual_seed(seed)).ritz()
    distance = (values[:, None] - true).abs().amin(1)
    assert bool((distance <= bounds + 1e-11).all())
    assert float(values.min()) >= float(true.min()) - 1e-11  # Ritz values never leave the spectrum
    assert float(values.max()) <= float(true.max()) + 1e-11
    assert abs(float(weights.sum()) - 1) < 1e-12


@given(n=st.integers(4, 20), seed=st.integers(0, 2**31 - 1), steps=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_quadrature_is_exact_up_to_degree_2m_minus_1(n: int, seed: int, steps: int) -> None:
    matrix = _symmetric(n, seed)
    z = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z = z / z.norm()
    nodes, weights, _ = lanczos(matrix, steps, start=z).ritz()
    moment = z.clone()
    for degree in range(2 * steps):
        wanted, scale = float(z @ moment), float(torch.linalg.eigvalsh(matrix).abs().max()) ** degree
        assert abs(float((weights * nodes**degree).sum()) - wanted) <= 1e-10 * max(1.0, scale)
        moment = matrix @ moment


@given(n=st.integers(1, 20), seed=st.integers(0, 2**31 - 1), distinct=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_n_steps_give_the_whole_spectrum_repeated_eigenvalues_too(n: int, seed: int, distinct: int) -> None:
    """With few distinct eigenvalues the start's Krylov space is soon exhausted and the chain restarts."""
    spectrum = torch.arange(n, dtype=torch.float64) % distinct - 1
    matrix = _symmetric(n, seed, spectrum)
    values, _, bounds = lanczos(matrix, n, generator=torch.Generator().manual_seed(seed)).ritz()
    torch.testing.assert_close(values, spectrum.sort().values, atol=1e-9, rtol=0)
    assert float(bounds.max()) == 0


def test_a_restarted_block_has_no_weight() -> None:
    start = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    result = lanczos(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)), 4, start=start)
    assert result.off_diagonal[1] == 0
    values, weights, _ = result.ritz()
    torch.testing.assert_close(values, torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_zero_matrix_and_the_identity(dtype: torch.dtype) -> None:
    within = 1e-6 if dtype == torch.float32 else 0.01
    for scale in (0.0, 1.0):
        found = extreme_eigenvalues(scale * torch.eye(6, dtype=dtype), largest=2, smallest=2)
        assert found.largest.tolist() == pytest.approx([scale] * 2, abs=within)
        assert found.smallest.tolist() == pytest.approx([scale] * 2, abs=within)
        assert found.converged


def test_chains_side_by_side_equal_chains_alone() -> None:
    matrix = _symmetric(40, 3)
    starts = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = lanczos(matrix, 12, start=starts)
    for i in range(3):
        alone = lanczos(matrix, 12, start=starts[:, i])
        torch.testing.assert_close(together.diagonal[i], alone.diagonal, atol=1e-10, rtol=0)
        torch.testing.assert_close(together.off_diagonal[i], alone.off_diagonal, atol=1e-10, rtol=0)
        torch.testing.assert_close(together.remainder[i], alone.remainder, atol=1e-10, rtol=0)


def test_one_exhausted_chain_does_not_disturb_its_neighbour() -> None:
    matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    lonely = torch.zeros(8, dtype=torch.float64)
    lonely[2] = 1
    other = torch.ones(8, dtype=torch.float64)
    both = lanczos(matrix, 5, start=torch.stack([lonely, other], dim=1))
    alone = lanczos(matrix, 5, start=other)
    torch.testing.assert_close(both.diagonal[1], alone.diagonal, atol=1e-12, rtol=0)
    assert both.off_diagonal[0, 0] == 0
    assert both.diagonal[0, 0] == 3


def test_full_reorthogonalization_leaves_no_ghosts() -> None:
    """Without it the isolated eigenvalue would come back again and again in 150 float32 steps."""
    spectrum = torch.cat([torch.linspace(0, 1, 299, dtype=torch.float64), torch.tensor([50.0], dtype=torch.float64)])
    values, _, _ = lanczos(_symmetric(300, 0, spectrum).float(), 150, generator=torch.Generator().manual_seed(0)).ritz()
    assert int((values > 2).sum()) == 1
    assert float(values.max()) == pytest.approx(50, rel=1e-5)


def test_extremes_and_vectors_equal_a_dense_solver() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 194), torch.tensor([-4.0, -3.0, 5.0, 6.5, 7.0, 9.0])]).double()
    matrix = _symmetric(200, 1, spectrum)
    found = extreme_eigenvalues(
        matrix, largest=3, smallest=2, tol=1e-10, vectors=True, generator=torch.Generator().manual_seed(0)
    )
    values, vectors = np.linalg.eigh(matrix.numpy())
    np.testing.assert_allclose(found.largest.numpy(), values[::-1][:3], atol=1e-9)
    np.testing.assert_allclose(found.smallest.numpy(), values[:2], atol=1e-9)
    assert found.converged
    assert found.steps < 60
    assert found.largest_vectors is not None
    assert found.smallest_vectors is not None
    overlap = np.abs(np.sum(found.largest_vectors.numpy() * vectors[:, ::-1][:, :3], axis=0))
    np.testing.assert_allclose(overlap, 1, atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(found.smallest_vectors.numpy() * vectors[:, :2], axis=0)), 1, atol=1e-9)


def test_a_repeated_eigenvalue_is_found_again_where_the_chain_restarts() -> None:
    spectrum = torch.cat([torch.full((3,), 5.0), torch.ones(37)]).double()
    found = extreme_eigenvalues(_symmetric(40, 0, spectrum), largest=2, generator=torch.Generator().manual_seed(0))
    assert found.largest.tolist() == pytest.approx([5, 5])
    assert found.smallest.tolist() == pytest.approx([1])
    assert found.converged
    assert found.steps < 10


def test_the_basis_grows_with_the_steps() -> None:
    """More steps than there is room for at first, and a memory that a chain of 200 would not need."""
    spectrum = torch.linspace(0, 1, 400, dtype=torch.float64)
    found = extreme_eigenvalues(
        _symmetric(400, 7, spectrum), tol=1e-9, vectors=True, generator=torch.Generator().manual_seed(0)
    )
    assert found.steps > 64
    assert found.converged
    assert [found.largest.item(), found.smallest.item()] == pytest.approx([1, 0], abs=1e-9)


def test_giving_up_is_said_and_the_bounds_still_hold() -> None:
    matrix = _symmetric(100, 2)
    found = extreme_eigenvalues(matrix, max_steps=5, tol=1e-10, generator=torch.Generator().manual_seed(0))
    assert not found.converged
    assert found.steps == 5
    true = torch.linalg.eigvalsh(matrix)
    for value, bound in ((found.largest, found.largest_bounds), (found.smallest, found.smallest_bounds)):
        assert float((true - value).abs().min()) <= float(bound)


def test_a_networks_hessian_without_forming_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    hessian = HessianOperator(nn.functional.cross_entropy(net(x), y), net.parameters())
    true = np.linalg.eigvalsh(hessian.dense().numpy())
    found = extreme_eigenvalues(hessian, tol=1e-9, generator=torch.Generator().manual_seed(0))
    assert float(found.largest[0]) == pytest.approx(true[-1], abs=1e-9)
    assert float(found.smallest[0]) == pytest.approx(true[0], abs=1e-9)
    spectrum = spectral_density(hessian, steps=53, samples=64, generator=torch.Generator().manual_seed(0))
    trace = spectrum.trace()
    assert abs(trace.value - true.sum()) < 5 * trace.standard_error


def test_half_precision_is_multiplied_in_half_and_orthogonalized_in_single() -> None:
    matrix = torch.diag(torch.arange(1.0, 65.0)).to(torch.bfloat16)
    result = lanczos(matrix, 20, keep_basis=True, generator=torch.Generator().manual_seed(0))
    assert result.basis is not None
    assert result.basis.dtype == torch.float32
    torch.testing.assert_close(result.basis.T @ result.basis, torch.eye(20), atol=1e-5, rtol=0)
    assert float(result.ritz()[0].max()) == pytest.approx(64, rel=0.02)


def test_ritz_vectors_are_eigenvectors_where_the_bound_is_small() -> None:
    matrix = _symmetric(30, 5)
    result = lanczos(matrix, 25, keep_basis=True, generator=torch.Generator().manual_seed(0))
    values, _, bounds = result.ritz()
    vectors = result.ritz_vectors()
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    torch.testing.assert_close(residuals, bounds, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="keep_basis=True"):
        lanczos(matrix, 3).ritz_vectors()


# ------------------------------------------------------------------------------------------------------------ quadrature


def test_traces_of_functions_converge_to_the_dense_ones() -> None:
    matrix = _symmetric(120, 4, torch.linspace(0.2, 3, 120, dtype=torch.float64))
    true = torch.linalg.eigvalsh(matrix)
    spectrum = spectral_density(matrix, steps=30, samples=400, generator=torch.Generator().manual_seed(0))
    for function in (torch.log, torch.exp, torch.sqrt, torch.reciprocal):
        estimate = spectrum.trace(function)
        assert abs(estimate.value - float(function(true).sum())) < 4 * estimate.standard_error
        assert estimate.standard_error < 0.02 * abs(float(function(true).abs().sum()))


def test_the_standard_error_is_the_spread_of_repeated_estimates() -> None:
    matrix = _symmetric(50, 6)
    generator = torch.Generator().manual_seed(0)
    runs = [spectral_density(matrix, steps=4, samples=8, generator=generator).trace(torch.exp) for _ in range(300)]
    values, errors = np.array([r.value for r in runs]), np.array([r.standard_error for r in runs])
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.15)
    assert math.isnan(spectral_density(matrix, samples=1).trace().standard_error)


def test_the_trace_of_a_diagonal_matrix_is_exact_for_rademacher_probes() -> None:
    diagonal = torch.linspace(-1, 2, 30, dtype=torch.float64)
    estimate = spectral_density(torch.diag(diagonal), steps=5, samples=3, generator=torch.Generator().manual_seed(0)).trace()
    assert estimate.value == pytest.approx(float(diagonal.sum()), abs=1e-10)
    assert estimate.standard_error < 1e-10


def test_the_density_of_a_wigner_matrix_is_the_semicircle() -> None:
    n, generator = 600, torch.Generator().manual_seed(0)
    noise = torch.randn(n, n, dtype=torch.float64, generator=generator)
    spectrum = spectral_density((noise + noise.T) / math.sqrt(2 * n), steps=60, samples=16, generator=generator)
    at = torch.linspace(-1.8, 1.8, 37, dtype=torch.float64)
    semicircle = torch.sqrt(4 - at**2) / (2 * math.pi)
    assert float((spectrum.density(at, width=0.15) - semicircle).abs().max()) < 0.03
    cdf = 0.5 + at * torch.sqrt(4 - at**2) / (4 * math.pi) + torch.asin(at / 2) / math.pi
    assert float((spectrum.cdf(at) - cdf).abs().max()) < 0.02
    assert spectrum.cdf(torch.tensor([-3.0, 3.0])).tolist() == pytest.approx([0, 1])


def test_chunks_do_not_change_how_many_probes_there_are() -> None:
    matrix = _symmetric(20, 0)
    spectrum = spectral_density(matrix, steps=6, samples=7, chunk=3, generator=torch.Generator().manual_seed(0))
    assert spectrum.nodes.shape == spectrum.weights.shape == (7, 6)
    torch.testing.assert_close(spectrum.weights.sum(1), torch.ones(7, dtype=torch.float64))
    gaussian = spectral_density(matrix, steps=20, samples=2000, probe="gaussian", generator=torch.Generator().manual_seed(0))
    estimate = gaussian.trace(torch.square)
    assert abs(estimate.value - float(matrix.square().sum())) < 4 * estimate.standard_error


def test_a_density_integrates_to_one_and_becomes_plain_data() -> None:
    spectrum = spectral_density(_symmetric(40, 1), steps=10, samples=2, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(spectrum.density(grid), grid)) == pytest.approx(1, abs=1e-3)
    data = spectrum.to_dict()
    again = SpectralDensity(torch.tensor(data["nodes"]).double(), torch.tensor(data["weights"]).double(), data["dimension"])
    assert again.trace().value == pytest.approx(spectrum.trace().value, rel=1e-5)


def test_a_density_draws_itself() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    spectrum = spectral_density(_symmetric(40, 1), steps=10, samples=2)
    assert spectrum.plot(ax) is ax
    assert len(ax.lines) == 1
    plt.close("all")


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lanczos(torch.zeros(2, 3), 1), r"'operator' must be square and not empty, not of shape \(2, 3\)"),
        (lambda: lanczos(torch.zeros(0, 0), 1), "'operator' must be square and not empty"),
        (lambda: lanczos(torch.eye(2, dtype=torch.int64), 1), "'operator' must be real and floating, not torch.int64"),
        (lambda: lanczos(torch.eye(2, dtype=torch.complex64), 1), "real and floating, not torch.complex64"),
        (lambda: lanczos(torch.eye(2), 0), "'steps' must be at least 1, not 0"),
        (lambda: lanczos(torch.eye(2), 1, start=torch.ones(3)), r"'start' must be \(2,\) or \(2, k\), not \(3,\)"),
        (lambda: lanczos(torch.eye(2), 1, start=torch.zeros(2)), "'start' must be finite and not zero"),
        (lambda: lanczos(torch.eye(2), 1, start=torch.tensor([1.0, math.nan])), "'start' must be finite and not zero"),
        (lambda: lanczos(torch.eye(2), 1, start=torch.ones(2, dtype=torch.complex64)), "'start' must be real"),
        (lambda: lanczos(torch.full((2, 2), math.nan), 1), "a product that is not finite at Lanczos step 1"),
        (lambda: extreme_eigenvalues(torch.eye(2), largest=-1), "must not be negative or both 0; they are -1 and 1"),
        (lambda: extreme_eigenvalues(torch.eye(2), largest=0, smallest=0), "or both 0"),
        (lambda: extreme_eigenvalues(torch.eye(2), largest=2), "is 3; at most n = 2"),
        (lambda: extreme_eigenvalues(torch.eye(2), start=torch.ones(2, 2)), r"'start' must be one vector \(2,\)"),
        (lambda: spectral_density(torch.eye(2), samples=0), "must be at least 1"),
        (lambda: spectral_density(torch.eye(2), probe="sine"), "'probe' is 'sine'; allowed: rademacher, gaussian"),
        (lambda: spectral_density(torch.zeros(2, 3)), "'operator' must be square"),
        (lambda: spectral_density(torch.eye(3)).density(torch.zeros(1), width=0.0), "'width' must be above 0"),
        (lambda: spectral_density(-torch.eye(3)).trace(torch.log), "'function' is not finite at a Ritz value"),
        (lambda: spectral_density(torch.eye(3)).trace(lambda x: x.sum()), "'function' must keep the shape"),
    ],
)
def test_bad_input_is_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
