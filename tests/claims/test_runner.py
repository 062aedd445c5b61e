"""The runner: every verdict is reachable, nothing is run twice, and trouble becomes a verdict with a reason."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corollary.claims import stats
from corollary.claims.record import get_paper
from corollary.claims.runner import Options, Runner, trial_seed
from corollary.claims.store import Row, Store, StoreError

FIELDS = [
    "slug",
    "claim",
    "statement",
    "kind",
    "verdict",
    "control_verdict",
    "effect",
    "ci_low",
    "ci_high",
    "p_value",
    "pairs",
    "seed",
    "scale",
    "values",
    "seconds",
    "commit",
    "source_hash",
    "packages",
    "machine",
]


def _verify(store: Store, slug: str, *claims: str, **options: object) -> dict[str, Row]:
    paper = get_paper(slug)
    targets = [(paper, claim) for claim in paper.claims if not claims or claim.id in claims]
    return {row["claim"]: row for row in Runner(store, Options(**options)).verify(targets)}


def test_claims_that_hold_and_controls_that_fail(toys: Path, store: Store) -> None:
    rows = _verify(store, "steady")
    assert {claim: row["verdict"] for claim, row in rows.items()} == {
        "better": stats.SUPPORTED,
        "identity": stats.PASSED,
        "linear": stats.SUPPORTED,
        "cheaper": stats.SUPPORTED,
        "tuned": stats.SUPPORTED,
    }
    assert all(row["control_verdict"] not in (*stats.HOLDS, stats.COULD_NOT_RUN) for row in rows.values())
    assert not any(row["defect"] for row in rows.values())
    row = rows["better"]
    assert set(FIELDS) <= set(row)
    assert row["effect"] == pytest.approx(-1, abs=0.4)
    assert row["ci_low"] < row["effect"] < row["ci_high"] < 0
    assert len(row["values"]) == row["pairs"] == 10
    assert row["values"][0]["logged"]["missing"] is None, "NaN in a log becomes null"
    assert row["figures"]["curve"]["y"] == {"ours": [3.0, 4.0]}
    assert rows["tuned"]["tuned"] == {"lr": 1.0}


@pytest.mark.parametrize("seed", [1, 7, 123_456])
def test_verdicts_hold_on_other_seeds(toys: Path, store: Store, seed: int) -> None:
    rows = _verify(store, "steady", seed=seed)
    assert all(row["verdict"] in stats.HOLDS and not row["defect"] for row in rows.values())


def test_every_other_verdict_is_reached(toys: Path, store: Store) -> None:
    rows = _verify(store, "troubled")
    verdicts = {claim: row["verdict"] for claim, row in rows.items()}
    assert verdicts == {
        "raises": stats.COULD_NOT_RUN,
        "gives_nan": stats.COULD_NOT_RUN,
        "exact_nan": stats.FAILED,
        "wrong_kind": stats.COULD_NOT_RUN,
        "gives_none": stats.COULD_NOT_RUN,
        "control_passes": stats.PASSED,
        "control_raises": stats.PASSED,
        "worse": stats.NOT_SUPPORTED,
        "unclear": stats.INCONCLUSIVE,
        "missing": stats.COULD_NOT_RUN,
    }
    seed = trial_seed(0, "troubled", "raises", 0)
    assert rows["raises"]["reason"] == f"RuntimeError: the component broke (trial 0, seed {seed})"
    assert "on two lines" in rows["raises"]["traceback"]
    assert "'ours' is nan" in rows["gives_nan"]["reason"]
    assert "returned Exact" in rows["wrong_kind"]["reason"]
    assert "returned NoneType; a claim returns Paired" in rows["gives_none"]["reason"]
    assert "has no function 'missing'" in rows["missing"]["reason"]
    assert rows["exact_nan"]["effect"] is None


def test_a_control_that_passes_or_cannot_run_is_a_defect(toys: Path, store: Store) -> None:
    rows = _verify(store, "troubled", "control_passes", "control_raises", "worse")
    assert rows["control_passes"]["defect"]
    assert rows["control_raises"]["defect"]
    assert "ValueError: the control broke" in rows["control_raises"]["control_reason"]
    assert not rows["worse"]["defect"]


def test_smoke_gives_no_verdict_and_leaves_none_in_the_store(toys: Path, store: Store) -> None:
    rows = _verify(store, "steady", scale="smoke")
    assert all(row["verdict"] is None and row["control_verdict"] is None and row["pairs"] == 2 for row in rows.values())
    assert not [row for row in store.rows("steady") if row["type"] == "verdict"]
    assert _verify(store, "troubled", "raises", scale="smoke")["raises"]["verdict"] == stats.COULD_NOT_RUN


def test_trial_seeds_differ_between_trials_claims_and_neighbouring_bases() -> None:
    seeds = {trial_seed(b, "s", c, i) for b in range(20) for c in ("one", "two") for i in range(-1, 20)}
    assert len(seeds) == 20 * 2 * 21
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.fixture
def trace(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "trace"
    monkeypatch.setenv("TOY_TRACE", str(path))
    return path


def test_finished_trials_are_not_run_again(trace: Path, store: Store) -> None:
    first = _verify(store, "slow")["counted"]
    assert len(trace.read_text().splitlines()) == 16
    again = _verify(store, "slow")["counted"]
    assert len(trace.read_text().splitlines()) == 16
    assert (first["effect"], first["values"]) == (again["effect"], again["values"])
    _verify(store, "slow", pairs=10)
    assert len(trace.read_text().splitlines()) == 20, "only the two new pairs of each arm are run"
    assert _verify(store, "slow", pairs=6)["counted"]["pairs"] == 6
    _verify(store, "slow", seed=1)
    assert len(trace.read_text().splitlines()) == 36, "another seed is another measurement"


def _start(store: Store, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from corollary.cli import main; main()", "verify", "slow", "--controls"]
    return subprocess.Popen(
        [*command, "--store", str(store.root), *more], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TOY_SECONDS": "0.25"},
    )  # fmt: skip


def _wait_for(path: Path, lines: int) -> None:
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not reach {lines} lines")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)], ids=["kill -9", "Ctrl-C"]
)
def test_an_interrupted_run_goes_on_where_it_stopped(trace: Path, store: Store, number: int, status: int) -> None:
    process = _start(store)
    _wait_for(trace, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert " ".join(errors.split()).endswith(
            "interrupted; finished trials are kept, and the same command goes on from there"
        )
    kept = [row for row in store.rows("slow") if row["type"] == "trial"]
    assert 2 <= len(kept) < 16
    row = _verify(store, "slow")["counted"]
    assert row["pairs"] == 8
    assert row["verdict"] == stats.SUPPORTED
    ran = collections.Counter(trace.read_text().splitlines())
    assert len(ran) == 16
    assert sum(ran.values()) <= 17, "at most the trial that was cut off is run again"


def test_two_runs_at_once_on_one_store(trace: Path, store: Store) -> None:
    both = [_start(store) for _ in range(2)]
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "supported" in out
    verdicts = [row for row in store.rows("slow") if row["type"] == "verdict"]
    assert len(verdicts) == 2
    assert verdicts[0]["effect"] == verdicts[1]["effect"]


@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_parallel_runs_give_the_serial_verdict(trace: Path, store: Store, tmp_path: Path, backend: str) -> None:
    serial = _verify(store, "slow")["counted"]
    parallel = _verify(Store(tmp_path / "parallel"), "slow", jobs=2, backend=backend)["counted"]
    assert parallel["verdict"] == stats.SUPPORTED
    assert [v["evidence"] for v in parallel["values"]] == [v["evidence"] for v in serial["values"]]
    assert (parallel["effect"], parallel["ci_low"], parallel["p_value"]) == (
        serial["effect"],
        serial["ci_low"],
        serial["p_value"],
    )


def test_an_error_in_a_worker_is_a_verdict(toys: Path, store: Store) -> None:
    row = _verify(store, "troubled", "raises", jobs=2)["raises"]
    assert row["verdict"] == stats.COULD_NOT_RUN
    assert "the component broke" in row["reason"]


def test_unwritable_store_stops_before_any_work(toys: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another with --store"):
        _verify(Store(tmp_path / "file" / "x"), "steady")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "desktop"}, "scale is 'desktop'; allowed: smoke, laptop, full"),
        ({"backend": "threads"}, "backend is 'threads'; allowed: loky, dask, ray"),
        ({"seed": -1}, "seed is -1; allowed: 0 or more"),
        ({"jobs": 0}, "jobs is 0; allowed: 1 or more"),
        ({"pairs": 1}, "pairs is 1; allowed: 2 or more"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)
