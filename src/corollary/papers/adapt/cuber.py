"""How CUBER's claims are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt import CUBER, EWC, GPM, ContinualLearner
from corollary.claims import Exact, Paired, Trial, claim
from corollary.data import digits
from corollary.models import MLP
from corollary.testing import Case

CONFORMANCE = {
    "corollary.adapt.CUBER": Case(
        CUBER, tags={"options": ({}, {"threshold": 0.9, "min_projection": 0.3, "project": "update"}, {"exclude": ["5"]})}
    ),
    "corollary.adapt.GPM": Case(GPM, tags={"options": ({}, {"threshold": 1.0, "project": "update"}, {"exclude": ["5"]})}),
    "corollary.adapt.EWC": Case(EWC, tags={"options": ({"strength": 5.0}, {"strength": 1.0, "chunk": 5})}),
}

# ---------------------------------------------------------------------------------------------------------- controls


class OpensEverything(CUBER):
    """A control: no condition is asked, and nothing holds the layers back."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **{**options, "min_projection": 0.0, "min_correlation": -1.0, "regularization": 0.0})


class OpensTheWrong(CUBER):
    """A control: of the tasks with sufficient projection, those are opened whose gradient does *not* agree."""

    def _compare(self, name: str, gradient: Tensor) -> Tensor:
        right = super()._compare(name, gradient)
        return torch.where(right == 1, right, 5 - right)


class OnTheSameBases(GPM):
    """GPM whose bases grow by the rule that CUBER has from TRGP: CUBER that opens nothing, and a kind of GPM for tuning to choose."""

    _choose = CUBER._choose


METHODS: dict[str, Callable[..., ContinualLearner]] = {
    "GPM": GPM,
    "GPM on TRGP's bases": OnTheSameBases,
    "EWC": EWC,
    "CUBER": CUBER,
    "opens everything": OpensEverything,
    "opens the wrong": OpensTheWrong,
}

# --------------------------------------------------------------------------------------------------------- sequences


@dataclass(frozen=True)
class Task:
    """Samples of one task; ``classes`` where the task's identity is known when testing, so that only they can be answered."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[int, ...] = ()

    def logits(self, net: nn.Module, x: Tensor) -> Tensor:
        """The net's answer, among the task's classes."""
        out: Tensor = net(x)
        if not self.classes:
            return out
        mask = out.new_full((out.shape[1],), -torch.inf)
        mask[list(self.classes)] = 0
        return out + mask

    def losses(self, net: nn.Module, rows: Tensor | slice = slice(None)) -> Tensor:
        """One training loss for each sample."""
        return F.cross_entropy(self.logits(net, self.train_x[rows]), self.train_y[rows], reduction="none")

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Share of the test part that is told right."""
        return float((self.logits(net, self.test_x).argmax(1) == self.test_y).double().mean())


COUNTS = {"related": 10, "permuted": 5, "split": 5}
"""tasks of a sequence"""
SIZES = {"related": 60, "permuted": 300, "split": 200}
"""training samples of a task"""
EPOCHS = {"related": 30, "permuted": 30, "split": 20}
RATES = {"related": 0.2, "permuted": 0.1, "split": 0.1}
DEGREES = 4.0


def _rotated(x: Tensor, degrees: float) -> Tensor:
    images = x.view(-1, 8, 8).numpy()
    return torch.from_numpy(ndimage.rotate(images, degrees, axes=(1, 2), reshape=False, order=1)).view(len(x), -1).float()


@lru_cache(maxsize=8)
def sequence(kind: str, seed: int) -> tuple[Task, ...]:
    """Tasks from the digits: 'permuted' pixels, 'split' into pairs of classes, or 'related': new samples, a little turned."""
    data = digits(seed=seed % 2**31, flat=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_x), generator=generator)
    size, tasks = SIZES[kind], []
    for t in range(COUNTS[kind]):
        if kind == "related":
            rows = order[t * size : (t + 1) * size]
            train, test = (_rotated(x, DEGREES * t) for x in (data.train_x[rows], data.test_x))
            tasks.append(Task(train, data.train_y[rows], test, data.test_y))
        elif kind == "permuted":
            pixels = torch.randperm(64, generator=generator) if t else torch.arange(64)
            rows = order[:size]
            tasks.append(Task(data.train_x[rows][:, pixels], data.train_y[rows], data.test_x[:, pixels], data.test_y))
        else:
            pair = (2 * t, 2 * t + 1)
            train_in, test_in = (torch.isin(y, torch.tensor(pair)) for y in (data.train_y, data.test_y))
            tasks.append(
                Task(
                    data.train_x[train_in][:size],
                    data.train_y[train_in][:size],
                    data.test_x[test_in],
                    data.test_y[test_in],
                    pair,
                )
            )
    return tuple(tasks)


Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Result:
    """Accuracy after the last task over all tasks, and what later tasks did to the earlier ones' accuracy, on average."""

    accuracy: float
    backward_transfer: float
    memory_bytes: int
    opened: float


@lru_cache(maxsize=512)
def learn(kind: str, seed: int, method: str, options: Options, short: bool = False) -> Result:
    """Tasks one after the other, by plain SGD with batches of 20, on an MLP of two hidden layers of 64."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    settings = dict(options)
    lr = RATES[kind] * settings.pop("slower", 1.0)
    method = settings.pop("kind", method)
    net = MLP(64, [64, 64], 10)
    if kind == "split" and method != "EWC":
        settings["exclude"] = ("head",)  # a task's rows of it are that task's alone
    learner = METHODS[method](net, **settings)
    tasks = sequence(kind, seed)
    table = np.zeros((len(tasks), len(tasks)))
    regimes: list[int] = []
    for t, task in enumerate(tasks):
        optimizer = torch.optim.SGD(net.parameters(), lr)
        learner.attach(optimizer)
        learner.begin_task(partial(task.losses, net))
        if isinstance(learner, CUBER):
            regimes += [r for row in learner.regimes().values() for r in row]
        for _ in range(2 if short else EPOCHS[kind]):
            for rows in torch.split(torch.randperm(len(task.train_x), generator=generator), 20):
                optimizer.zero_grad()
                task.losses(net, rows).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        if not all(bool(p.isfinite().all()) for p in net.parameters()):
            return Result(0.0, -1.0, learner.memory_bytes(), 0.0)  # a rate or a spring that was too strong
        learner.end_task(partial(task.losses, net))
        table[t, : t + 1] = [old.accuracy(net) for old in tasks[: t + 1]]
    transfer = (table[-1] - table.diagonal())[:-1].mean()
    opened = float(np.mean([r == 3 for r in regimes])) if regimes else 0.0
    return Result(float(table[-1].mean()), float(transfer), learner.memory_bytes(), opened)


# -------------------------------------------------------------------------------------------------------------- tuning

_THRESHOLDS = (0.9, 0.95, 0.98, 0.99)
_GRIDS: dict[str, list[dict[str, Any]]] = {
    "GPM": [{"threshold": t, "kind": k} for t in _THRESHOLDS for k in ("GPM", "GPM on TRGP's bases")],
    "CUBER": [{"threshold": t, "regularization": r} for t in _THRESHOLDS for r in (0.05, 0.3)],
    "EWC": [{"strength": s, "slower": f} for s in (1.0, 3.0, 10.0, 30.0) for f in (0.3, 1.0)],
}
_TUNING_SEEDS = (1_000_003, 1_000_033)


@lru_cache(maxsize=32)
def _tuned(kind: str, method: str, short: bool) -> Options:
    """Of eight settings the one with the best accuracy on two seeds that no trial has."""
    seeds = _TUNING_SEEDS[:1] if short else _TUNING_SEEDS
    grid = [tuple(sorted(setting.items())) for setting in (_GRIDS[method][::4] if short else _GRIDS[method])]
    return max(grid, key=lambda o: sum(learn(kind, seed, method, o, short).accuracy for seed in seeds))


def _tune(kind: str, *methods: str) -> Callable[..., dict[str, Any]]:
    def tune(trial: Trial, **_: Any) -> dict[str, Any]:
        short = trial.scale == "smoke"
        return {method: dict(_tuned(kind, method, short)) for method in ("CUBER", *methods)}

    return tune


def _run(trial: Trial, kind: str, method: str) -> Result:
    settings = trial.tuned[method if method in trial.tuned else "CUBER"]
    found = learn(kind, trial.seed % 2**31, method, tuple(sorted(settings.items())), trial.scale == "smoke")
    if method not in ("GPM", "EWC"):
        trial.log(
            accuracy=found.accuracy,
            backward_transfer=found.backward_transfer,
            opened=found.opened,
            memory_bytes=found.memory_bytes,
        )
    else:
        trial.log(
            baseline_accuracy=found.accuracy, baseline_backward_transfer=found.backward_transfer,
            baseline_memory_bytes=found.memory_bytes,
        )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------- backward transfer


@claim(control={"method": "opens everything"}, tune=_tune("related"))
def positive_backward_transfer(trial: Trial, method: str = "CUBER") -> Paired:
    """Backward transfer on related tasks against none."""
    return Paired(ours=_run(trial, "related", method).backward_transfer, baseline=0.0)


@claim(control={"method": "opens everything"}, tune=_tune("related", "GPM"))
def positive_where_gpm_is_negative(trial: Trial, method: str = "CUBER") -> Paired:
    """The smaller of CUBER's backward transfer and the negative of GPM's: above zero where both have the sign claimed."""
    ours, other = _run(trial, "related", method), _run(trial, "related", "GPM")
    return Paired(ours=min(ours.backward_transfer, -other.backward_transfer), baseline=0.0)


def _transfer(trial: Trial, kind: str, method: str) -> Paired:
    """Against GPM at CUBER's threshold and on its bases: a higher threshold alone forgets less, and would pass for transfer."""
    ours = _run(trial, kind, method)
    settings = (("kind", "GPM on TRGP's bases"), ("threshold", trial.tuned["CUBER"]["threshold"]))
    other = learn(kind, trial.seed % 2**31, "GPM", settings, trial.scale == "smoke")
    trial.log(baseline_accuracy=other.accuracy, baseline_backward_transfer=other.backward_transfer)
    return Paired(ours=ours.backward_transfer, baseline=other.backward_transfer)


@claim(control={"method": "opens the wrong"}, tune=_tune("related"))
def related_transfer_above_gpm(trial: Trial, method: str = "CUBER") -> Paired:
    """Backward transfer against GPM's, on related tasks."""
    return _transfer(trial, "related", method)


@claim(control={"method": "opens everything"}, tune=_tune("permuted"))
def permuted_transfer_above_gpm(trial: Trial, method: str = "CUBER") -> Paired:
    """Backward transfer against GPM's, on permuted digits."""
    return _transfer(trial, "permuted", method)


@claim(control={"method": "opens the wrong"}, tune=_tune("split"))
def split_transfer_above_gpm(trial: Trial, method: str = "CUBER") -> Paired:
    """Backward transfer against GPM's, on split digits."""
    return _transfer(trial, "split", method)


# ------------------------------------------------------------------------------------------------------------- accuracy


def _accuracy(trial: Trial, kind: str, method: str, baseline: str) -> Paired:
    ours, other = _run(trial, kind, method), _run(trial, kind, baseline)
    return Paired(ours=ours.accuracy, baseline=other.accuracy)


@claim(control={"method": "opens the wrong"}, tune=_tune("related", "GPM"))
def related_accuracy_above_gpm(trial: Trial, method: str = "CUBER") -> Paired:
    """Final accuracy against GPM's, on related tasks."""
    return _accuracy(trial, "related", method, "GPM")


@claim(control={"method": "opens everything"}, tune=_tune("permuted", "GPM"))
def permuted_accuracy_above_gpm(trial: Trial, method: str = "CUBER") -> Paired:
    """Final accuracy against GPM's, on permuted digits."""
    return _accuracy(trial, "permuted", method, "GPM")


@claim(control={"method": "opens the wrong"}, tune=_tune("split", "GPM"))
def split_accuracy_above_gpm(trial: Trial, method: str = "CUBER") -> Paired:
    """Final accuracy against GPM's, on split digits."""
    return _accuracy(trial, "split", method, "GPM")


@claim(control={"method": "opens everything"}, tune=_tune("related", "EWC"))
def related_accuracy_above_ewc(trial: Trial, method: str = "CUBER") -> Paired:
    """Final accuracy against EWC's, on related tasks."""
    return _accuracy(trial, "related", method, "EWC")


@claim(control={"method": "opens everything"}, tune=_tune("permuted", "EWC"))
def permuted_accuracy_above_ewc(trial: Trial, method: str = "CUBER") -> Paired:
    """Final accuracy against EWC's, on permuted digits."""
    return _accuracy(trial, "permuted", method, "EWC")


@claim(control={"method": "opens everything"}, tune=_tune("split", "EWC"))
def split_accuracy_above_ewc(trial: Trial, method: str = "CUBER") -> Paired:
    """Final accuracy against EWC's, on split digits."""
    return _accuracy(trial, "split", method, "EWC")


# ------------------------------------------------------------------------------------------------------------- identity


@claim(control={"method": "opens everything"})
def protected_outputs_unchanged(trial: Trial, method: str = "CUBER") -> Exact:
    """Change of a layer's outputs on its inputs in a task that was not opened, after steps on another."""
    worst = 0.0
    for _ in range(4):
        inputs, outputs = (int(trial.rng.integers(4, 12)) for _ in range(2))
        layer = nn.Linear(inputs, outputs).double()
        first, second = (torch.randn(inputs // 2, inputs, generator=trial.generator, dtype=torch.float64) for _ in range(2))
        learner = METHODS[method](layer, threshold=1.0, min_projection=1.0)
        learner.end_task(lambda x=first, net=layer: net(x).square())  # type: ignore[misc]
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        learner.attach(optimizer)
        learner.begin_task(lambda x=second, net=layer: (net(x) - 1).square())  # type: ignore[misc]
        before = layer(first).detach()
        for _ in range(20):
            optimizer.zero_grad()
            (layer(second) - 1).square().sum().backward()
            optimizer.step()
        worst = max(worst, float((layer(first) - before).detach().abs().max()))
    return Exact(worst)
