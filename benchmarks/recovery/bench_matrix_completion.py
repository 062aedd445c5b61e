"""One iteration (both turns) of matrix completion on the same observed entries, at the same rank, in float64, one thread.

``implicit`` solves another problem at the same cost per entry: entries are confidences, and every missing entry counts as a
zero. It runs one iteration with three conjugate-gradient steps a row, its default, in compiled code. ``lsqr`` is a loop over
rows, timed on the row side of a tenth of the rows and of ours alike. ``svds`` is what our spectral start replaces.
"""

from __future__ import annotations

import numpy as np
from benchmarks.harness import Bench
from implicit.cpu.als import AlternatingLeastSquares
from scipy import sparse
from scipy.sparse.linalg import lsqr, svds
from sklearn.utils.extmath import randomized_svd

from corollary.linalg.regression import ObservedBlocks, solve_rows_exact, solve_rows_refined

NAME = "corollary.recovery.MatrixCompletion"


def problem(n: int, each: int, k: int) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """n rows with ``each`` positive entries, and factors a tenth away from the truth."""
    rng = np.random.default_rng(0)
    u, v = np.abs(rng.normal(size=(n, k))), np.abs(rng.normal(size=(n, k)))
    rows = np.repeat(np.arange(n), each)
    columns = np.concatenate([rng.choice(n, each, replace=False) for _ in range(n)])
    values = np.einsum("ek,ek->e", u[rows], v[columns])
    x = sparse.csr_matrix((values, (rows, columns)), shape=(n, n))
    return x, u + 0.1 * rng.normal(size=u.shape), v + 0.1 * rng.normal(size=v.shape)


def by_lsqr(x: sparse.csr_matrix, factor: np.ndarray, start: np.ndarray) -> np.ndarray:
    out = np.empty_like(start)
    for i in range(x.shape[0]):
        part = slice(x.indptr[i], x.indptr[i + 1])
        out[i] = lsqr(factor[x.indices[part]], x.data[part], x0=start[i], atol=0, btol=0, iter_lim=3)[0]
    return out


def implicit_iteration(x: sparse.csr_matrix, k: int) -> None:
    AlternatingLeastSquares(factors=k, iterations=1, regularization=0.01, dtype=np.float64, num_threads=1, use_cg=True).fit(
        x, show_progress=False
    )


def cases() -> list[Bench]:
    found = []
    for n, each, k in ((4000, 250, 16), (4000, 250, 64), (2000, 500, 128)):
        x, u, v = problem(n, each, k)
        rows, columns = ObservedBlocks(x, k), ObservedBlocks(x.T.tocsr(), k)

        def ours(rows=rows, columns=columns, u=u, v=v) -> None:
            new, _ = solve_rows_refined(columns, u, v, tol=0.3, max_iter=10)
            solve_rows_refined(rows, new, u, tol=0.3, max_iter=10)

        def exact(rows=rows, columns=columns, u=u) -> None:
            solve_rows_exact(rows, solve_rows_exact(columns, u)[0])

        setting = f"an iteration, {n * each:,} entries of {n} x {n}, rank {k}"
        peers = {"exact (ours)": exact, "implicit ALS, CG": lambda x=x, k=k: implicit_iteration(x, k)}
        found.append(Bench(NAME, setting, ours, peers, rounds=3))
    x, u, v = problem(4000, 250, 32)
    tenth = x[:400]
    blocks = ObservedBlocks(tenth, 32)
    found.append(
        Bench(
            NAME,
            "400 row regressions of 250 entries, rank 32, 3 refinements",
            lambda: solve_rows_refined(blocks, v, u[:400], tol=0, max_iter=3),
            {"scipy lsqr a row": lambda: by_lsqr(tenth, v, u[:400])},
            rounds=3,
        )
    )
    found.append(
        Bench(
            NAME,
            "spectral start, 1,000,000 entries of 4000 x 4000, rank 32",
            lambda: randomized_svd(x, 32, n_iter=4, random_state=0),
            {"scipy svds": lambda: svds(x, 32, random_state=0)},
            rounds=3,
        )
    )
    return found
