"""Matrix completion against a naive loop, closed forms and scikit-learn's own checks."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from corollary.claims.timing import peak_bytes
from corollary.recovery import MatrixCompletion


def low_rank(m, n, k, seed=0, rate=0.4):
    rng = np.random.default_rng(seed)
    full = rng.normal(size=(m, k)) @ rng.normal(size=(k, n))
    mask = rng.random((m, n)) < rate
    return full, mask, sparse.csr_matrix((full[mask], np.nonzero(mask)), shape=(m, n))


def completed(model):
    return model.inverse_transform(model.embedding_)


def relative(got, truth):
    return np.linalg.norm(got - truth) / np.linalg.norm(truth)


@parametrize_with_checks(
    [MatrixCompletion(), MatrixCompletion(solver="exact", alpha=0.1), MatrixCompletion(preconditioner="row", init="random")]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def naive_als(full, mask, k, alpha, iterations, seed):
    """Alternating least squares one row at a time, each by numpy's lstsq; the residual after every iteration."""
    random = np.random.RandomState(seed)
    random.randint(2**31 - 1)  # the estimator's first draw seeds its sketches
    u = random.standard_normal((full.shape[0], k))
    v = np.zeros((full.shape[1], k))
    curve = []
    for _ in range(iterations):
        for matrix, seen, factor, target in ((full.T, mask.T, u, v), (full, mask, v, u)):
            for i in range(len(target)):
                a = np.vstack([factor[seen[i]], np.sqrt(alpha) * np.eye(k)])
                target[i] = np.linalg.lstsq(a, np.concatenate([matrix[i][seen[i]], np.zeros(k)]), rcond=None)[0]
        curve.append(np.sqrt(np.mean((full - u @ v.T)[mask] ** 2)))
    return np.array(curve), u @ v.T


@pytest.mark.parametrize(
    ("params", "tol"),
    [
        ({"solver": "exact"}, 1e-9),
        ({"inner_tol": 1e-12, "max_inner_iter": 100}, 1e-8),
        ({"inner_tol": 1e-12, "max_inner_iter": 100, "preconditioner": "row", "oversampling": 4}, 1e-8),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_trajectory_of_a_naive_loop(params, tol, alpha):
    full, mask, x = low_rank(60, 50, 6, rate=0.5)
    expected, _ = naive_als(full, mask, 3, alpha, 8, seed=11)
    model = MatrixCompletion(3, init="random", alpha=alpha, tol=0, max_iter=8, random_state=11, **params).fit(x)
    assert model.n_iter_ == 8
    assert_allclose(model.loss_curve_, expected, rtol=tol)


@pytest.mark.parametrize("params", [{"solver": "exact"}, {}, {"preconditioner": "row"}])
def test_fully_observed_is_the_truncated_svd(params):
    x = np.random.default_rng(0).normal(size=(40, 30)) @ np.diag(0.8 ** np.arange(30))
    u, s, vt = np.linalg.svd(x)
    model = MatrixCompletion(4, tol=0, max_iter=300, random_state=0, **params).fit(x)
    assert_allclose(completed(model), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
    assert_allclose(model.singular_values_, s[:4], rtol=1e-6)
    gram = model.components_ @ model.components_.T
    assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-8)


@pytest.mark.parametrize("params", [{"solver": "exact"}, {}])
def test_fully_observed_with_ridge_thresholds_the_singular_values(params):
    """The least of |M - X|² + α(|U|² + |V|²) over UVᵀ = X is the nuclear norm's: singular values fall by α."""
    x = np.random.default_rng(0).normal(size=(30, 20)) @ np.diag(0.7 ** np.arange(20))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    model = MatrixCompletion(6, alpha=0.6, tol=0, max_iter=400, random_state=0, **params).fit(x)
    expected = np.maximum(s[:6] - 0.6, 0)
    assert_allclose(completed(model), (u[:, :6] * expected) @ vt[:6], atol=1e-5)


@pytest.mark.parametrize(
    "params", [{"solver": "exact"}, {}, {"inner_tol": 0.9, "max_inner_iter": 1}, {"preconditioner": "row"}, {"init": "random"}]
)
def test_recovers_the_missing_entries(params):
    full, mask, x = low_rank(200, 150, 3, rate=0.3)
    model = MatrixCompletion(3, tol=1e-10, max_iter=300, random_state=0, **params).fit(x)
    assert relative(completed(model), full) < 1e-7
    i, j = np.nonzero(~mask)
    assert_allclose(model.predict_entries(i, j), full[i, j], atol=1e-5)
    assert model.score(np.where(mask, np.nan, full)) > -1e-6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.floats(0.3, 1.0), k=st.integers(1, 4), inner_tol=st.floats(0.0, 0.95))
def test_approximate_updates_never_raise_the_loss(seed, rate, k, inner_tol):
    _, _, x = low_rank(25, 30, 6, seed, rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = MatrixCompletion(k, tol=0, max_iter=15, inner_tol=inner_tol, random_state=seed).fit(x)
    curve = model.loss_curve_
    assert (curve[1:] <= curve[:-1] * (1 + 1e-9) + 1e-12).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(1e-4, 1e4))
def test_scales_with_its_input(seed, factor):
    _, _, x = low_rank(40, 30, 2, seed, 0.5)
    one, scaled = (MatrixCompletion(2, random_state=0, tol=1e-7, max_iter=20).fit(m) for m in (x, x * factor))
    assert_allclose(completed(scaled), factor * completed(one), atol=1e-3 * factor * np.abs(x.data).max())


def test_missing_in_a_dense_array_is_not_stored_in_a_sparse_one():
    full, mask, x = low_rank(50, 40, 2)
    full[0, mask[0].argmax()] = 0  # an observed zero, which a sparse matrix stores
    x.data[0] = 0
    assert x.nnz == mask.sum()
    dense = MatrixCompletion(2, random_state=0).fit(np.where(mask, full, np.nan))
    stored = MatrixCompletion(2, random_state=0).fit(x)
    assert_allclose(completed(dense), completed(stored), atol=1e-10)
    without = x.copy()
    without.eliminate_zeros()
    assert np.abs(completed(MatrixCompletion(2, random_state=0).fit(without)) - completed(stored)).max() > 1e-3


def test_unsorted_and_repeated_entries():
    full, mask, x = low_rank(50, 40, 2)
    i, j = np.nonzero(mask)
    order = np.random.default_rng(0).permutation(len(i))
    twice = sparse.coo_matrix(
        (np.tile(full[i, j][order] / 2, 2), (np.tile(i[order], 2), np.tile(j[order], 2))), shape=full.shape
    )
    reference = MatrixCompletion(2, random_state=0).fit(x)
    assert_allclose(completed(MatrixCompletion(2, random_state=0).fit(twice)), completed(reference), atol=1e-9)
    raw = sparse.csr_matrix((50, 40))
    raw.indptr, raw.indices, raw.data = x.indptr, x.indices.copy(), x.data.copy()
    for row in range(50):
        part = slice(x.indptr[row], x.indptr[row + 1])
        raw.indices[part], raw.data[part] = x.indices[part][::-1], x.data[part][::-1]
    before = raw.indices.copy()
    raw.has_sorted_indices = raw.has_canonical_format = False
    assert_allclose(completed(MatrixCompletion(2, random_state=0).fit(raw)), completed(reference), atol=1e-9)
    assert (raw.indices == before).all()


def test_rows_and_columns_without_entries_are_zero():
    full, mask, _ = low_rank(60, 50, 2, rate=0.5)
    mask[3], mask[:, 7] = False, False
    model = MatrixCompletion(2, random_state=0).fit(np.where(mask, full, np.nan))
    assert np.isfinite(completed(model)).all()
    assert (completed(model)[3] == 0).all()
    assert_allclose(completed(model)[:, 7], 0, atol=1e-12)


def test_new_rows_are_completed():
    full, mask, _ = low_rank(200, 80, 3)
    seen = np.where(mask, full, np.nan)
    model = MatrixCompletion(3, tol=1e-9, random_state=0).fit(seen[:150])
    assert relative(model.inverse_transform(model.transform(seen[150:])), full[150:]) < 1e-6
    assert_allclose(model.transform(seen[:150]), model.embedding_, atol=1e-9)
    assert list(model.get_feature_names_out()) == ["matrixcompletion0", "matrixcompletion1", "matrixcompletion2"]


def test_a_crowded_row_does_not_spoil_the_start():
    """Trimming and clipping: one fully observed row of large values among sparse ones."""
    full, mask, _ = low_rank(200, 200, 2, rate=0.1)
    full[0] *= 30
    mask[0] = True
    model = MatrixCompletion(2, tol=1e-9, max_iter=200, random_state=0).fit(np.where(mask, full, np.nan))
    assert relative(completed(model)[1:], full[1:]) < 1e-4


def test_float32_stays_and_recovers():
    full, _, x = low_rank(150, 120, 3)
    model = MatrixCompletion(3, random_state=0).fit(x.astype(np.float32))
    assert {a.dtype for a in (model.components_, model.embedding_, model.singular_values_)} == {np.dtype(np.float32)}
    assert relative(completed(model), full) < 1e-3


@pytest.mark.parametrize("solver", ["sketched", "exact"])
def test_a_million_entries_in_linear_memory(solver):
    """Never |Ω| × k numbers at once: with k = 64 these would take 512 MB."""
    rng = np.random.default_rng(0)
    m, each, k = 10_000, 100, 64
    columns = rng.integers(0, 2000, (m, each)).ravel()
    x = sparse.csr_matrix((rng.normal(size=m * each), (np.repeat(np.arange(m), each), columns)), shape=(m, 2000))
    x.sum_duplicates()
    model = MatrixCompletion(k, solver=solver, alpha=1.0, tol=0, max_iter=1, random_state=0)
    peak = peak_bytes(lambda: model.fit(x))
    gathered = x.nnz * k * 8
    assert gathered > 490e6
    linear = 8 * (x.nnz + (x.shape[0] + x.shape[1]) * k)
    assert peak < 12 * linear
    assert peak < gathered / 2


def test_random_states():
    _, _, x = low_rank(60, 50, 2)
    a, b = (MatrixCompletion(2, init="random", preconditioner="row", random_state=5).fit(x) for _ in range(2))
    assert (a.components_ == b.components_).all()
    other = MatrixCompletion(2, init="random", random_state=6, max_iter=5, tol=0).fit(x)
    assert not np.array_equal(a.loss_curve_[:5], other.loss_curve_)


def test_warns_where_it_has_not_converged():
    _, _, x = low_rank(60, 50, 2)
    with pytest.warns(ConvergenceWarning, match="not converged after max_iter=2"):
        MatrixCompletion(2, tol=1e-9, max_iter=2, random_state=0).fit(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((5, 4), np.nan), "X has no observed entry"),
        (sparse.csr_matrix((5, 4)), "X has no observed entry"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), "infinity"),
        (sparse.csr_matrix(np.array([[1.0, np.nan], [0.0, 1.0]])), "X stores NaN"),
        (np.ones((5, 1)), r"n_components=2 must be at most min\(n_samples=5, n_features=1\)"),
        (np.ones(5), "Expected 2D array"),
        (np.ones((0, 5)), "0 sample"),
    ],
)
def test_bad_matrices(x, message):
    with pytest.raises(ValueError, match=message):
        MatrixCompletion(2).fit(x)


@pytest.mark.parametrize(
    "params", [{"solver": "fast"}, {"n_components": 0}, {"alpha": -1.0}, {"inner_tol": 1.0}, {"preconditioner": None}]
)
def test_bad_parameters(params):
    with pytest.raises(ValueError, match=f"The '{next(iter(params))}' parameter of MatrixCompletion must be"):
        MatrixCompletion(**params).fit(np.ones((5, 4)))


def test_bad_requests():
    with pytest.raises(NotFittedError):
        MatrixCompletion().predict_entries([0], [0])
    _, _, x = low_rank(20, 10, 2)
    model = MatrixCompletion(2, random_state=0).fit(x)
    with pytest.raises(ValueError, match=r"'rows' must lie in \[0, 20\), got values from 20 to 20"):
        model.predict_entries([20], [0])
    with pytest.raises(ValueError, match=r"'columns' must lie in \[0, 10\), got values from -1 to -1"):
        model.predict_entries([0], [-1])
    with pytest.raises(ValueError, match="'rows' must be a 1-dimensional array of integers, not float64"):
        model.predict_entries([0.5], [0])
    with pytest.raises(ValueError, match="same length, not 2 and 1"):
        model.predict_entries([0, 1], [0])
    with pytest.raises(ValueError, match=r"X must have shape \(n_samples, 2\), not \(3, 4\)"):
        model.inverse_transform(np.ones((3, 4)))
    with pytest.raises(ValueError, match="training matrix's 20 rows to be scored, not 5"):
        model.score(x[:5])
    with pytest.raises(ValueError, match="9 features, but MatrixCompletion is expecting 10"):
        model.transform(x[:, :9])
    assert model.predict_entries([], []).shape == (0,)
