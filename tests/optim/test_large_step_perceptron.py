"""Large-step logistic descent and the batch perceptron against loops, the paper's printed numbers and its theorems."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from corollary.optim import BatchPerceptron, LogisticGD, NormalizedLogisticGD

Array = NDArray[Any]


def _separable(seed: int, n: int = 20, d: int = 4, margin: float = 0.3) -> tuple[Array, Array, float, float]:
    """Samples on both sides of a random plane through 0, with its margin and their radius; y in {-1, 1}, both present."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=d)
    w /= np.linalg.norm(w)
    x, y = rng.normal(size=(n, d)), np.where(np.arange(n) % 3 == 0, 1, -1)
    x += np.outer(y * (margin + np.abs(x @ w)) - x @ w, w)
    return x, y, float((y * (x @ w)).min()), float(np.linalg.norm(x, axis=1).max())


def _worst_case(n: int) -> tuple[Array, Array]:
    """The data of Theorem 5.1."""
    return np.array([[0.5, -1.0]] + (n - 1) * [[-0.5, -1.0]]), np.array([1] + (n - 1) * [-1])


def _loop(x: Array, y: Array, rule: str, gamma: float, most: int) -> tuple[Array, int, list[float]]:
    """Sample by sample, from the paper's text."""
    theta, losses = [0.0] * x.shape[1], []
    for t in range(most + 1):
        margins = [yi * math.fsum(a * b for a, b in zip(xi, theta, strict=True)) for xi, yi in zip(x, y, strict=True)]
        losses.append(math.fsum(math.log1p(math.exp(-m)) for m in margins) / len(y))
        if min(margins) > 0 or t == most:
            return np.array(theta), t, losses
        if rule in ("gd", "normalized gd"):
            weights = [1 / (1 + math.exp(m)) for m in margins]
            factor = gamma / (len(y) if rule == "gd" else math.fsum(weights))
        else:
            weights = [float(m <= 0) for m in margins]
            factor = 1 / sum(weights) if rule == "normalized perceptron" else (0.5 if t == 0 else 1.0) / len(y)
        theta = [
            v + factor * math.fsum(w * yi * xi[j] for w, xi, yi in zip(weights, x, y, strict=True)) for j, v in enumerate(theta)
        ]
    raise AssertionError


MODELS: dict[str, Any] = {
    "gd": lambda gamma, **options: LogisticGD(gamma, fit_intercept=False, **options),
    "normalized gd": lambda gamma, **options: NormalizedLogisticGD(gamma, fit_intercept=False, **options),
    "perceptron": lambda gamma, **options: BatchPerceptron(fit_intercept=False, **options),
    "normalized perceptron": lambda gamma, **options: BatchPerceptron(True, fit_intercept=False, **options),
}


@given(seed=st.integers(0, 2**31 - 1), gamma=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("rule", MODELS)
def test_every_method_takes_the_steps_of_the_loop(rule: str, seed: int, gamma: float) -> None:
    x, y, _, _ = _separable(seed)
    model = MODELS[rule](gamma).fit(x, y)
    theta, steps, losses = _loop(x, y, rule, gamma, 10_000)
    assert model.n_iter_ == steps
    assert model.separated_.all()
    np.testing.assert_allclose(model.coef_[0], theta, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(model.loss_curve_, losses, rtol=1e-7, atol=1e-12)
    assert model.error_curve_[-1] == 0
    assert (model.error_curve_[:-1] > 0).all()
    assert (model.predict(x) == y).all()


def test_the_iteration_counts_of_table_1() -> None:
    """Printed in the paper for the data of Theorem 5.1; it does not say n, which is 1,000."""
    x, y = _worst_case(1000)
    counts = [NormalizedLogisticGD(gamma, fit_intercept=False).fit(x, y).n_iter_ for gamma in (100.0, 10.0, 1.0, 0.1)]
    assert counts == [2, 2, 16, 157]
    assert LogisticGD(100.0, fit_intercept=False).fit(x, y).n_iter_ == 308


def test_the_example_of_theorem_4_1() -> None:
    """One step diverges in loss, the second separates: θ₁ = γ (2/4, 3/4), θ₂ / γ -> (1, 1/4)."""
    gamma = 400.0
    model = LogisticGD(gamma, fit_intercept=False).fit([[1.0, -1.0], [-1.0, -4.0]], [1, -1])
    assert model.n_iter_ == 2
    np.testing.assert_allclose(model.coef_[0] / gamma, [1.0, 0.25], atol=1e-12)
    assert model.loss_curve_[1] == pytest.approx(gamma / 8, rel=1e-6)
    assert model.loss_curve_[2] < 1e-6


@given(seed=st.integers(0, 2**31 - 1), margin=st.floats(0.05, 1.0), gamma=st.floats(0.05, 1000.0), n=st.integers(4, 40))
@settings(max_examples=40, deadline=None)
def test_the_bounds_of_theorems_3_3_5_3_and_6_1_hold(seed: int, margin: float, gamma: float, n: int) -> None:
    x, y, mu, radius = _separable(seed, n, margin=margin)  # mu is at most the largest margin, so these bounds are looser
    ratio = (radius / mu) ** 2
    bounds = {
        "perceptron": n * ratio,
        "normalized perceptron": ratio,
        "normalized gd": ratio + 2 * math.log(2 * n - 1) / (gamma * mu**2),
    }
    for rule, bound in bounds.items():
        assert MODELS[rule](gamma, max_iter=200_000).fit(x, y).n_iter_ <= math.ceil(bound)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("normalized", [False, True])
def test_a_huge_step_gives_the_perceptrons_iterates(normalized: bool, seed: int) -> None:
    x, y, _, _ = _separable(seed, 30, 6, margin=0.05)
    kind: Any = NormalizedLogisticGD if normalized else LogisticGD
    limit = BatchPerceptron(normalized, fit_intercept=False).fit(x, y)
    model = kind(1e12, fit_intercept=False).fit(x, y)
    if normalized:  # at θ = 0 descent averages all samples, as the perceptron does
        np.testing.assert_allclose(model.coef_ / 1e12, limit.coef_, atol=1e-9)
    assert model.n_iter_ == limit.n_iter_
    np.testing.assert_allclose(model.coef_ / 1e12, limit.coef_, atol=1e-9)


def test_below_two_over_l_the_loss_falls_to_that_of_scipy() -> None:
    """Overlapping classes, all steps taken: the loss approaches its minimum without a rise."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), np.where(rng.random(60) < 0.5, 1, -1)
    lipschitz = np.linalg.eigvalsh(x.T @ x)[-1] / (4 * len(x))
    with pytest.warns(ConvergenceWarning, match="did not separate the classes within max_iter=3000"):
        model = LogisticGD(1.9 / lipschitz, fit_intercept=False, max_iter=3000).fit(x, y)
    assert (np.diff(model.loss_curve_) < 1e-12).all()
    best = minimize(lambda w: np.logaddexp(0, -y * (x @ w)).mean(), np.zeros(3), tol=1e-12).fun
    assert model.loss_curve_[-1] == pytest.approx(best, abs=1e-8)
    assert (model.error_curve_.min() == np.mean(y * (x @ model.coef_[0]) <= 0)).all()


def test_the_intercept_is_a_feature_of_one() -> None:
    x, y, _, _ = _separable(3)
    x = x + 0.7
    for with_it, without in (
        (BatchPerceptron(), BatchPerceptron(fit_intercept=False)),
        (LogisticGD(5.0), LogisticGD(5.0, fit_intercept=False)),
    ):
        with_it.fit(x, y)
        without.fit(np.column_stack([x, np.ones(len(x))]), y)
        np.testing.assert_allclose(np.append(with_it.coef_[0], with_it.intercept_), without.coef_[0], rtol=1e-9)


@pytest.mark.parametrize("model", [LogisticGD(1.0), NormalizedLogisticGD(1.0), BatchPerceptron(), BatchPerceptron(True)])
def test_several_classes_are_one_against_the_rest(model: Any) -> None:
    x, y = load_digits(return_X_y=True)
    x, y = x[:300] / 16, y[:300]
    whole = model.fit(x, y)
    assert whole.coef_.shape == (10, 64)
    coefficients, steps, curves = whole.coef_.copy(), whole.n_steps_.copy(), whole.loss_curve_
    assert whole.score(x, y) == 1.0
    assert curves.shape == (steps.max() + 1, 10)
    for digit in (0, 3, 8):
        alone = model.fit(x, y == digit)
        np.testing.assert_allclose(alone.coef_[0], coefficients[digit], rtol=1e-7, atol=1e-10)
        assert alone.n_iter_ == steps[digit]
        np.testing.assert_allclose(alone.loss_curve_, curves[: steps[digit] + 1, digit], rtol=1e-7, atol=1e-12)


def test_sparse_input_gives_the_dense_fit() -> None:
    x, y, _, _ = _separable(1, 40, 8)
    x[np.abs(x) < 0.3] = 0
    for model in (LogisticGD(20.0), BatchPerceptron(True)):
        dense = model.fit(x, y).coef_.copy()
        np.testing.assert_allclose(model.fit(sparse.csr_array(x), y).coef_, dense, rtol=1e-9, atol=1e-12)


def test_labels_may_be_words_and_setosa_is_separable() -> None:
    x, y = load_iris(return_X_y=True)
    names = np.where(y == 0, "setosa", "other")
    for model in (LogisticGD(100.0), NormalizedLogisticGD(100.0), BatchPerceptron()):
        assert (model.fit(x, names).predict(x) == names).all()
        assert (LogisticRegression().fit(x, names).predict(x) == names).all()


def test_normalized_descent_goes_on_past_separation_without_dividing_by_zero() -> None:
    x, y, _, _ = _separable(2)
    model = NormalizedLogisticGD(1e6, fit_intercept=False, max_iter=30, stop_at_separation=False).fit(x, y)
    assert model.n_iter_ == 30
    assert np.isfinite(model.coef_).all()
    assert model.separated_.all()
    assert model.loss_curve_[-1] == 0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (LogisticGD(0.0), "'step_size' parameter of LogisticGD must be a float in the range"),
        (LogisticGD(float("nan")), "'step_size'"),
        (NormalizedLogisticGD(-1.0), "'step_size'"),
        (BatchPerceptron("yes"), "'normalized' parameter of BatchPerceptron must be"),
        (BatchPerceptron(max_iter=0), "'max_iter'"),
    ],
)
def test_bad_parameters_are_named(model: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.fit([[0.0], [1.0]], [0, 1])


def test_bad_data_is_named() -> None:
    with pytest.raises(ValueError, match=r"'y' has 1 class, .*; a separating plane needs 2 or more"):
        LogisticGD().fit([[0.0], [1.0]], [1, 1])
    with pytest.raises(ValueError, match="continuous"):
        LogisticGD().fit([[0.0], [1.0]], [0.5, 0.7])
    with pytest.raises(ValueError, match="NaN"):
        BatchPerceptron().fit([[np.nan], [1.0]], [0, 1])
    with pytest.raises(ValueError, match=r"overflow float64 after . steps; take a smaller 'step_size' or scale X"):
        LogisticGD(1e300).fit([[1e200], [-1.0]], [0, 1])
    with pytest.raises(ValueError, match="X has 1 features, but LogisticGD is expecting 2"):
        LogisticGD().fit([[0.0, 1.0], [1.0, 0.0]], [0, 1]).predict([[0.0]])
