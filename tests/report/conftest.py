"""A made-up catalogue with made-up rows: every verdict, every kind, a defect, stale code, awkward texts and extreme numbers.

None of these papers exists and no number here was measured; the report must show them all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corollary.claims.record import ClaimRecord, Component, Paper
from corollary.report import write_report

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"
LONG = (
    "An Unreasonably Long Title That Nobody Would Give to a Paper but That the Page Must Bear All the Same, Together with "
    "Pneumonoultramicroscopicsilicovolcanoconiosis_and_one_identifier_without_any_break_in_it_at_all_for_good_measure"
)


def _claim(id: str, kind: str, statement: str, **fields: Any) -> ClaimRecord:
    defaults: dict[str, Any] = {
        "source": "abstract, Table 2",
        "control": "the curvature estimate replaced by noise of the same size",
    }
    if kind in ("paired", "ratio"):
        defaults |= {"baseline": "AdamW, learning rate tuned over the same 5 values", "better": "lower"}
    if kind == "paired":
        defaults |= {"metric": "test error", "tuning": "5 learning rates each, on 2 seeds no trial uses"}
    return ClaimRecord(id=id, kind=kind, statement=statement, **(defaults | fields))


def _paper(slug: str, package: str, title: str, claims: list[ClaimRecord], **fields: Any) -> Paper:
    defaults: dict[str, Any] = {
        "authors": ("Ada Example", "Bo Sample", "Cy Made-Up", "Di Invented"),
        "year": 2023,
        "summary": "A made-up paper that stands here so that the page has something to show. Reach for it in tests, and "
        "nowhere else; `lr` is its only option.",
        "arxiv": "2301.00001",
        "venue": "ICML 2023",
        "code": "https://example.org/code",
        "components": (Component("corollary.claims.Trial", "function", "Algorithm 1", "example.Peer"),),
    }
    return Paper(slug=slug, package=package, title=title, claims=tuple(claims), **(defaults | fields))


def make_papers() -> dict[str, Paper]:
    """Ten made-up papers in three packages."""
    papers = [
        _paper(
            "curve-step", "optim", "Curvature Steps: A Second-Order Method That Does Not Exist",
            [
                _claim("lower_error", "paired", "Lower test error than AdamW at equal steps on handwritten digits", tour=True,
                       note="Held at every width tried.\n\nThe gap narrows as batches grow."),
                _claim("unbiased", "slope", "The estimate's error falls as n^-1/2 with the number of probes", exponent=-0.5,
                       tolerance=0.1, metric="relative error"),
                _claim("cheap_step", "ratio", "One step costs at most 3x a step of SGD", bound=3.0, metric="seconds"),
            ],
            deviations=("trains 60 thousand parameters where the paper trains 60 million",
                        "the decay is `0.99` throughout; the paper anneals it"),
        ),
        _paper("frozen", "optim", "Frozen Subspaces for Memory-Lean Training",
               [_claim("budget", "paired", "Lower validation loss than projection at every memory budget", metric="loss"),
                _claim("bytes", "exact", "Optimizer state bytes equal the formula", tolerance=0.0)]),
        _paper("wild", "optim", LONG,
               [_claim("extreme", "paired", "Reaches a lower loss even where the loss is astronomically large", metric="loss"),
                _claim("tiny", "exact", "The identity holds to machine precision over random instances of every shape",
                       tolerance=1e-12)],
               authors=tuple(f"Author Number {i}" for i in range(1, 25)), venue=""),
        _paper("hostile", "optim", HOSTILE,
               [_claim("hostile_claim", "paired", f"Claims {HOSTILE}", note=HOSTILE, control=HOSTILE, metric="<b>error</b>")],
               authors=("<i>Mallory</i>",), code="javascript:alert(1)", url="https://example.org/?a=1&b=\"2\"", summary=HOSTILE,
               deviations=(HOSTILE,)),
        _paper("spectrum", "analysis", "Outliers of the Spectrum, Counted",
               [_claim("count", "exact", "The number of outliers equals the number of classes minus one", tolerance=1e-6),
                _claim("growth", "slope", "Cost grows no faster than linearly in the number of parameters", exponent=1.0,
                       tolerance=0.15, better="lower", metric="seconds")]),
        _paper("norms", "analysis", "Norms Without Decompositions",
               [_claim("faster", "ratio", "Less time than the nuclear norm at equal size", bound=1.0, metric="seconds")]),
        _paper("waits", "analysis", "A Paper That Waits for Its First Run",
               [_claim("first", "paired", "Better calibrated than temperature scaling", better="higher", metric="accuracy",
                       margin=0.01),
                _claim("second", "exact", "The bound is never broken", tolerance=1e-8)]),
        _paper("equiv", "nn", "Equivariant Products in a Basis of One's Own",
               [_claim("equal", "exact", "Equals the sum over coefficients", tolerance=1e-6, tour=True),
                _claim("breaks", "paired", "Lower error than the plain product on a task of rotations")]),
        _paper("heads", "nn", "Heads on a Manifold",
               [_claim("error", "paired", "Lower test error than softmax with an equal backbone"),
                _claim("transfer", "paired", "Higher transfer accuracy as the dimension of the subspace grows", better="higher",
                       metric="accuracy", margin=0.005)]),
        _paper("silent", "nn", "A Paper Without Anything Optional",
               [_claim("only", "paired", "It is better")], arxiv="", venue="", code="", deviations=(),
               components=(Component("corollary.nn.DoesNotExist", "layer", "Section 3"),)),
    ]  # fmt: skip
    return {p.slug: p for p in papers}


def _row(paper: Paper, claim_id: str, verdict: str, control: str | None, **fields: Any) -> dict[str, Any]:
    claim = paper.claim(claim_id)
    row: dict[str, Any] = {
        "slug": paper.slug, "claim": claim_id, "statement": claim.statement, "kind": claim.kind, "verdict": verdict,
        "control_verdict": control, "effect": None, "ci_low": None, "ci_high": None, "p_value": None, "pairs": 10, "seed": 0,
        "scale": "laptop", "values": [], "control_values": [], "figures": {}, "tuned": {}, "seconds": 31.4,
        "commit": "0123456789abcdef0123456789abcdef01234567", "source_hash": "feedface" * 8,
        "packages": {"torch": "2.13.0", "numpy": "2.3.1"},
        "machine": {"system": "Linux", "cpu": "a made-up processor", "cores": 2}, "time": "2025-11-20T16:30:12+00:00",
        "stale": False, "reason": None, "control_reason": None, "traceback": None, "defect": control in ("supported at this scale", "exact check passed", "could not run"),
    }  # fmt: skip
    return row | fields


def _trials(kind: str, pairs: list[Any], **logged: Any) -> list[dict[str, Any]]:
    names = {"paired": ("ours", "baseline"), "ratio": ("ours", "baseline"), "exact": ("error",), "slope": ("x", "y")}[kind]
    found = []
    for i, pair in enumerate(pairs):
        evidence = {"kind": kind, **dict(zip(names, pair, strict=True))}
        found.append({"seed": 3_000_000_019 + 7919 * i, "evidence": evidence, "logged": logged, "seconds": 1.5 + 0.1 * i})
    return found


def _paired(rng: np.random.Generator, shift: float, spread: float, at: float = 0.1, n: int = 10) -> dict[str, Any]:
    baseline = at + spread * rng.normal(size=n)
    ours = baseline + shift + 0.4 * spread * rng.normal(size=n)
    control = baseline + 0.1 * spread * rng.normal(size=n)
    difference = ours - baseline
    half = 2.26 * difference.std(ddof=1) / math.sqrt(n)
    pairs = [(float(a), float(b)) for a, b in zip(ours, baseline, strict=True)]
    return {
        "values": _trials("paired", pairs, best_learning_rate=0.003, steps=400),
        "control_values": _trials("paired", [(float(a), float(b)) for a, b in zip(control, baseline, strict=True)]),
        "effect": float(difference.mean()), "ci_low": float(difference.mean() - half),
        "ci_high": float(difference.mean() + half), "pairs": n, "control_effect": float((control - baseline).mean()),
        "control_ci_low": -0.03 * spread, "control_ci_high": 0.08 * spread,
    }  # fmt: skip


def make_rows() -> list[dict[str, Any]]:
    """Made-up rows: not for every claim."""
    papers, rng = make_papers(), np.random.default_rng(0)
    yes, no, unsure = "supported at this scale", "not supported at this scale", "inconclusive"
    passed, failed = "exact check passed", "exact check failed"
    steps = list(range(0, 400, 10))
    fall = {
        "ours": [0.1 + 2.2 * math.exp(-s / 60) for s in steps],
        "AdamW": [0.14 + 2.2 * math.exp(-s / 90) for s in steps],
        "SGD": [0.2 + 2.2 * math.exp(-s / 140) for s in steps],
    }
    sizes = [1, 4, 16, 64, 256]
    curves = {
        "training loss": {"x": steps, "y": fall, "xlabel": "step", "ylabel": "loss", "log": "y"},
        "learning_rates": {"x": [1e-4, 1e-3, 1e-2, 1e-1],
                           "y": {"ours": [0.2, 0.11, 0.1, 0.13], "AdamW": [0.25, 0.14, None, 0.9]},
                           "xlabel": "learning rate", "ylabel": "test error", "log": "x"},
    }  # fmt: skip
    slopes = [(sizes, [float(0.8 * n**-0.5 * math.exp(0.08 * rng.normal())) for n in sizes]) for _ in range(8)]
    flat = [(sizes, [float(0.8 * math.exp(0.08 * rng.normal())) for _ in sizes]) for _ in range(8)]
    linear = [(sizes, [float(1e-3 * n**1.02 * math.exp(0.05 * rng.normal())) for n in sizes]) for _ in range(6)]
    cubic = [(sizes, [float(1e-3 * n**2.9) for n in sizes]) for _ in range(6)]
    times = [
        (float(a), float(b)) for a, b in zip(rng.uniform(2.0e-3, 2.3e-3, 10), rng.uniform(0.9e-3, 1.0e-3, 10), strict=True)
    ]
    slow = [(a * 12, b) for a, b in times]
    huge = [(1e12 * (1 + 0.01 * i), 4e15) for i in range(10)]
    return [
        _row(papers["curve-step"], "lower_error", yes, no, p_value=0.0009765625, figures=curves,
             tuned={"ours": {"lr": 0.15}, "baseline": {"lr": 0.003}, "grid": [0.0001, 0.001, 0.003]},
             **_paired(rng, -0.03, 0.02)),
        _row(papers["curve-step"], "unbiased", yes, no, effect=-0.497, ci_low=-0.52, ci_high=-0.47, pairs=8,
             values=_trials("slope", slopes), control_values=_trials("slope", flat)),
        _row(papers["curve-step"], "cheap_step", yes, no, effect=2.24, ci_low=2.17, ci_high=2.31,
             values=_trials("ratio", times), control_values=_trials("ratio", slow), stale=True),
        _row(papers["frozen"], "budget", no, no, p_value=0.93, **_paired(rng, 0.02, 0.03, at=1.4)),
        _row(papers["frozen"], "bytes", passed, failed, effect=0.0, pairs=6, values=_trials("exact", [(0.0,)] * 6),
             control_values=_trials("exact", [(4096.0,)] * 6)),
        _row(papers["wild"], "extreme", yes, unsure, p_value=0.0009765625, effect=-3.99895e15, ci_low=-3.99896e15,
             ci_high=-3.99894e15, values=_trials("paired", huge), control_values=_trials("paired", [(4e15, 4e15)] * 10)),
        _row(papers["wild"], "tiny", passed, failed, effect=3.3e-16, pairs=6,
             values=_trials("exact", [(v,) for v in (0.0, 1e-17, 2.2e-16, 3.3e-16, 1e-300, 5e-17)]),
             control_values=_trials("exact", [(v,) for v in (0.3, 1e300, "inf", 2.0, 1.0, 0.7)])),
        _row(papers["hostile"], "hostile_claim", unsure, no, p_value=0.4, reason=HOSTILE, tuned={HOSTILE: HOSTILE},
             figures={HOSTILE: {"x": [1, 2, 3], "y": {HOSTILE: [1, 2, 3]}, "xlabel": HOSTILE, "ylabel": HOSTILE, "log": ""}},
             commit=HOSTILE, machine={HOSTILE: HOSTILE}, time=HOSTILE, **_paired(rng, 0.0, 0.02)),
        _row(papers["spectrum"], "count", failed, failed, effect=2.5e-4, pairs=6,
             values=_trials("exact", [(v,) for v in (1e-9, 4e-8, 2.5e-4, 3e-9, 1e-8, 8e-9)]),
             control_values=_trials("exact", [(0.5,)] * 6)),
        _row(papers["spectrum"], "growth", yes, no, effect=1.02, ci_low=0.99, ci_high=1.05, pairs=6,
             values=_trials("slope", linear), control_values=_trials("slope", cubic)),
        _row(papers["norms"], "faster", unsure, None, effect=0.99, ci_low=0.93, ci_high=1.06,
             values=_trials("ratio", [(0.99e-3, 1e-3), (1.05e-3, 1e-3), (0.93e-3, 1e-3), (0.97e-3, 1e-3), (1.02e-3, 1e-3),
                                      (0.98e-3, 1e-3)]), pairs=6),
        _row(papers["equiv"], "equal", passed, failed, effect=4.4e-9, pairs=6,
             values=_trials("exact", [(v,) for v in (1e-9, 4.4e-9, 2e-9, 3e-9, 1e-9, 8e-10)]),
             control_values=_trials("exact", [(0.8,), (1.3,), (0.5,), (0.9,), (1.1,), (0.6,)])),
        _row(papers["equiv"], "breaks", "could not run", "could not run", pairs=0, seconds=0.02,
             reason="ModuleNotFoundError: No module named 'example' (trial 0, seed 12)",
             control_reason=HOSTILE, traceback="Traceback (most recent call last):\n  File <made-up>\n" + HOSTILE),
        _row(papers["heads"], "error", yes, yes, p_value=0.004, **_paired(rng, -0.02, 0.01, n=12)),
        _row(papers["heads"], "transfer", unsure, no, p_value=0.06, **_paired(rng, 0.006, 0.02, at=0.8, n=30), stale=True),
        {"slug": "heads", "claim": "no_longer_there", "verdict": yes, "control_verdict": no, "p_value": 0.0001},
    ]  # fmt: skip


@pytest.fixture(scope="session")
def papers() -> Mapping[str, Paper]:
    return make_papers()


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return make_rows()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, papers: Mapping[str, Paper], rows: list[dict[str, Any]]) -> Path:
    """The folder of a written report."""
    return write_report(tmp_path_factory.mktemp("report") / "out", papers, rows).parent
