"""Gradient descent with large steps on the logistic loss, normalized or not, and the perceptron that it becomes in the limit."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit, softmax
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model._base import LinearClassifierMixin
from sklearn.utils._param_validation import Interval
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

Array = NDArray[Any]


class _Separator(LinearClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Batch steps θ ← θ + Σ wᵢ yᵢ aᵢ from θ = 0 until every sample is on its side; a subclass gives the weights w.

    Several classes are taken one against the rest, all in one matrix product a step; a class that is separated stops.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "fit_intercept": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
    }
    fit_intercept: bool
    max_iter: int

    def _weights(self, margins: Array, step: int) -> Array:
        """Weights (n, k) of the samples for margins (n, k) before the step of this number, counted from 0."""
        raise NotImplementedError

    def _goes_on(self, separated: Array) -> Array:
        """Which of the problems take another step."""
        return ~separated

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Fit to X of shape (n_samples, n_features), dense or sparse, and y of shape (n_samples,) with two or more classes.

        Raises:
            ValueError: X is not finite, y is continuous or has one class alone, or the steps overflow.
        """
        X, y = validate_data(self, X, y, accept_sparse=("csr", "csc"), dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"'y' has 1 class, {self.classes_[0]!r}; a separating plane needs 2 or more classes")
        columns = np.array([1]) if len(self.classes_) == 2 else np.arange(len(self.classes_))
        signs = np.where(labels[:, None] == columns, 1, -1).astype(X.dtype)
        losses, errors = self._descend(X, signs)
        self.loss_curve_, self.error_curve_ = (losses[:, 0], errors[:, 0]) if len(columns) == 1 else (losses, errors)
        if not self.separated_.all():
            warnings.warn(
                f"{type(self).__name__} did not separate the classes within max_iter={self.max_iter} steps; the iterate with the "
                "fewest errors is kept. Raise max_iter, or take a method for overlapping classes",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _descend(self, X: Any, signs: Array) -> tuple[Array, Array]:
        d, k, dtype = X.shape[1], signs.shape[1], signs.dtype
        plane = np.zeros((d + 1, k), dtype=dtype)  # the last row is the intercept
        best, fewest = plane.copy(), np.full(k, np.inf)
        steps, last_loss, last_error = np.zeros(k, dtype=np.int64), np.zeros(k), np.zeros(k)
        todo = np.arange(k)
        losses, errors = [], []
        for step in range(self.max_iter + 1):
            own = slice(None) if len(todo) == k else todo
            y = signs[:, own]
            with np.errstate(over="ignore", invalid="ignore"):
                margins = y * (safe_sparse_dot(X, plane[:-1, own]) + plane[-1, own])
            if not np.isfinite(margins).all():
                raise ValueError(
                    f"the margins overflow {dtype} after {step} steps; take a smaller 'step_size' or scale X, whose largest entry "
                    f"is {np.abs(X.data if hasattr(X, 'tocsr') else X).max():.3g}"
                )
            wrong = np.mean(margins <= 0, axis=0)
            last_error[own], last_loss[own] = wrong, -log_expit(margins).mean(axis=0)
            losses.append(last_loss.copy())
            errors.append(last_error.copy())
            kept = todo[(wrong < fewest[own]) | (wrong == 0)]
            best[:, kept], fewest[kept] = plane[:, kept], last_error[kept]
            on = self._goes_on(wrong == 0)
            if step == self.max_iter or not on.any():
                break
            if not on.all():
                todo, margins, y = todo[on], margins[:, on], y[:, on]
                own = todo
            pull = y * self._weights(margins, step).astype(dtype, copy=False)
            with np.errstate(over="ignore"):
                plane[:-1, own] += safe_sparse_dot(X.T, pull)
                if self.fit_intercept:
                    plane[-1, own] += pull.sum(axis=0)
            steps[own] += 1
        self.coef_, self.intercept_ = np.ascontiguousarray(best[:-1].T), best[-1].copy()
        self.separated_, self.n_steps_ = fewest == 0, steps
        self.n_iter_ = int(steps.max())
        return np.stack(losses), np.stack(errors)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class LogisticGD(_Separator):
    r"""Logistic regression by gradient descent with a constant step of any size, from zero until the classes are separated.

    .. math::
        θ_{t+1} = θ_t - γ ∇f(θ_t), \qquad f(θ) = \frac1n \sum_i \log\big(1 + e^{-y_i ⟨a_i, θ⟩}\big)

    Below :math:`2/L` with :math:`L = λ_{\max}(A^\top A) / 4n` the loss falls at every step; above, it swings, yet on separable
    data the plane is found all the same and as a rule sooner: as γ grows, :math:`θ_t / γ` becomes `BatchPerceptron`'s iterate.

    Args:
        step_size: γ, above 0.
        fit_intercept: give every sample a further feature of 1.
        max_iter: steps at most.
        stop_at_separation: stop at the first iterate with all margins above 0; else take all ``max_iter`` steps.

    Attributes:
        coef_: (n_classes, n_features), or (1, n_features) for two classes: the last iterate that separates, or that with
            the fewest errors.
        intercept_: (n_classes,) or (1,).
        separated_: whether each plane has every sample on its side.
        n_iter_: steps taken; ``n_steps_`` for each class.
        loss_curve_, error_curve_: mean logistic loss and share of margins at most 0 before each step and after the last,
            (n_iter_ + 1,) for two classes, (n_iter_ + 1, n_classes) for more.
        classes_, n_features_in_: as everywhere in scikit-learn.

    Raises:
        ValueError: a parameter out of range, X not finite, one class alone, or an overflow.

    Deviations from the paper: several classes, one against the rest; where the classes overlap, the iterate with the fewest
    errors, in place of the last.

    When not to use it: for probabilities (`sklearn.linear_model.LogisticRegression`), a large margin (a linear SVM), or overlapping
    classes.

    Example:
        >>> import numpy as np
        >>> X = np.array([[1.0, -1.0], [-1.0, -4.0]])
        >>> model = LogisticGD(step_size=100.0, fit_intercept=False).fit(X, [1, 0])
        >>> model.n_iter_, (model.coef_ / 100).round(6).tolist()
        (2, [[1.0, 0.25]])

    Reference:
        Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes",
        arXiv 2412.08424, equation 3.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_Separator._parameter_constraints,
        "step_size": [Interval(Real, 0, None, closed="neither")],
        "stop_at_separation": ["boolean"],
    }

    def __init__(
        self, step_size: float = 1.0, *, fit_intercept: bool = True, max_iter: int = 10_000, stop_at_separation: bool = True
    ) -> None:
        self.step_size = step_size
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.stop_at_separation = stop_at_separation

    def _goes_on(self, separated: Array) -> Array:
        return ~separated if self.stop_at_separation else np.ones_like(separated)

    def _weights(self, margins: Array, step: int) -> Array:
        weights: Array = expit(-margins) * (self.step_size / len(margins))
        return weights


class NormalizedLogisticGD(LogisticGD):
    r"""Logistic regression by gradient descent, each step divided by the mean of its samples' weights.

    .. math::
        θ_{t+1} = θ_t + γ \frac{\sum_i w_i y_i a_i}{\sum_i w_i}, \qquad w_i = \big(1 + e^{y_i ⟨a_i, θ_t⟩}\big)^{-1}

    With margin μ and radius R of the data it separates them after at most :math:`R^2/μ^2 + 2 \log(2n - 1) / (γ μ^2)` steps,
    whatever the number n of samples, where plain gradient descent with a large step may need a number that grows with n: a few
    samples of a rare class then weigh little in its mean. As γ grows, it becomes ``BatchPerceptron(normalized=True)``.

    Args:
        step_size: γ, above 0; the larger, the better the bound.
        fit_intercept: give every sample a further feature of 1.
        max_iter: steps at most.
        stop_at_separation: stop at the first iterate with all margins above 0; else take all ``max_iter`` steps.

    Attributes are those of `LogisticGD`, and so are errors, deviations, and when not to use it; on balanced classes the paper finds
    it no faster than `LogisticGD`.

    Example:
        >>> import numpy as np
        >>> X = np.array([[0.5, -1.0]] + 99 * [[-0.5, -1.0]])  # the paper's worst case, Theorem 5.1
        >>> y = np.array([1] + 99 * [0])
        >>> options = {"step_size": 100.0, "fit_intercept": False}
        >>> NormalizedLogisticGD(**options).fit(X, y).n_iter_, LogisticGD(**options).fit(X, y).n_iter_
        (2, 31)

    Reference:
        Tyurin, arXiv 2412.08424, section 6 and Theorem 6.1.
    """

    def _weights(self, margins: Array, step: int) -> Array:
        # From logarithms: once separated, the weights themselves may all be 0.
        weights: Array = softmax(log_expit(-margins), axis=0) * self.step_size
        return weights


class BatchPerceptron(_Separator):
    r"""The perceptron that steps by all misclassified samples at once; gradient descent's limit as the step grows.

    .. math::
        θ_1 = \frac1{2n} \sum_i y_i a_i, \qquad
        θ_{t+1} = θ_t + \frac1n \sum_{i \in S_t} y_i a_i, \quad S_t = \{i : y_i ⟨a_i, θ_t⟩ \le 0\}

    until :math:`S_t` is empty, which takes at most :math:`n R^2 / μ^2` steps. With ``normalized`` the mean runs over
    :math:`S_t`, the first step too, and :math:`R^2 / μ^2` steps are enough.

    Args:
        normalized: divide by the number of misclassified samples instead of that of all.
        fit_intercept: give every sample a further feature of 1.
        max_iter: steps at most.

    Attributes and errors are those of `LogisticGD`; ``loss_curve_`` is that of the iterates as they are, without a step size.

    When not to use it: as `LogisticGD`. For data beyond memory, `sklearn.linear_model.Perceptron` steps by one sample at a time.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = BatchPerceptron().fit(X, y == 0)
        >>> model.score(X, y == 0), bool(model.separated_.all())
        (1.0, True)

    Reference:
        Tyurin, arXiv 2412.08424, section 3 (Batch Perceptron) and Theorem 5.3 (Normalized Batch Perceptron).
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {**_Separator._parameter_constraints, "normalized": ["boolean"]}

    def __init__(self, normalized: bool = False, *, fit_intercept: bool = True, max_iter: int = 10_000) -> None:
        self.normalized = normalized
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter

    def _weights(self, margins: Array, step: int) -> Array:
        wrong: Array = margins <= 0
        share = wrong.sum(axis=0) if self.normalized else len(margins) * (2.0 if step == 0 else 1.0)
        weights: Array = wrong / share
        return weights
