"""Generated click logs: log-odds against loops over fields, ids against their power law, clicks against their probabilities."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from corollary.data import ClickLog, click_log


def draw(rows: int = 20_000, seed: int = 0, **settings: object) -> ClickLog:
    return click_log(rows, (50, 20, 6), generator=torch.Generator().manual_seed(seed), **settings)


def test_log_odds_are_sums_over_fields_and_pairs() -> None:
    log = draw(50, latent=3, decay=1.0)
    for ids, logit in zip(log.ids.tolist(), log.logits.tolist(), strict=True):
        true = log.intercept + sum(float(log.main[f][i]) for f, i in enumerate(ids))
        for f, g in combinations(range(3), 2):
            true += float(log.factors[f][ids[f]] @ log.factors[g][ids[g]])
        assert logit == pytest.approx(true, abs=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_ids_follow_their_power_law(exponent: float) -> None:
    log = draw(exponent=exponent)
    for column, size in zip(log.ids.unbind(1), log.field_sizes, strict=True):
        expected = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
        expected = expected / expected.sum() * len(log)
        counts = torch.bincount(column, minlength=size).double()
        assert ((counts - expected).square() / expected).sum() < size + 5 * (2 * size) ** 0.5  # chi-squared and its spread


def test_clicks_come_at_the_rate_and_as_the_log_odds_say() -> None:
    log = draw(rate=0.3)
    assert float(torch.sigmoid(log.logits).mean()) == pytest.approx(0.3, abs=1e-4)
    for part in log.logits.argsort().chunk(8):
        said, seen = torch.sigmoid(log.logits[part]).mean(), log.clicks[part].mean()
        assert abs(float(said - seen)) < 4 * (0.25 / len(part)) ** 0.5


@pytest.mark.parametrize(("main", "interaction"), [(1.0, 0.0), (0.0, 1.5), (0.7, 1.0)])
def test_effects_have_the_size_that_was_asked_for(main: float, interaction: float) -> None:
    found = [draw(2_000, seed, exponent=0.0, latent=4, decay=1.0, main=main, interaction=interaction) for seed in range(20)]
    variance = sum(float(log.logits.var()) for log in found) / len(found)
    assert variance == pytest.approx(main**2 + interaction**2, rel=0.25)


def test_coordinates_decay() -> None:
    log = click_log(10, (4_000, 4_000), latent=4, decay=1.0, generator=torch.Generator().manual_seed(0))
    variances = log.factors[0].var(0)
    torch.testing.assert_close(variances / variances[0], 1 / torch.arange(1.0, 5), rtol=0.15, atol=0)


def test_seeded_and_sliced() -> None:
    log, again = draw(100), draw(100)
    assert torch.equal(log.ids, again.ids)
    assert torch.equal(log.clicks, again.clicks)
    part = log[20:50]
    assert len(part) == 30
    assert torch.equal(part.logits, log.logits[20:50])
    assert part.field_sizes == (50, 20, 6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": 0}, "'rows'"),
        ({"field_sizes": (5,)}, "1 fields"),
        ({"field_sizes": (5, 0)}, r"field_sizes\[1\]"),
        ({"rate": 1.0}, "'rate'"),
        ({"latent": 0}, "'latent'"),
        ({"main": -1.0}, "'main'"),
        ({"decay": float("inf")}, "'decay'"),
    ],
)
def test_bad_settings(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        click_log(**({"rows": 10, "field_sizes": (5, 4)} | given))
