"""Measurements with a known truth."""

import numpy as np

from corollary.claims import Exact, Paired, Ratio, Slope, Trial, claim


@claim(control={"gain": 0.0})
def better(trial: Trial, gain: float = 1.0) -> Paired:
    noise = trial.rng.normal(size=2) * 0.3
    trial.log(noise=float(noise[0]), missing=float("nan"))
    trial.figure("curve", x=[1, 2], y={"ours": [3, 4]})
    return Paired(ours=1.0 - gain + noise[0], baseline=1.0 + noise[1])


@claim(control={"power": 1})
def identity(trial: Trial, power: int = 2) -> Exact:
    x = trial.rng.uniform(0, 3, size=50)
    return Exact(np.abs(np.sin(x) ** 2 + np.cos(x) ** power - 1))


@claim(control={"exponent": 2.0})
def linear(trial: Trial, exponent: float = 1.0) -> Slope:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    return Slope(x, x**exponent * np.exp(trial.rng.normal(size=4) * 0.01))


@claim(control={"cost": 1.0})
def cheaper(trial: Trial, cost: float = 0.4) -> Ratio:
    return Ratio(ours=cost * np.exp(trial.rng.normal() * 0.01), baseline=1.0)


def _search(trial: Trial, sign: float = 1.0) -> dict[str, float]:
    grid = [0.1, 1.0, 10.0]
    return {"lr": min(grid, key=lambda lr: sign * abs(np.log(lr) + trial.rng.normal() * 0.01))}


@claim(control={"sign": -1.0}, tune=_search)
def tuned(trial: Trial, sign: float = 1.0) -> Paired:
    return Paired(ours=abs(np.log(trial.tuned["lr"])) + trial.rng.uniform(0, 0.1), baseline=1.0)
