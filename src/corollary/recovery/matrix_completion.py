"""Low-rank matrix completion by alternating minimization whose updates are solved approximately, in time O(|Ω| k)."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.extmath import randomized_svd
from sklearn.utils.validation import check_is_fitted, validate_data

from corollary.linalg.regression import Csr, ObservedBlocks, solve_rows_exact, solve_rows_refined

Array = NDArray[Any]
csr_matrix: Any = sparse.csr_matrix


class MatrixCompletion(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    r"""Complete a low-rank matrix from a few of its entries: robust alternating minimization in nearly linear time.

    From the observed entries :math:`\Omega` of :math:`M \approx U V^\top` it minimizes

    .. math:: \sum_{(i,j) \in \Omega} (M_{ij} - u_i \cdot v_j)^2 + \alpha \left(\|U\|_F^2 + \|V\|_F^2\right)

    by solving for V with U fixed, then for U with V fixed, in turn, from a spectral start: the top k singular vectors of the
    observed matrix, its overfull rows and columns trimmed and its incoherence restored by clipping. Each turn is one small
    weighted regression for each row. ``solver="sketched"`` solves them only approximately, by a sketched preconditioner and a
    few refinements from where the last turn ended, at :math:`O(|\Omega| k)` an iteration; the error that this leaves does not
    stop the convergence. ``solver="exact"`` is the classical alternating least squares at :math:`O(|\Omega| k^2)`.

    In a sparse matrix every stored entry is observed, a stored zero too, and every other entry is missing. In a dense array NaN
    is missing. Memory is linear in :math:`|\Omega| + (m + n) k`.

    Args:
        n_components: the rank k, at most min(n_samples, n_features).
        solver: ``"sketched"`` or ``"exact"``.
        preconditioner: ``"shared"``: the factor's own Gram matrix, once for all rows, which a uniform sample of an incoherent
            factor repeats for every row up to scale. ``"row"``: a CountSketch of each row's own system, as in the paper; dearer
            (k³ a row), for coherent factors or far from uniform sampling.
        alpha: ridge :math:`\alpha \ge 0`. Needed as soon as some rows or columns have not many more than k entries, or noise.
        max_iter: iterations at most, each of a V turn and a U turn.
        tol: stop when the root mean squared residual, divided by that of the observed entries, falls by less than this. 0 does
            all ``max_iter`` iterations.
        inner_tol: an update is done when each row's preconditioned gradient has shrunk by this factor. The smaller, the
            closer to ``solver="exact"``.
        max_inner_iter: refinements of one update at most.
        oversampling: rows of the sketch of ``preconditioner="row"``, in multiples of k.
        init: ``"spectral"`` or ``"random"``.
        incoherence: :math:`\mu`: rows of a start with orthonormal columns are clipped to the norm
            :math:`2 \sqrt{\mu k / m}`.
        random_state: seed of the start and of the sketches.

    Attributes:
        components_: :math:`V^\top`, shape (n_components, n_features), rows orthogonal, by falling norm.
        embedding_: U, shape (n_samples, n_components).
        singular_values_: of the completed matrix, shape (n_components,).
        n_iter_: iterations done.
        loss_curve_: root mean squared residual on the observed entries after each iteration, shape (n_iter_,).
        n_features_in_: columns seen by ``fit``.

    Raises:
        ValueError: an argument is out of range, X has an infinite entry, stores NaN in a sparse matrix or observes nothing.

    Deviations from the paper: all observed entries serve in every iteration (the paper's analysis draws a fresh part of Ω for
    each, practice never does); each update starts from the last and is refined by conjugate gradients (the paper starts from the
    sketched solution and takes preconditioned gradient steps); the shared preconditioner; rows of the start are shrunk onto
    the incoherence bound (the paper sets large entries to zero); the ridge, 0 unless asked for.

    When not to use it: for implicit feedback (clicks, where a missing entry means something), for a mask that depends on the
    values, or with about k or fewer entries in most rows. With n_components of about 10 or less ``solver="exact"`` is as fast.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> full = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 150))
        >>> seen = np.where(rng.random(full.shape) < 0.3, full, np.nan)
        >>> model = MatrixCompletion(n_components=3, tol=1e-9, random_state=0).fit(seen)
        >>> completed = model.inverse_transform(model.embedding_)
        >>> bool(np.linalg.norm(completed - full) < 1e-5 * np.linalg.norm(full))
        True
        >>> bool(np.isclose(model.predict_entries([5], [7])[0], full[5, 7]))
        True

    Source: Gu, Song, Yin and Zhang, "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time",
    ICLR 2024, arXiv 2302.11068.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "solver": [StrOptions({"sketched", "exact"})],
        "preconditioner": [StrOptions({"shared", "row"})],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "inner_tol": [Interval(Real, 0, 1, closed="left")],
        "max_inner_iter": [Interval(Integral, 1, None, closed="left")],
        "oversampling": [Interval(Integral, 2, None, closed="left")],
        "init": [StrOptions({"spectral", "random"})],
        "incoherence": [Interval(Real, 0, None, closed="neither")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_components: int = 2,
        *,
        solver: str = "sketched",
        preconditioner: str = "shared",
        alpha: float = 0.0,
        max_iter: int = 100,
        tol: float = 1e-5,
        inner_tol: float = 0.3,
        max_inner_iter: int = 10,
        oversampling: int = 8,
        init: str = "spectral",
        incoherence: float = 4.0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.solver = solver
        self.preconditioner = preconditioner
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol
        self.inner_tol = inner_tol
        self.max_inner_iter = max_inner_iter
        self.oversampling = oversampling
        self.init = init
        self.incoherence = incoherence
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit U and V to the observed entries of X, shape (n_samples, n_features), sparse or dense with NaN; y is ignored."""
        self.fit_transform(X, y)
        return self

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """Fit, and return U, shape (n_samples, n_components): what ``transform(X)`` gives too."""
        observed = self._observed(X, reset=True)
        (m, n), k = observed.shape, self.n_components
        if k > min(m, n):
            raise ValueError(f"n_components={k} must be at most min(n_samples={m}, n_features={n})")
        if observed.nnz == 0:
            raise ValueError(
                "X has no observed entry: store entries in the sparse matrix, or give a dense array that is not all NaN"
            )
        random = check_random_state(self.random_state)
        self._generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
        try:
            rows, columns = ObservedBlocks(observed, k), ObservedBlocks(observed.T.tocsr(), k)
            u, v = self._start(observed, random)
            scale = np.sqrt(rows.squared_norm / rows.observed) or 1.0
            curve: list[float] = []
            for _ in range(self.max_iter):
                v, _ = self._update(columns, u, v)
                u, squared = self._update(rows, v, u)
                curve.append(float(np.sqrt(squared / rows.observed)))
                if self.tol > 0 and len(curve) > 1 and curve[-2] - curve[-1] <= self.tol * scale:
                    break
            else:
                if self.tol > 0:
                    warnings.warn(
                        f"not converged after max_iter={self.max_iter} iterations; raise max_iter or tol={self.tol}",
                        ConvergenceWarning,
                        stacklevel=3,
                    )
        finally:
            del self._generator
        embedding, self.components_ = self._balance(u, v)
        self.n_iter_ = len(curve)
        self.loss_curve_ = np.array(curve)
        self.embedding_ = self._embed(rows, embedding)
        return self.embedding_

    def transform(self, X: Any) -> Array:
        """Coordinates of rows, new ones too, from their observed entries: X (n_samples, n_features) to (n_samples, n_components)."""
        check_is_fitted(self)
        return self._embed(ObservedBlocks(self._observed(X, reset=False), self.components_.shape[0]))

    def inverse_transform(self, X: ArrayLike) -> Array:
        """The completed rows: X (n_samples, n_components) to a dense (n_samples, n_features)."""
        check_is_fitted(self)
        embedding = np.asarray(X)
        if embedding.ndim != 2 or embedding.shape[1] != self.components_.shape[0]:
            raise ValueError(f"X must have shape (n_samples, {self.components_.shape[0]}), not {embedding.shape}")
        completed: Array = embedding @ self.components_
        return completed

    def predict_entries(self, rows: ArrayLike, columns: ArrayLike) -> Array:
        """Entries (rows[e], columns[e]) of the completed training matrix, shape (entries,), in blocks of memory."""
        check_is_fitted(self)
        i, j = np.asarray(rows), np.asarray(columns)
        for name, index, size in (("rows", i, self.embedding_.shape[0]), ("columns", j, self.components_.shape[1])):
            if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
                raise ValueError(
                    f"'{name}' must be a 1-dimensional array of integers, not {index.dtype} of shape {index.shape}"
                )
            if index.size and (index.min() < 0 or index.max() >= size):
                raise ValueError(f"'{name}' must lie in [0, {size}), got values from {index.min()} to {index.max()}")
        if i.shape != j.shape:
            raise ValueError(f"'rows' and 'columns' must have the same length, not {i.shape[0]} and {j.shape[0]}")
        v = np.ascontiguousarray(self.components_.T)
        out = np.empty(len(i), v.dtype)
        for begin in range(0, len(i), 8192):
            part = slice(begin, begin + 8192)
            out[part] = np.einsum("ek,ek->e", self.embedding_[i[part].astype(np.intp)], v[j[part].astype(np.intp)])
        return out

    def score(self, X: Any, y: Any = None) -> float:
        """Negative root mean squared error of the fitted factors on the observed entries of X; higher is better.

        X has the shape of the training matrix and holds other entries of it: hold out entries, not rows. y is ignored.
        """
        check_is_fitted(self)
        held = self._observed(X, reset=False).tocoo()
        if held.shape[0] != self.embedding_.shape[0]:
            raise ValueError(
                f"X must have the training matrix's {self.embedding_.shape[0]} rows to be scored, not {held.shape[0]}"
            )
        if held.nnz == 0:
            raise ValueError("X has no observed entry to score")
        return -float(np.sqrt(np.mean((self.predict_entries(held.row, held.col) - held.data) ** 2)))

    def _observed(self, X: Any, reset: bool) -> Csr:
        """X as a CSR matrix of its observed entries, without duplicates."""
        X = validate_data(
            self, X, accept_sparse="csr", dtype=[np.float64, np.float32], ensure_all_finite="allow-nan", reset=reset
        )
        stored: bool = sparse.issparse(X)
        if not stored:
            seen = ~np.isnan(X)
            return csr_matrix((X[seen], np.nonzero(seen)), shape=X.shape)
        if np.isnan(X.data).any():
            raise ValueError("X stores NaN: in a sparse matrix leave a missing entry out")
        observed = csr_matrix(X)
        if not observed.has_canonical_format:
            observed = observed.copy()  # it shares the arrays of X, and duplicates are summed in place
            observed.sum_duplicates()
        return observed

    def _start(self, observed: Csr, random: np.random.RandomState) -> tuple[Array, Array]:
        """U and V to start from: singular vectors of the trimmed matrix, the rows of U clipped."""
        (m, n), k = observed.shape, self.n_components
        if self.init == "random":
            u = random.standard_normal((m, k)).astype(observed.dtype)
            return u, np.zeros((n, k), observed.dtype)
        # a row or column with over twice its share of entries would pull a singular vector onto itself
        rows = np.minimum(1, 2 * observed.nnz / m / np.maximum(np.diff(observed.indptr), 1))
        columns = np.minimum(1, 2 * observed.nnz / n / np.maximum(np.bincount(observed.indices, minlength=n), 1))
        trimmed = observed.copy()
        trimmed.data *= np.repeat(rows, np.diff(observed.indptr)).astype(observed.dtype)
        trimmed.data *= columns.astype(observed.dtype)[observed.indices] * observed.dtype.type(m * n / observed.nnz)
        u, s, vt = randomized_svd(trimmed, k, n_iter=4, random_state=random)
        norms = np.linalg.norm(u, axis=1, keepdims=True)
        clip = np.minimum(1, 2 * np.sqrt(self.incoherence * k / m) / np.maximum(norms, np.finfo(u.dtype).tiny))
        u, r = np.linalg.qr(u * clip)
        u *= np.where(np.diag(r) < 0, -1, 1)  # the signs that go with V
        return (u * np.sqrt(s)).astype(observed.dtype), (vt.T * np.sqrt(s)).astype(observed.dtype)

    def _update(self, blocks: ObservedBlocks, factor: Array, start: Array) -> tuple[Array, float]:
        """One half step: the regressions of one side, and the sum of squared residuals that they leave."""
        if self.solver == "exact":
            return solve_rows_exact(blocks, factor, alpha=self.alpha)
        return solve_rows_refined(
            blocks,
            factor,
            start,
            alpha=self.alpha,
            preconditioner=self.preconditioner,
            oversampling=self.oversampling,
            tol=self.inner_tol,
            max_iter=self.max_inner_iter,
            generator=self._generator,
        )

    def _balance(self, u: Array, v: Array) -> tuple[Array, Array]:
        """``UVᵀ = PΣQᵀ`` as ``PΣ^(1/2)`` and ``Σ^(1/2)Qᵀ``, the split at which the ridge on both factors is least."""
        (qu, ru), (qv, rv) = np.linalg.qr(u), np.linalg.qr(v)
        left, self.singular_values_, right = np.linalg.svd(ru @ rv.T)
        root = np.sqrt(self.singular_values_)
        embedding, components = (qu @ left) * root, root[:, None] * (right @ qv.T)
        # the sign of a singular vector is arbitrary: its largest entry is made positive
        largest = np.argmax(np.abs(components), axis=1)
        signs = np.where(components[np.arange(len(components)), largest] < 0, -1, 1).astype(v.dtype)
        return embedding * signs, components * signs[:, None]

    def _embed(self, blocks: ObservedBlocks, start: Array | None = None) -> Array:
        """U for the final components: polished from ``start``, or from nothing to an accuracy that hides the difference."""
        factor = np.ascontiguousarray(self.components_.T)
        if self.solver == "exact":
            return solve_rows_exact(blocks, factor, alpha=self.alpha)[0]
        tol = max(1e-8, 10 * float(np.finfo(factor.dtype).eps)) if start is None else 1e-3
        return solve_rows_refined(blocks, factor, start, alpha=self.alpha, tol=tol, max_iter=10 * factor.shape[1])[0]

    @property
    def _n_features_out(self) -> int:
        return int(self.components_.shape[0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
