"""The claims engine: records, evidence, statistics, controls, the runner and the store.

A paper's module says how its claims are measured; this package says what a measurement is worth. Names that need torch are
loaded on first use, so that the command line can list the catalogue without it.
"""

from __future__ import annotations

from corollary.claims.evidence import Evidence, EvidenceError, Exact, Paired, Ratio, Slope
from corollary.claims.record import ClaimRecord, Component, Paper, RecordError, UnknownPaper, catalogue, get_paper
from corollary.claims.trial import ClaimFunction, Trial, claim

__all__ = [
    "Paper",
    "Component",
    "ClaimRecord",
    "RecordError",
    "UnknownPaper",
    "catalogue",
    "get_paper",
    "Evidence",
    "EvidenceError",
    "Paired",
    "Exact",
    "Slope",
    "Ratio",
    "Trial",
    "ClaimFunction",
    "claim",
]
