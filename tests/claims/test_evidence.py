"""Evidence is finite, positive where it must be, and survives JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from corollary.claims import EvidenceError, Exact, Paired, Ratio, Slope
from corollary.claims.evidence import evidence_from_dict


def test_values() -> None:
    assert Paired(torch.tensor(2.0), np.float32(0.5)).value == 1.5
    assert Exact(torch.tensor([1e-3, 2e-3])).value == pytest.approx(2e-3)
    assert Ratio(1, 4).value == 0.25
    assert Slope([1, 2, 4], [3, 12, 48]).value == pytest.approx(2.0)


@pytest.mark.parametrize(
    "evidence", [Paired(1, 2), Exact(0.5), Exact(float("nan")), Ratio(1, 2), Slope([1, 2, 3], [1, 2, 4])], ids=str
)
def test_round_trip(evidence: Paired | Exact | Ratio | Slope) -> None:
    assert evidence_from_dict(json.loads(json.dumps(evidence.to_dict(), allow_nan=False))) == evidence


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Paired(float("nan"), 1), "'ours' is nan"),
        (lambda: Paired(1, float("inf")), "'baseline' is inf"),
        (lambda: Paired([1, 2], 1), "'ours' must be one number"),
        (lambda: Exact([]), "is empty"),
        (lambda: Exact(-1), "never negative"),
        (lambda: Ratio(0, 1), "'ours' must be above 0"),
        (lambda: Ratio(1, float("nan")), "'baseline' is nan"),
        (lambda: Slope([1, 2], [1, 2]), "at least 3 different x"),
        (lambda: Slope([1, 2, 3], [1, 2]), "as many y as x"),
        (lambda: Slope([1, 2, 3], [1, 2, 0]), "must be positive"),
    ],
)
def test_what_is_no_evidence(make: object, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        make()
