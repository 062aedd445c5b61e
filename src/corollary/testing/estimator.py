"""Conformance of scikit-learn estimators: scikit-learn's own checks, and what they leave open.

Tags, all optional:

- ``data``: function of a seed that gives X as a dense float64 array; by default 40 × 12, of rank 3 with a little noise, and
  non-negative where the estimator's own tags ask for it.
- ``float32_tol``: largest relative difference of the outputs between float32 and float64, default 0.01. None where the method
  may take another path altogether, so that only the dtype is checked.
- ``sklearn_expected_failures``: name of a scikit-learn check to the reason why it fails. Strict: a check named there that
  passes is a failure.
- ``sklearn``: False leaves scikit-learn's own checks out, where a test runs them already. Default True.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.utils import estimator_checks, get_tags

from corollary.testing.case import Case, Check, run_checks

Array = NDArray[Any]
_METHODS = ("transform", "predict", "decision_function", "predict_proba", "score_samples")
_SCALARS = (int, float, str, bool, type(None), np.generic)


def _x(case: Case, seed: int = 0) -> Array:
    if "data" in case.tags:
        return np.asarray(case.tags["data"](seed), dtype=np.float64)
    rng = np.random.default_rng(seed)
    x: Array = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 12)) + 0.01 * rng.normal(size=(40, 12))
    return np.abs(x) if get_tags(case.make()).input_tags.positive_only else x


def _y(estimator: Any, x: Array) -> Array | None:
    first: Array = x[:, 0].copy()
    if is_classifier(estimator):
        return np.asarray(first > np.median(first), dtype=np.int64)
    return first if is_regressor(estimator) or get_tags(estimator).target_tags.required else None


def _make(case: Case) -> Any:
    """A new estimator, seeded where it takes a seed."""
    estimator = case.make()
    return estimator.set_params(random_state=0) if "random_state" in estimator.get_params() else estimator


def _fit(estimator: Any, x: Any, y: Array | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about convergence is no matter of conformance
        return estimator.fit(x) if y is None else estimator.fit(x, y)


def _fitted(case: Case, x: Any, y: Array | None = None) -> Any:
    return _fit(_make(case), x, y)


def _state(estimator: Any) -> dict[str, Any]:
    """What fitting added: attributes that are no parameters."""
    return {name: value for name, value in vars(estimator).items() if name not in estimator.get_params(deep=False)}


def _dense(value: Any) -> Array:
    return np.asarray(value.toarray() if hasattr(value, "toarray") else value)


def _outputs(estimator: Any, x: Any) -> dict[str, Array]:
    return {name: _dense(getattr(estimator, name)(x)) for name in _METHODS if hasattr(estimator, name)}


def _same_state(left: Any, right: Any, what: str) -> None:
    a, b = _state(left), _state(right)
    assert set(a) == set(b), f"{what}: other fitted attributes, {sorted(set(a) ^ set(b))}"
    for name in a:
        if isinstance(a[name], np.ndarray):
            assert np.array_equal(a[name], b[name], equal_nan=a[name].dtype.kind == "f"), f"{what}: '{name}' differs"


def _refuses(action: Callable[[], Any], what: str) -> None:
    try:
        action()
    except (ValueError, TypeError) as error:
        if len(str(error)) <= 10:
            raise AssertionError(f"{what}: the error says nothing: {error!r}") from error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} instead of a ValueError: {error}") from error
    else:
        raise AssertionError(f"{what} is accepted")


def check_sklearn(case: Case) -> None:
    """Every check of ``sklearn.utils.estimator_checks.check_estimator``."""
    if not case.tags.get("sklearn", True):
        return
    expected: Mapping[str, str] = case.tags.get("sklearn_expected_failures", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = estimator_checks.check_estimator(
            case.make(), expected_failed_checks=dict(expected), on_fail=None, on_skip=None
        )
    failed = [f"{r['check_name']}: {r['exception']}" for r in results if r["status"] == "failed"]
    assert not failed, f"{len(failed)} of {len(results)} scikit-learn checks fail: {'; '.join(failed)}"
    known = {r["check_name"] for r in results}
    assert set(expected) <= known, f"'sklearn_expected_failures' names no check: {sorted(set(expected) - known)}"
    passes = [r["check_name"] for r in results if r["check_name"] in expected and r["status"] == "passed"]
    assert not passes, f"checks pass, but stand in 'sklearn_expected_failures': {passes}"


def check_parameters(case: Case) -> None:
    """``__init__`` stores its arguments as given, fitting leaves them alone, ``clone`` carries them and no fitted state."""
    estimator = _make(case)
    x = _x(case)
    before = {name: repr(value) for name, value in estimator.get_params(deep=False).items()}
    stored = [name for name in before if getattr(estimator, name) is not estimator.get_params(deep=False)[name]]
    assert not stored, f"__init__ changes {stored}"
    _fit(estimator, x, _y(estimator, x))
    after = {name: repr(value) for name, value in estimator.get_params(deep=False).items()}
    assert before == after, f"fit changes the parameters {[n for n in before if before[n] != after[n]]}"
    copy = clone(estimator)
    assert {name: repr(value) for name, value in copy.get_params(deep=False).items()} == before, "clone loses parameters"
    assert not _state(copy), f"clone carries fitted state: {sorted(_state(copy))}"
    for name, value in estimator.get_params(deep=False).items():
        copy.set_params(**{name: value})
    _refuses(lambda: copy.set_params(no_such_parameter=1), "set_params with an unknown name")


def check_dtypes(case: Case) -> None:
    """float32 in gives float32 fitted arrays and outputs, near those of float64; float64 stays float64."""
    x = _x(case)
    wide = _fitted(case, x, _y(case.make(), x))
    narrow = _fitted(case, x.astype(np.float32), _y(case.make(), x))
    for estimator, dtype, given in ((wide, np.float64, x), (narrow, np.float32, x.astype(np.float32))):
        got = estimator.transform(given) if hasattr(estimator, "transform") else None
        assert got is None or got.dtype == dtype, f"transform gives {got.dtype} for {np.dtype(dtype)}"
        if hasattr(estimator, "components_"):
            assert estimator.components_.dtype == dtype, f"'components_' is {estimator.components_.dtype} for {np.dtype(dtype)}"
    tol = case.tags.get("float32_tol", 1e-2)
    if tol is None:
        return
    far, near = _outputs(wide, x), _outputs(narrow, x.astype(np.float32))
    for name in far:
        size = max(float(np.abs(far[name]).max()), 1e-12) if far[name].dtype.kind == "f" else 0.0
        worst = float(np.abs(far[name] - near[name]).max()) if size else float((far[name] != near[name]).mean())
        assert worst <= tol * (size or 1.0), f"{name} differs between float32 and float64 by {worst:.3g} of {size:.3g}"


def check_sparse(case: Case) -> None:
    """CSR, CSC and COO, matrix and array alike, give the same fit; the input stays as it was. Where sparse input is tagged."""
    if not get_tags(case.make()).input_tags.sparse:
        return
    x = _x(case)
    x[np.random.default_rng(1).random(x.shape) < 0.3] = 0
    y = _y(case.make(), x)
    reference = _fitted(case, sparse.csr_matrix(x), y)
    for form in (sparse.csc_matrix, sparse.coo_matrix, sparse.csr_array, sparse.csc_array, sparse.coo_array):
        given = form(x)
        before = given.copy()
        other = _fitted(case, given, y)
        assert given.format == before.format, f"fit changes the format of its {form.__name__}"
        assert np.array_equal(given.data, before.data), f"fit changes its {form.__name__}"
        expected, got = _outputs(reference, x), _outputs(other, x)
        if hasattr(reference, "transform"):
            expected["transform of sparse rows"] = reference.transform(sparse.csr_matrix(x))
            got["transform of sparse rows"] = other.transform(given)
        for name in expected:
            same = np.allclose(_dense(got[name]), _dense(expected[name]), rtol=1e-6, atol=1e-8)
            assert same, f"{name} differs between CSR and {form.__name__}"


def check_seed(case: Case) -> None:
    """The same ``random_state`` gives the same fit to the bit, and the global generator is not touched."""
    x = _x(case)
    y = _y(case.make(), x)
    before = repr(np.random.get_state())  # noqa: NPY002 the global generator is what is watched
    first = _fitted(case, x, y)
    assert repr(np.random.get_state()) == before, "fit draws from numpy's global generator despite random_state"  # noqa: NPY002
    _same_state(first, _fitted(case, x, y), "the same seed twice")
    if "random_state" in first.get_params():
        seeded = [_fit(case.make().set_params(random_state=np.random.RandomState(3)), x, y) for _ in range(2)]
        _same_state(seeded[0], seeded[1], "equal RandomState instances")


def check_refit(case: Case) -> None:
    """A second fit forgets the first, and neither changes its input."""
    x, other = _x(case), _x(case, seed=1)
    y, other_y = _y(case.make(), x), _y(case.make(), other)
    given = x.copy()
    twice = _fit(_fitted(case, other, other_y), given, y)
    assert np.array_equal(given, x, equal_nan=True), "fit changes its input"
    _same_state(twice, _fitted(case, x, y), "fit after another fit")


def check_bad_input(case: Case) -> None:
    """Infinite, missing (unless allowed), empty, text, 1-dimensional and wrongly wide input is refused with a reason."""
    x = _x(case)
    y = _y(case.make(), x)
    infinite, missing = x.copy(), x.copy()
    infinite[0, 0], missing[0, 0] = np.inf, np.nan
    wrong: dict[str, Any] = {
        "an infinite entry": infinite,
        "a 1-dimensional array": x[0],
        "a 3-dimensional array": x[None],
        "no rows": x[:0],
        "no columns": x[:, :0],
        "text": np.full(x.shape, "text", dtype=object),
    }
    tags = get_tags(case.make()).input_tags
    if not tags.allow_nan:
        wrong["a NaN"] = missing
    if tags.sparse:
        wrong["an infinite entry in a sparse matrix"] = sparse.csr_matrix(infinite)
    for what, bad in wrong.items():
        rows = np.asarray(bad).shape[0] if not sparse.issparse(bad) and np.ndim(bad) else len(x)
        _refuses(lambda bad=bad, rows=rows: _fitted(case, bad, None if y is None else y[:rows]), what)  # type: ignore[misc]
    fitted = _fitted(case, x, y)
    for name in _METHODS:
        if hasattr(fitted, name):
            _refuses(lambda name=name: getattr(fitted, name)(x[:, 1:]), f"{name} of too few columns")  # type: ignore[misc]
            _refuses(lambda name=name: getattr(fitted, name)(infinite), f"{name} of an infinite entry")  # type: ignore[misc]


def check_safetensors(case: Case) -> None:
    """Fitted state is arrays of numbers and plain scalars: it goes through safetensors into a new estimator that works the same."""
    x = _x(case)
    fitted = _fitted(case, x, _y(case.make(), x))
    state = _state(fitted)
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    assert arrays, "fitting leaves no array"
    bad = [f"{n} ({a.dtype})" for n, a in arrays.items() if a.dtype.kind not in "fiub"]
    bad += [f"{n} ({type(v).__name__})" for n, v in state.items() if n not in arrays and not isinstance(v, _SCALARS)]
    assert not bad, f"fitted attributes that safetensors cannot hold: {', '.join(sorted(bad))}"
    packed = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    restored = clone(fitted)
    vars(restored).update({**state, **safetensors.numpy.load(packed)})
    for name, value in _outputs(fitted, x).items():
        # another layout of the same array may round differently
        assert np.allclose(getattr(restored, name)(x), value, rtol=1e-9, atol=1e-12), f"{name} differs after safetensors"


def check_partial_fit(case: Case) -> None:
    """``partial_fit``, where there is one: gives the estimator back, learns from each batch, repeats, refuses another width."""
    if not hasattr(case.make(), "partial_fit"):
        return
    x = _x(case)
    y = _y(case.make(), x)
    half = len(x) // 2

    def run() -> tuple[Any, list[dict[str, Array]]]:
        estimator = _make(case)
        seen = []
        for part in (slice(None, half), slice(half, None)):
            extra = {} if y is None else {"y": y[part]}
            if y is not None and is_classifier(estimator):
                extra["classes"] = np.unique(y)
            assert estimator.partial_fit(x[part], **extra) is estimator, "partial_fit does not give the estimator back"
            seen.append(_outputs(estimator, x))
        return estimator, seen

    estimator, seen = run()
    assert estimator.n_features_in_ == x.shape[1], "partial_fit does not set n_features_in_"
    learned = any(not np.allclose(seen[0][name], seen[1][name]) for name in seen[0])
    assert learned or not seen[0], "the second batch of partial_fit changes nothing"
    _same_state(estimator, run()[0], "the same batches twice")
    _refuses(lambda: estimator.partial_fit(x[:, 1:], **({} if y is None else {"y": y})), "partial_fit of too few columns")


CHECKS: dict[str, Check] = {
    "sklearn": check_sklearn,
    "parameters": check_parameters,
    "dtypes": check_dtypes,
    "sparse": check_sparse,
    "seed": check_seed,
    "refit": check_refit,
    "bad_input": check_bad_input,
    "safetensors": check_safetensors,
    "partial_fit": check_partial_fit,
}


def check_estimator(make: Callable[[], Any], **tags: Any) -> None:
    """Hold a scikit-learn estimator to every check of its kind.

    Args:
        make: function of no arguments that gives an unfitted estimator.
        tags: see the module's text.

    Raises:
        AssertionError: names the first check that fails, and what it saw.

    Example:
        >>> from corollary.recovery import MatrixCompletion
        >>> check_estimator(lambda: MatrixCompletion(n_components=3), sklearn=False)
    """
    run_checks("estimator", Case(make, tags))
