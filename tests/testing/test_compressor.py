"""The compressors' checks on a compressor that is right, and on one broken for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from corollary.compress import CompressConfig, LowRank
from corollary.compress.base import Place, Replacement
from corollary.testing import Case, check_compressor
from corollary.testing.compressor import CHECKS


def oracle(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray, settings: LowRank, rank: int) -> np.ndarray:
    _, vectors = np.linalg.eigh(weight @ (x.T @ x) @ weight.T)
    leading = vectors[:, ::-1][:, :rank]
    return x @ (leading @ (leading.T @ weight)).T + (0 if bias is None else bias)


@dataclass(frozen=True)
class Right(LowRank):
    rank: float | None = 0.4
    metric: str = "inputs"
    damping: float = 0.0


def case(kind: type[CompressConfig] = Right, **tags: Any) -> Case:
    return Case(kind, {"oracle": oracle, "kinds": ("linear",), **tags})


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_right(check: Callable[[Case], None], kind: str) -> None:
    check(case(kinds=(kind,)))


def test_public_entry() -> None:
    with pytest.raises(ValueError, match="oracle"):
        check_compressor(Right)


def edited(name: str, edit: Callable[[Place, Replacement], Replacement | None]) -> type[CompressConfig]:
    """`Right` with its replacements changed by ``edit``."""

    def replace(self: Any, place: Place, choice: int) -> Replacement:
        new = Right.replace(self, place, choice)
        return edit(place, new) or new

    return dataclass(frozen=True)(type(name, (Right,), {"replace": replace, "__module__": __name__}))


def fail(check: str, kind: type[CompressConfig], words: str, **tags: Any) -> None:
    with pytest.raises(AssertionError, match=words):
        CHECKS[check](case(kind, **tags))


def in_place(place: Place, new: Replacement, change: Callable[[torch.Tensor], Any]) -> None:
    with torch.no_grad():
        change(new.module.up.weight)


def test_wrong_factors() -> None:
    fail("oracle", edited("WrongFactors", lambda p, n: in_place(p, n, lambda w: w.mul_(1.1))), "oracle's")


def test_leaves_all_dense() -> None:
    @dataclass(frozen=True)
    class Lazy(Right):
        def choose(self, places: Sequence[Place]) -> list[None]:
            return [None] * len(places)

    fail("oracle", Lazy, "dense")
    fail("works", Lazy, "nothing was compressed")


def test_output_not_finite() -> None:
    fail("works", edited("Infinite", lambda p, n: in_place(p, n, lambda w: w.fill_(torch.inf))), "not finite")


def test_writes_into_the_model() -> None:
    model_layers: list[nn.Module] = []

    @dataclass(frozen=True)
    class Meddling(Right):
        @property
        def calibrated(self) -> bool:
            import gc

            for found in gc.get_objects():
                if type(found) is nn.Linear and found.weight.shape == (16, 24) and not found.training:
                    found.weight.data.add_(1e-3)
                    model_layers.append(found)
            return True

    fail("input_untouched", Meddling, "changed|shares")
    assert model_layers


def test_wrong_bytes() -> None:
    def grow(place: Place, new: Replacement) -> None:
        new.module.register_buffer("ballast", torch.zeros(1000))

    fail("report", edited("Growing", grow), "of their bytes")
    CHECKS["report"](case(edited("GrowingSaidSo", grow), smaller=False))


def test_negative_error() -> None:
    fail("report", edited("Boasting", lambda p, n: dataclasses.replace(n, error=-1.0)), "errs by -1")


def test_error_of_another_metric() -> None:
    fail(
        "error_is_measured", edited("Flattering", lambda p, n: dataclasses.replace(n, error=(n.error or 0) / 2)), "report says"
    )
    fail("error_is_measured", edited("Silent", lambda p, n: dataclasses.replace(n, error=None)), "reports no error")


def test_spec_that_builds_something_else() -> None:
    def forget(place: Place, new: Replacement) -> Replacement:
        return dataclasses.replace(new, spec={**new.spec, "rank": new.spec["rank"] + 1})

    with pytest.raises((AssertionError, ValueError)):
        CHECKS["save_and_load"](case(edited("Forgetful", forget)))


def test_accepts_broken_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import corollary.testing.compressor as checks

    monkeypatch.setattr(checks, "load", lambda path, model: model)
    fail("broken_files", Right, "was accepted")


def test_draws_from_the_global_state() -> None:
    fail("deterministic", edited("Drawing", lambda p, n: in_place(p, n, lambda w: w.add_(1e-3 * torch.rand_like(w)))), "moved")


def test_draws_differently_each_time() -> None:
    count = [0]

    def drift(place: Place, new: Replacement) -> None:
        count[0] += 1
        in_place(place, new, lambda w: w.add_(1e-3 * count[0]))

    fail("deterministic", edited("Drifting", drift), "differs between two runs")


def test_looks_at_how_much_data_came() -> None:
    count = [0]

    def drift(place: Place, new: Replacement) -> None:
        count[0] += 1
        in_place(place, new, lambda w: w.mul_(1 + count[0]))

    fail("streams", edited("Counting", drift), "in parts")


def test_takes_no_calibration_and_does_not_say_so() -> None:
    @dataclass(frozen=True)
    class Careless(Right):
        called: ClassVar = [0]

        @property
        def calibrated(self) -> bool:  # true where the check asks, false where compress does
            self.called[0] += 1
            return self.called[0] % 2 == 1

    fail("needs_calibration", Careless, "was accepted|ended in")


def test_accepts_targets_that_it_must_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    import corollary.testing.compressor as checks

    monkeypatch.setattr(checks, "compress", lambda *a, **k: a[0])
    fail("bad_input", Right, "was accepted")


def test_another_dtype() -> None:
    fail(
        "dtype", edited("Widening", lambda p, n: dataclasses.replace(n, module=n.module.double())), "float64, not|Double|dtype"
    )


def test_detached_parameters() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.down.weight.detach()), self.up.weight)

    def detach(place: Place, new: Replacement) -> None:
        new.module.__class__ = Detached

    fail("trains", edited("Detaching", detach), "no gradient")


def test_graph_break() -> None:
    class Breaking(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    def broken(place: Place, new: Replacement) -> None:
        new.module.__class__ = Breaking

    fail("compiled", edited("Breaking", broken), "compile failed")
    CHECKS["compiled"](case(edited("BreakingSaidSo", broken), compile=None))
