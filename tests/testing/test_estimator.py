"""The estimator checks pass sound estimators and name what is wrong with each broken one."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import NMF, TruncatedSVD
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.utils.validation import check_array, check_is_fitted, check_random_state, validate_data

from corollary.testing import Case, check_estimator, run_checks
from corollary.testing.estimator import CHECKS


class Sound(TransformerMixin, BaseEstimator):
    """Random projection of the data to two directions inside its row space."""

    def __init__(self, scale=1.0, random_state=None):
        self.scale = scale
        self.random_state = random_state

    def fit(self, X, y=None):
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32])
        mix = check_random_state(self.random_state).standard_normal((2, X.shape[0])).astype(X.dtype)
        self.components_ = np.ascontiguousarray(self.scale * np.asarray(mix @ X))
        return self

    def transform(self, X):
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)
        return np.asarray(X @ self.components_.T)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


@pytest.mark.parametrize("make", [Sound, TruncatedSVD, NMF, Ridge, LogisticRegression, GaussianNB])
def test_sound_estimators_pass(make):
    check_estimator(make, sklearn=make is Sound)


class ChangesParameter(Sound):
    def fit(self, X, y=None):
        super().fit(X, y)
        self.scale = 2.0
        return self


class Widens(Sound):
    def transform(self, X):
        return super().transform(X).astype(np.float64)


class LosesPrecision(Sound):
    def transform(self, X):
        out = super().transform(X)
        return out if out.dtype == np.float64 else out * 1.1


class MisreadsColumns(Sound):
    def fit(self, X, y=None):
        if sparse.issparse(X) and X.format == "csc":
            X = X[:, ::-1]
        return super().fit(X, y)


class IgnoresSeed(Sound):
    def fit(self, X, y=None):
        self.random_state, seed = None, self.random_state
        super().fit(X, y)
        self.random_state = seed
        return self


class Remembers(Sound):
    def fit(self, X, y=None):
        before = getattr(self, "components_", None)
        super().fit(X, y)
        if before is not None and before.shape == self.components_.shape:
            self.components_ = self.components_ + before
        return self


class WritesInput(Sound):
    def fit(self, X, y=None):
        super().fit(X, y)
        if not sparse.issparse(X):
            np.asarray(X)[0, 0] = 0
        return self


class TakesInfinity(Sound):
    def transform(self, X):
        check_is_fitted(self)
        return np.asarray(check_array(X, accept_sparse="csr", ensure_all_finite=False) @ self.components_.T)


class CrashesOnWidth(Sound):
    def transform(self, X):
        if X.shape[1] != self.n_features_in_:
            raise KeyError("width")
        return super().transform(X)


class KeepsAnObject(Sound):
    def fit(self, X, y=None):
        super().fit(X, y)
        self.history_ = [{"step": 0}]
        return self


class HidesStateOutside(Sound):
    _elsewhere: dict = {}  # noqa: RUF012

    def fit(self, X, y=None):
        super().fit(X, y)
        self._elsewhere[id(self)] = 3.0
        return self

    def transform(self, X):
        return super().transform(X) * self._elsewhere.get(id(self), 1.0)


class DeafPartialFit(Sound):
    def partial_fit(self, X, y=None):
        if hasattr(self, "components_"):
            validate_data(self, X, reset=False)
            return self
        return self.fit(X, y)


class ForgetsToReturn(Sound):
    def partial_fit(self, X, y=None):
        self.fit(X, y)


@pytest.mark.parametrize(
    ("broken", "check", "message"),
    [
        (ChangesParameter, "parameters", "fit changes the parameters"),
        (Widens, "dtypes", "transform gives float64 for float32"),
        (LosesPrecision, "dtypes", "transform differs between float32 and float64"),
        (MisreadsColumns, "sparse", "differs between CSR and csc_matrix"),
        (IgnoresSeed, "seed", "despite random_state"),
        (Remembers, "refit", "fit after another fit: 'components_' differs"),
        (WritesInput, "refit", "fit changes its input"),
        (TakesInfinity, "bad_input", "transform of an infinite entry is accepted"),
        (CrashesOnWidth, "bad_input", "transform of too few columns: KeyError"),
        (KeepsAnObject, "safetensors", r"safetensors cannot hold: history_ \(list\)"),
        (HidesStateOutside, "safetensors", "transform differs after safetensors"),
        (DeafPartialFit, "partial_fit", "the second batch of partial_fit changes nothing"),
        (ForgetsToReturn, "partial_fit", "does not give the estimator back"),
    ],
)
def test_broken_estimators_fail(broken, check, message):
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](Case(broken))
    with pytest.raises(AssertionError, match=r"check '.*' failed"):
        check_estimator(broken, sklearn=False)


def test_sklearns_checks_are_among_them():
    with pytest.raises(AssertionError, match=r"check 'sklearn' failed: .*check_estimators_overwrite_params"):
        check_estimator(ChangesParameter)


def test_expected_failures_of_sklearn_are_strict():
    with pytest.raises(AssertionError, match="stand in 'sklearn_expected_failures'"):
        check_estimator(Sound, sklearn_expected_failures={"check_fit2d_1sample": "none"})
    with pytest.raises(AssertionError, match="names no check"):
        check_estimator(Sound, sklearn_expected_failures={"check_nonsense": "none"})


def test_xfail_is_strict():
    with pytest.raises(AssertionError, match="passes, but stands in xfail"):
        run_checks("estimator", Case(Sound, {"sklearn": False}, {"seed": "no reason"}))
