"""Spreading trials over processes or a cluster with joblib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from corollary.claims.runner import run_trial
from corollary.claims.store import Row
from corollary.claims.trial import Trial

Call = tuple[int, tuple[str, str, str, Trial, int]]


class BackendError(RuntimeError):
    """A backend cannot be used; the message says what to install or to start."""


def _one(index: int, arguments: tuple[str, str, str, Trial, int]) -> tuple[int, Row]:
    return index, run_trial(*arguments)


def _dask(jobs: int, cluster: str | None) -> AbstractContextManager[Any]:
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise BackendError("backend 'dask' needs the extra 'dask': pip install 'corollary[dask]'") from error
    if cluster:
        return Client(cluster, timeout="10s")  # type: ignore[no-any-return]
    return Client(n_workers=jobs, threads_per_worker=1, dashboard_address=None)  # type: ignore[no-any-return]


def _ray(jobs: int, cluster: str | None) -> AbstractContextManager[Any]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ModuleNotFoundError as error:
        raise BackendError("backend 'ray' needs the extra 'ray': pip install 'corollary[ray]'") from error
    if cluster:
        ray.init(address=cluster, ignore_reinit_error=True)
    else:
        ray.init(num_cpus=jobs, include_dashboard=False, ignore_reinit_error=True)
    register_ray()
    return nullcontext()


def run_parallel(calls: Sequence[Call], jobs: int, backend: str, cluster: str | None) -> Iterator[tuple[int, Row]]:
    """Run trials in parallel and give each as soon as it is done, in no order; after an error no more are started.

    Args:
        calls: (number, arguments of `run_trial`).
        jobs: how many at once.
        backend: ``loky``, ``dask`` or ``ray``.
        cluster: address of a running dask or ray cluster.

    Raises:
        BackendError: the backend's package is missing or its cluster does not answer.
    """
    from joblib import Parallel, delayed, parallel_config

    with ExitStack() as stack:
        try:
            if backend == "dask":
                stack.enter_context(_dask(jobs, cluster))
            elif backend == "ray":
                stack.enter_context(_ray(jobs, cluster))
        except (OSError, TimeoutError, ConnectionError) as error:
            raise BackendError(f"backend '{backend}': no cluster answers at '{cluster}' ({error})") from error
        with parallel_config(backend=backend, n_jobs=jobs):
            pool = Parallel(return_as="generator_unordered", pre_dispatch=jobs, batch_size=1)
            failed = False
            tasks = (delayed(_one)(index, arguments) for index, arguments in calls if not failed)
            for index, row in pool(tasks):
                failed = failed or "error" in row
                yield index, row
