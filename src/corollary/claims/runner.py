"""Running claims: trials one by one or in parallel, each kept as soon as it is done, then judged.

A finished trial is never run again: its row carries the claim, arm, scale, base seed, number and source hash, and a later
run with the same key takes it from the store. So an interrupted or killed run goes on where it stopped.
"""

from __future__ import annotations

import importlib
import math
import random
import time
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np

from corollary.claims import environment
from corollary.claims.evidence import Evidence, EvidenceError, evidence_from_dict
from corollary.claims.record import ClaimRecord, Paper
from corollary.claims.source import source_hash
from corollary.claims.stats import COULD_NOT_RUN, HOLDS, Judgement, judge
from corollary.claims.store import Row, Store
from corollary.claims.trial import SCALES, ClaimFunction, Trial

ARMS = ("method", "control")
BACKENDS = ("loky", "dask", "ray")
# Trials that measure time disturb each other, so these kinds always run one at a time.
_SERIAL = ("ratio", "slope")
_SMOKE_PAIRS = 2
_TUNING = -1
_UNTUNED: Row = {"tuned": {}}


class Progress(Protocol):
    """What the runner tells whoever watches; `corollary.cli` draws it, and `Silent` drops it."""

    def start(self, paper: Paper, claim: ClaimRecord, arm: str, total: int, done: int) -> None: ...
    def advance(self) -> None: ...
    def finish(self, row: Row) -> None: ...


class Silent:
    """Progress that shows nothing."""

    def start(self, paper: Paper, claim: ClaimRecord, arm: str, total: int, done: int) -> None: ...
    def advance(self) -> None: ...
    def finish(self, row: Row) -> None: ...


@dataclass(frozen=True)
class Options:
    """How to verify.

    Args:
        scale: ``smoke`` (a couple of trials, no verdict), ``laptop`` or ``full``.
        pairs: trials for each statistical claim; the record's number by default. Exact claims keep theirs.
        seed: base seed, at least 0; every trial's seed is derived from it.
        controls: run each claim's control too.
        jobs: parallel trials; claims that measure time run one at a time all the same.
        threads: threads of torch and of BLAS in each trial. With 1, trials do not wait for each other's threads on a busy
            machine, and a time means the same on every machine.
        backend: ``loky``, ``dask`` or ``ray``, given to joblib.
        cluster: address of a running dask or ray cluster; a local one is started without it.
        device: as torch spells it; ``cuda`` where there is one at ``full`` scale, else ``cpu``, by default.
    """

    scale: str = "laptop"
    pairs: int | None = None
    seed: int = 0
    controls: bool = True
    jobs: int = 1
    threads: int = 1
    backend: str = "loky"
    cluster: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale is '{self.scale}'; allowed: {', '.join(SCALES)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is '{self.backend}'; allowed: {', '.join(BACKENDS)}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; allowed: 0 or more")
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.pairs is not None and self.pairs < 2:
            raise ValueError(f"pairs is {self.pairs}; allowed: 2 or more (a verdict worth keeping takes 6)")


def trial_seed(base: int, slug: str, claim: str, index: int) -> int:
    """A trial's seed, below 2**31; the method and its control get the same, so that they differ in the idea alone.

    Neighbouring base seeds share no trials: the seed is drawn from (base, claim, index) as a whole.
    """
    entropy = [base, zlib.crc32(f"{slug}/{claim}".encode()), index % 2**32]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] & 0x7FFFFFFF)


def _plain(value: Any) -> Any:
    """Plain data that JSON takes: arrays and tensors as lists, non-finite numbers as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _seed_everything(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - peers and scikit-learn may still read the global state
    torch.manual_seed(seed)


def _function(module: str, claim: str) -> ClaimFunction[Any]:
    function = getattr(importlib.import_module(module), claim, None)
    if not isinstance(function, ClaimFunction):
        raise EvidenceError(f"{module} has no function '{claim}' decorated with @claim")
    return function


@contextmanager
def _threads(number: int) -> Iterator[None]:
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with threadpool_limits(number):
            yield
    finally:
        torch.set_num_threads(before)


def run_trial(module: str, claim: str, arm: str, trial: Trial, threads: int, *, tuning: bool = False) -> Row:
    """Run one trial (or the tuning) of one claim, here or in a worker; an error comes back as a row, not as an exception.

    Returns:
        ``{"evidence" or "tuned": ..., "logged", "figures", "seconds"}`` or ``{"error": one line, "traceback": text}``.
    """
    begin = time.perf_counter()
    try:
        with _threads(threads):
            function = _function(module, claim)
            _seed_everything(trial.seed)
            if tuning:
                overrides = function.overrides if arm == "control" else {}
                return {"tuned": _plain(function.tune(trial, **overrides))} if function.tune else _UNTUNED
            evidence = function.control(trial) if arm == "control" else function(trial)
        if not isinstance(evidence, Evidence):
            raise EvidenceError(f"returned {type(evidence).__name__}; a claim returns Paired, Exact, Slope or Ratio")
        result: Row = {"evidence": evidence.to_dict(), "logged": _plain(trial.logged), "figures": _plain(trial.figures)}
    except Exception as error:  # noqa: BLE001 - whatever a claim raises, the run goes on and the verdict says so
        line = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {line}", "traceback": traceback.format_exc()}
    return {**result, "seconds": round(time.perf_counter() - begin, 4)}


class Runner:
    """Verifies claims into a store.

    Args:
        store: where trials and verdicts are kept.
        options: how to run.
        progress: whom to tell.
    """

    def __init__(self, store: Store, options: Options | None = None, progress: Progress | None = None) -> None:
        self.store = store
        self.options = options or Options()
        self.progress: Progress = progress or Silent()

    def verify(self, targets: Iterable[tuple[Paper, ClaimRecord]]) -> Iterator[Row]:
        """The verdict row of each claim, in order, appended to the store as soon as it stands (not at ``smoke`` scale)."""
        self.store.check_writable()
        for paper, claim in targets:
            yield self._verify(paper, claim)

    def _device(self) -> str:
        if self.options.device:
            return self.options.device
        if self.options.scale == "full":
            import torch

            return "cuda" if torch.cuda.is_available() else "cpu"
        return "cpu"

    def _pairs(self, claim: ClaimRecord) -> int:
        if self.options.scale == "smoke":
            return min(_SMOKE_PAIRS, claim.pairs)
        return claim.pairs if self.options.pairs is None or claim.kind == "exact" else self.options.pairs

    def _verify(self, paper: Paper, claim: ClaimRecord) -> Row:
        options, begin = self.options, time.perf_counter()
        key = {
            "slug": paper.slug,
            "claim": claim.id,
            "scale": options.scale,
            "seed": options.seed,
            "device": self._device(),
            "threads": options.threads,
            "source_hash": source_hash(paper, claim.id),
        }
        arms = {arm: self._run_arm(paper, claim, arm, key) for arm in (ARMS if options.controls else ARMS[:1])}
        method, control = arms["method"], arms.get("control")
        judged = self._judge(claim, method)
        control_judged = self._judge(claim, control) if control is not None else None
        control_verdict = control_judged.verdict if control_judged else None
        row: Row = {
            "type": "verdict",
            **key,
            "statement": claim.statement,
            "kind": claim.kind,
            "verdict": judged.verdict,
            "control_verdict": control_verdict,
            "defect": control_verdict is not None and control_verdict in (*HOLDS, COULD_NOT_RUN),
            "effect": _plain(judged.effect),
            "ci_low": judged.ci_low,
            "ci_high": judged.ci_high,
            "p_value": judged.p_value,
            "control_effect": _plain(control_judged.effect) if control_judged else None,
            "control_ci_low": control_judged.ci_low if control_judged else None,
            "control_ci_high": control_judged.ci_high if control_judged else None,
            "pairs": len(method.rows),
            "values": [_value(row) for row in method.rows],
            "control_values": [_value(row) for row in control.rows] if control is not None else [],
            "figures": next((row["figures"] for row in method.rows if row.get("figures")), {}),
            "tuned": method.tuned,
            "reason": method.error,
            "control_reason": control.error if control is not None else None,
            "traceback": method.traceback or (control.traceback if control is not None else None),
            "seconds": round(sum(r["seconds"] for arm in arms.values() for r in arm.rows), 3),
            "wall_seconds": round(time.perf_counter() - begin, 3),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "commit": environment.commit(),
            "packages": environment.packages(),
            "machine": environment.machine(),
        }
        if options.scale == "smoke":
            # Smoke proves that the code runs; two trials say nothing of the claim.
            row["verdict"] = COULD_NOT_RUN if method.error else None
            row["control_verdict"] = COULD_NOT_RUN if control is not None and control.error else None
            row["defect"] = row["control_verdict"] is not None
        else:
            self.store.append(paper.slug, row)
        self.progress.finish(row)
        return row

    @staticmethod
    def _judge(claim: ClaimRecord, arm: _Arm) -> Judgement:
        if arm.error is not None:
            return Judgement(COULD_NOT_RUN)
        try:
            return judge(claim, [evidence_from_dict(row["evidence"]) for row in arm.rows])
        except EvidenceError as error:
            arm.error = str(error)
            return Judgement(COULD_NOT_RUN)

    def _run_arm(self, paper: Paper, claim: ClaimRecord, arm: str, key: Row) -> _Arm:
        kept: dict[int, Row] = {}
        for row in self.store.rows(paper.slug):
            if row.get("type") == "trial" and row.get("arm") == arm and all(row.get(k) == v for k, v in key.items()):
                kept.setdefault(row["index"], row)
        total = self._pairs(claim)
        wanted = [index for index in range(total) if index not in kept]
        self.progress.start(paper, claim, arm, total, total - len(wanted))
        result = _Arm()

        def keep(index: int, row: Row) -> bool:
            if "error" in row:
                seed = trial_seed(key["seed"], paper.slug, claim.id, index)
                place = "tuning" if index == _TUNING else f"trial {index}"
                result.error = f"{row['error']} ({place}, seed {seed})"
                result.traceback = row["traceback"]
                return False
            kept[index] = {"type": "trial", **key, "arm": arm, "index": index, **row}
            self.store.append(paper.slug, kept[index])
            return True

        def trial(index: int) -> Trial:
            seed = trial_seed(key["seed"], paper.slug, claim.id, index)
            return Trial(seed=seed, scale=key["scale"], device=key["device"], tuned=result.tuned)

        if wanted and _TUNING not in kept:
            row = run_trial(paper.module, claim.id, arm, trial(_TUNING), self.options.threads, tuning=True)
            if row != _UNTUNED and not keep(_TUNING, row):
                return result
        result.tuned = kept.get(_TUNING, {}).get("tuned", {})

        threads = self.options.threads
        calls = [(index, (paper.module, claim.id, arm, trial(index), threads)) for index in wanted]
        for index, row in self._run_all(claim, calls):
            if keep(index, row):
                self.progress.advance()
        result.rows = [
            {**kept[index], "trial_seed": trial_seed(key["seed"], paper.slug, claim.id, index)}
            for index in sorted(kept)
            if 0 <= index < total
        ]
        return result

    def _run_all(
        self, claim: ClaimRecord, calls: Sequence[tuple[int, tuple[str, str, str, Trial, int]]]
    ) -> Iterator[tuple[int, Row]]:
        if self.options.jobs == 1 or claim.kind in _SERIAL or len(calls) < 2:
            for index, arguments in calls:
                row = run_trial(*arguments)
                yield index, row
                if "error" in row:
                    break
            return
        from corollary.claims.parallel import run_parallel

        yield from run_parallel(calls, self.options.jobs, self.options.backend, self.options.cluster)


class _Arm:
    """The trials of one arm, or what stopped it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tuned: Mapping[str, Any] = {}
        self.error: str | None = None
        self.traceback: str | None = None


def _value(row: Row) -> Row:
    return {"seed": row["trial_seed"], **{name: row[name] for name in ("evidence", "logged", "seconds")}}
