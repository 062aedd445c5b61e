"""M-FAC (arXiv 2107.03356): how its claims are measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from corollary.claims import Exact, Paired, Slope, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory, peak_bytes
from corollary.data import Split, digits, hidden_states, minilm, stdlib_text
from corollary.linalg import per_sample_gradients
from corollary.linalg.fisher import gram_matrix
from corollary.models import MLP, ResNet
from corollary.optim import MFAC, MatrixFreeFisher, SlidingFisher, mfac_prune
from corollary.optim.m_fac_pruning import obs_step
from corollary.testing import Case, Problem
from corollary.testing.optimizer import separable

# --------------------------------------------------------------------------------------------------------- conformance


def oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    ngrads: int = 5,
    damp: float = 0.5,
) -> list[list[NDArray[np.float64]]]:
    """M-FAC with the whole inverse, built up from λ⁻¹ I by one rank-one term for each gradient of the window."""
    shapes = [p.shape for p in problem.start]
    places = np.cumsum([p.size for p in problem.start])[:-1]
    theta = np.concatenate([p.ravel() for p in problem.start])
    window, mean, path = np.zeros((ngrads, theta.size)), np.zeros_like(theta), []
    for t in range(steps):
        params = [part.reshape(shape) for part, shape in zip(np.split(theta, places), shapes, strict=True)]
        gradient = np.concatenate([g.ravel() for g in problem.gradient(params)]) + weight_decay * theta
        window[t % ngrads] = gradient
        inverse = np.eye(theta.size) / damp
        for g in window:
            product = inverse @ g
            inverse -= np.outer(product, product) / (ngrads + g @ product)
        mean = momentum * mean + (1 - momentum) * (inverse @ gradient)
        theta = theta - lr * mean
        path.append([part.reshape(shape) for part, shape in zip(np.split(theta, places), shapes, strict=True)])
    return path


def small_mfac(params: Any, **options: Any) -> MFAC:
    """A window that the conformance checks fill and slide."""
    return MFAC(params, **{"lr": 0.1, "ngrads": 5, "damp": 0.5, **options})


def coupled() -> Problem:
    """Parameters influence each other through the Fisher matrix, even where the loss is a sum over entries."""
    return dataclasses.replace(separable(), separable=False)


def _everything(gradients: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inverse = MatrixFreeFisher(gradients, 0.3, block_size=4)
    return inverse.solve(x), inverse.inverse_diagonal(), inverse.inverse_element(0, torch.arange(len(x), device=x.device))


def _slide(gradients: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    fisher = SlidingFisher([torch.zeros_like(gradients[:2], memory_format=torch.contiguous_format)], 0.3)
    for i, gradient in enumerate(gradients):
        fisher.update(i % 2, [gradient])
    return fisher.solve([x])[0], fisher.solve_row(0)[0]


def _prune_linear(weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    layer = nn.utils.skip_init(nn.Linear, 1, 1, bias=False)  # type: ignore[no-untyped-call]  # draws nothing
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.is_floating_point())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0].to(weight.dtype)), batch[1])

    masks = mfac_prune(layer, batches, loss, 0.5, damp=0.1)
    return layer.weight.detach(), masks["weight"]


def _draw_gradients(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 10, generator=generator).to(dtype), torch.randn(10, generator=generator).to(dtype)


def _draw_layer(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    batches = [(torch.randn(1, 6, generator=generator), torch.tensor([i % 4])) for i in range(12)]
    return torch.randn(4, 6, generator=generator).to(dtype), batches


_WIDE = (torch.float32, torch.float64)
CONFORMANCE = {
    "corollary.optim.MFAC": Case(
        small_mfac,
        tags={
            "oracle": oracle,
            "options": (
                {},
                {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
                {"ngrads": 1, "damp": 1e-3, "lr": 1e-3},
                {"ngrads": 20, "damp": 1e-2, "lr": 0.01},
            ),
            "problem": coupled,
            "half_state": "float32",
            "wide_state": ("gram",),
            "nan": "raises",
        },
    ),
    "corollary.optim.MatrixFreeFisher": Case(
        lambda: _everything, tags={"inputs": _draw_gradients, "batched": False, "differentiable": False}
    ),
    "corollary.optim.SlidingFisher": Case(
        lambda: _slide, tags={"inputs": _draw_gradients, "batched": False, "differentiable": False, "dtypes": _WIDE}
    ),
    "corollary.optim.mfac_prune": Case(
        lambda: _prune_linear, tags={"inputs": _draw_layer, "batched": False, "differentiable": False, "dtypes": _WIDE}
    ),
}


# ------------------------------------------------------------------------------------------------------------ exactness


def _network_gradients(trial: Trial, hidden: int, m: int) -> Tensor:
    """Gradients of single digits in float64, at a network's start: their scale and their dependence are real ones."""
    data = digits(seed=trial.seed, flat=True).to(dtype=torch.float64)
    net = MLP(64, [hidden], 10).double()
    return per_sample_gradients(net, cross_entropy, data.train_x[:m], data.train_y[:m])


def _dense_inverse(gradients: Tensor, damp: float) -> Tensor:
    fisher = (gradients.T @ gradients).div_(len(gradients))
    fisher.diagonal().add_(damp)
    inverse: Tensor = torch.linalg.inv(fisher)
    return inverse


def _worst(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).abs().max() / exact.abs().max())


def _lone_terms(gradients: Tensor, damp: float, x: Tensor) -> Tensor:
    """The control: every gradient's rank-one term taken off 1/λ alone, as if the others were not there."""
    weights = (gradients @ x) / (len(gradients) * damp + gradients.square().sum(1))
    return (x - gradients.T @ weights) / damp


@claim(control={"lone": True})
def static_equals_dense(trial: Trial, lone: bool = False) -> Exact:
    """Products, diagonal and elements of the static algorithm against the inverse of the whole matrix."""
    hidden, m = trial.pick(smoke=3, laptop=27), trial.pick(smoke=20, laptop=128)
    damp = 1e-4
    gradients = _network_gradients(trial, hidden, m)
    exact = _dense_inverse(gradients, damp)
    x = torch.randn(gradients.shape[1], dtype=torch.float64, generator=trial.generator)
    inverse = MatrixFreeFisher(gradients, damp)
    trial.log(d=gradients.shape[1], m=m)
    if lone:
        return Exact(_worst(_lone_terms(gradients, damp, x), exact @ x))
    i, j = torch.randint(len(x), (2, 1000), generator=trial.generator)
    narrow = MatrixFreeFisher(gradients.float(), damp).solve(x.float()).double()
    trial.log(float32_error=_worst(narrow, exact @ x))
    return Exact(
        [
            _worst(inverse.solve(x), exact @ x),
            _worst(inverse.solve(gradients[0]), exact @ gradients[0]),
            _worst(inverse.inverse_diagonal(), exact.diagonal()),
            _worst(inverse.inverse_element(i, j), exact[i, j]),
        ]
    )


class StaleFisher(SlidingFisher):
    """The control: the window slides, and the scalar products stay those of the gradients that were there before."""

    def update(self, row: int, gradients: Sequence[Tensor | None]) -> None:
        gram = self.gram.clone()
        super().update(row, gradients)
        if gram.diagonal().all():  # not before the window is full: scalar products of zero are none at all
            self.gram.copy_(gram)
            self._factor = None


@claim(control={"method": StaleFisher})
def dynamic_equals_dense(trial: Trial, method: type[SlidingFisher] = SlidingFisher) -> Exact:
    """Products of the dynamic algorithm, after the window has slid by half its length, against the inverse of the whole matrix."""
    hidden, m = trial.pick(smoke=3, laptop=27), trial.pick(smoke=20, laptop=128)
    damp = 1e-4
    gradients = _network_gradients(trial, hidden, m + m // 2)
    fisher = method([torch.zeros_like(gradients[:m])], damp)
    window = torch.zeros_like(gradients[:m])
    for step, gradient in enumerate(gradients):
        fisher.update(step % m, [gradient])
        window[step % m] = gradient
    exact = _dense_inverse(window, damp)
    x = torch.randn(gradients.shape[1], dtype=torch.float64, generator=trial.generator)
    trial.log(d=gradients.shape[1], m=m)
    last = (len(gradients) - 1) % m
    errors = [_worst(fisher.solve([x])[0], exact @ x), _worst(fisher.solve_row(last)[0], exact @ window[last])]
    return Exact(errors)


# ----------------------------------------------------------------------------------------------------------------- cost


def _rounds(trial: Trial) -> int:
    return trial.pick(smoke=2, laptop=9)


def _dense_cost(trial: Trial, work: Callable[[Tensor, Tensor], object]) -> Slope:
    """The control of growth in d: the same work on a matrix of d × d numbers, at sizes where it fits in memory."""
    keep_freed_memory()
    sizes = trial.pick(smoke=(200, 400, 800), laptop=(4000, 5600, 8000))
    matrix = torch.empty(sizes[-1] ** 2).uniform_(generator=trial.generator)
    cases = {}
    for d in sizes:
        inverse, x = matrix[: d * d].view(d, d), torch.ones(d)
        cases[str(d)] = lambda inverse=inverse, x=x: work(inverse, x)
    seconds = interleave(cases, rounds=_rounds(trial))
    return Slope(x=sizes, y=[seconds[str(d)] for d in sizes])


def _sizes(trial: Trial) -> tuple[int, ...]:
    """All beyond the processor's cache, so that one slope holds for them."""
    return trial.pick(
        smoke=(2**12, 2**13, 2**14),
        laptop=(2**18, 2**19, 2**20, 2**21),
        full=(2**18, 2**20, 2**22, 10_000_000),
    )


@lru_cache(maxsize=4)
def _inverse(d: int, device: str) -> MatrixFreeFisher:
    """Set up once for all trials: that takes longer than they do, and a product's time does not depend on the numbers in it."""
    gradients = torch.empty(64, d, device=device).uniform_(-1, 1)
    return MatrixFreeFisher(gradients, 1e-2, in_place=True)


@claim(control=lambda trial: _dense_cost(trial, lambda inverse, x: inverse @ x))
def product_cost(trial: Trial) -> Slope:
    """Seconds of one product of the static algorithm over d, with m = 64 in float32."""
    keep_freed_memory()
    sizes = _sizes(trial)
    cases = {}
    for d in sizes:
        inverse, x = _inverse(d, trial.device), torch.ones(d, device=trial.device)
        cases[str(d)] = lambda inverse=inverse, x=x: inverse.solve(x)
    seconds = interleave(cases, rounds=_rounds(trial))
    y = [seconds[str(d)] for d in sizes]
    trial.figure("product", x=sizes, y={"seconds": y}, xlabel="parameters", ylabel="seconds", log="xy")
    return Slope(x=sizes, y=y)


@lru_cache(maxsize=1)
def _buffer(entries: int, device: str) -> Tensor:
    """Room that the timings share: filling it takes longer than they do, and they do not depend on what is in it."""
    return torch.empty(entries, device=device).uniform_(-1, 1)


def _window(trial: Trial, m: int, d: int, room: int) -> SlidingFisher:
    return SlidingFisher([_buffer(room, trial.device)[: m * d].view(m, d)], 1.0)


def _rank_one_update(inverse: Tensor, x: Tensor) -> None:
    product = inverse @ x
    inverse.addr_(product, product, alpha=-1e-12)


@claim(control=lambda trial: _dense_cost(trial, _rank_one_update))
def update_cost_in_d(trial: Trial) -> Slope:
    """Seconds to exchange one of m = 64 gradients, over d."""
    keep_freed_memory()
    sizes = _sizes(trial)
    windows = {d: _window(trial, 64, d, 64 * sizes[-1]) for d in sizes}
    fresh = torch.empty(sizes[-1], device=trial.device).uniform_(-1, 1)
    seconds = interleave(
        {str(d): lambda d=d: windows[d].update(0, [fresh[:d]]) for d in sizes},  # type: ignore[misc]
        rounds=_rounds(trial),
    )
    y = [seconds[str(d)] for d in sizes]
    trial.figure("update", x=sizes, y={"seconds": y}, xlabel="parameters", ylabel="seconds", log="xy")
    return Slope(x=sizes, y=y)


@claim(control={"anew": True})
def update_cost_in_m(trial: Trial, anew: bool = False) -> Slope:
    """Seconds to exchange one gradient over m, where d is so large that d m decides and not m³."""
    keep_freed_memory()
    d, sizes = trial.pick(smoke=2**12, laptop=2**20), trial.pick(smoke=(4, 8, 16), laptop=(16, 32, 64))
    windows = {m: _window(trial, m, d, sizes[-1] * d) for m in sizes}
    fresh = torch.empty(d, device=trial.device).uniform_(-1, 1)

    def update(m: int) -> None:
        if anew:  # the control: all scalar products at every step, instead of the new gradient's alone
            windows[m].gram.copy_(gram_matrix(windows[m].windows[0]))
        windows[m].update(0, [fresh])

    seconds = interleave({str(m): lambda m=m: update(m) for m in sizes}, rounds=1 if anew else _rounds(trial))  # type: ignore[misc]
    return Slope(x=sizes, y=[seconds[str(m)] for m in sizes])


@claim(control={"anew": True})
def update_cost_at_most_cubed(trial: Trial, anew: bool = False) -> Slope:
    """Seconds to exchange one gradient over m, where d is so small that m³ decides."""
    keep_freed_memory()
    d, sizes = 256, trial.pick(smoke=(32, 64, 128), laptop=(512, 1024, 1536))
    windows = {m: SlidingFisher([torch.randn(m, d, generator=trial.generator)], 1.0) for m in sizes}
    fresh = torch.randn(d, generator=trial.generator)
    seconds = interleave(
        {str(m): lambda m=m: windows[m].update(0, [fresh]) for m in sizes},  # type: ignore[misc]
        rounds=trial.pick(smoke=2, laptop=5),
    )
    # The control enters the whole window anew: m exchanges, which all cost the same, so that one is timed.
    return Slope(x=sizes, y=[seconds[str(m)] * (m if anew else 1) for m in sizes])


@claim(control={"in_place": False})
def memory_at_ten_million(trial: Trial, in_place: bool = True) -> Exact:
    """Peak bytes of setting up and of a product, gradients included, beyond 1.2 times those of the gradients."""
    d, m = trial.pick(smoke=100_000, laptop=10_000_000), trial.pick(smoke=8, laptop=64)
    error: list[float] = []

    def work() -> None:
        gradients = torch.full((m, d), 0.5)
        gradients[:, ::2] = 0.25
        gradients.diagonal().add_(1)  # cheap to fill, and of full rank
        inverse = MatrixFreeFisher(gradients, 1e-2, in_place=in_place)
        x = torch.zeros(d)
        x[m:] = torch.where(torch.arange(m, d) % 2 == 0, 2.0, -1.0)  # orthogonal to all gradients, so F⁻¹ x = x / λ
        error.append(float((inverse.solve(x) * 1e-2 - x).abs().max()))

    peak = peak_bytes(work)
    trial.log(d=d, m=m, bytes=peak, ratio=peak / (4 * m * d), product_error=error[0])
    return Exact([max(0.0, peak / (4 * m * d) - 1.2), error[0]])


# -------------------------------------------------------------------------------------------------------------- pruning

DAMPS = (1e-5, 1e-4, 1e-3, 1e-2)
PARTS = 4  # recomputations of the gradients on the way to a sparsity, for M-FAC and for the diagonal alike


def _misplaced(rows: Tensor, seed: int) -> Tensor:
    """The control: the gradients' entries dealt to the weights in a wrong order, the same for all, so that sizes stay right."""
    return rows[:, torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))]


def _least(saliency: Tensor, count: int) -> Tensor:
    removed = torch.zeros_like(saliency, dtype=torch.bool)
    removed[saliency.argsort(stable=True)[:count]] = True
    return removed


def _prune_step(
    method: str, weight: Tensor, rows: Tensor, count: int, damp: float, seed: int, block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Remove ``count`` weights by M-FAC, by its control or by the diagonal of the same Fisher matrix."""
    if method == "diagonal":
        removed = _least(weight.square() * (rows.square().mean(0) + damp), count)
        return weight.masked_fill(removed, 0), removed
    if method == "misplaced":
        rows = _misplaced(rows, seed)
    return obs_step(weight, rows, count, damp, block_size=block_size)


class DigitsPruning:
    """A small network trained on digits, and what is left of it at a sparsity."""

    def __init__(self, seed: int, steps: int, m: int) -> None:
        torch.manual_seed(seed)
        self.data: Split = digits(seed=seed, flat=True)
        self.net = MLP(64, [40, 20], len(self.data.classes))
        self.m, self.seed = m, seed
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
        for _ in range(steps):
            rows = torch.randint(len(self.data.train_x), (64,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(self.net(self.data.train_x[rows]), self.data.train_y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
        self.names = [name for name, p in self.net.named_parameters() if p.dim() > 1]
        self.dense = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.sample = torch.randperm(len(self.data.train_x), generator=generator)[:m]

    def load(self, weight: Tensor) -> None:
        sizes = [self.dense[name].numel() for name in self.names]
        with torch.no_grad():
            for name, piece in zip(self.names, torch.split(weight, sizes), strict=True):
                self.net.get_parameter(name).copy_(piece.view_as(self.dense[name]))

    def rows(self) -> Tensor:
        x, y = self.data.train_x[self.sample], self.data.train_y[self.sample]
        return per_sample_gradients(
            self.net, cross_entropy, x, y, params={n: self.net.get_parameter(n) for n in self.names}, chunk=128
        )

    def prune(self, method: str, choice: Any, sparsity: float) -> dict[str, float]:
        """Test accuracy and loss; ``choice`` is the damping, or for magnitudes whether they are compared over all layers."""
        weight = torch.cat([self.dense[name].reshape(-1) for name in self.names])
        if method == "magnitude":
            if choice == "global":
                weight = weight.masked_fill(_least(weight.abs(), round(sparsity * len(weight))), 0)
            else:
                pieces = [self.dense[name].reshape(-1) for name in self.names]
                weight = torch.cat([p.masked_fill(_least(p.abs(), round(sparsity * len(p))), 0) for p in pieces])
        else:
            alive = torch.ones(len(weight), dtype=torch.bool)
            for part in range(1, PARTS + 1):
                left = round((1 - sparsity) ** (part / PARTS) * len(weight))
                self.load(weight)
                kept, removed = _prune_step(
                    method, weight[alive], self.rows()[:, alive], int(alive.sum()) - left, choice, self.seed
                )
                weight[alive] = kept
                alive[alive.clone()] = ~removed
                weight[~alive] = 0
        self.load(weight)
        with torch.no_grad():
            out = self.net(self.data.test_x)
            accuracy = float((out.argmax(1) == self.data.test_y).double().mean())
            return {"accuracy": accuracy, "loss": float(cross_entropy(out, self.data.test_y))}


@lru_cache(maxsize=64)
def _digits_pruning(seed: int, scale: str) -> DigitsPruning:
    return DigitsPruning(seed, 20 if scale == "smoke" else 400, 32 if scale == "smoke" else 512)


def _tune_digits(trial: Trial, method: str, sparsity: float, metric: str) -> dict[str, Any]:
    """Each method's choice by its result on networks and data splits that no trial uses."""
    networks = [_digits_pruning(trial.seed + i, trial.scale) for i in range(2)]

    def score(name: str, choice: Any) -> float:
        results = [network.prune(name, choice, sparsity)[metric] for network in networks]
        return sum(results) * (1 if metric == "loss" else -1)

    grids: dict[str, Sequence[Any]] = {method: DAMPS, "diagonal": DAMPS, "magnitude": ("global", "layer")}
    return {name: min(grid, key=lambda choice: score(name, choice)) for name, grid in grids.items()}


def _prune_digits(trial: Trial, method: str, sparsity: float, metric: str) -> Paired:
    network = _digits_pruning(trial.seed, trial.scale)
    results = {name: network.prune(name, trial.tuned[name], sparsity) for name in (method, "diagonal", "magnitude")}
    for name, result in results.items():
        trial.log(**{f"{name}_{key}": value for key, value in result.items()})
    best = min if metric == "loss" else max
    return Paired(ours=results[method][metric], baseline=best(results[name][metric] for name in ("diagonal", "magnitude")))


def _tune_half(trial: Trial, method: str = "mfac") -> dict[str, Any]:
    return _tune_digits(trial, method, 0.5, "loss")


@claim(control={"method": "misplaced"}, tune=_tune_half)
def prune_digits_half(trial: Trial, method: str = "mfac") -> Paired:
    """Test loss with half of the weights removed."""
    return _prune_digits(trial, method, 0.5, "loss")


def _tune_most(trial: Trial, method: str = "mfac") -> dict[str, Any]:
    return _tune_digits(trial, method, 0.7, "accuracy")


@claim(control={"method": "misplaced"}, tune=_tune_most)
def prune_digits_most(trial: Trial, method: str = "mfac") -> Paired:
    """Test accuracy with 70% of the weights removed."""
    return _prune_digits(trial, method, 0.7, "accuracy")


def _tune_nearly_all(trial: Trial, method: str = "mfac") -> dict[str, Any]:
    return _tune_digits(trial, method, 0.9, "accuracy")


@claim(control={"method": "misplaced"}, tune=_tune_nearly_all)
def prune_digits_nearly_all(trial: Trial, method: str = "mfac") -> Paired:
    """Test accuracy with 90% of the weights removed."""
    return _prune_digits(trial, method, 0.9, "accuracy")


SPARSITIES = (0.5, 0.7, 0.9)
LAYER_DAMPS = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean square of an input


@lru_cache(maxsize=1)
def _layer() -> tuple[Tensor, Tensor]:
    """One head's value projection in MiniLM's last layer (32, 384), and its inputs for tokens of the standard library's source."""
    lines = [line.strip() for line in stdlib_text(400_000).splitlines()]
    texts = [line for line in dict.fromkeys(lines) if len(line) >= 50][:200]
    states = torch.cat(hidden_states(texts, layer=5, max_length=24)).clone()
    weight: Tensor = minilm()[1].encoder.layer[-1].attention.self.value.weight
    return weight.detach()[:32].clone(), states.detach()


def _layer_errors(trial: Trial, choices: dict[str, Any]) -> dict[str, list[float]]:
    """Relative squared error of the layer's output on held-out tokens at each sparsity, by method."""
    weight, states = _layer()
    order = torch.randperm(len(states), generator=trial.generator)
    m = trial.pick(smoke=48, laptop=384)
    seen, unseen = states[order[: len(order) // 2]], states[order[len(order) // 2 :]]
    scale, flat = float(seen.square().mean()), weight.reshape(-1)
    true = unseen @ weight.T

    def error(pruned: Tensor) -> float:
        return float((unseen @ pruned.view_as(weight).T - true).square().sum() / true.square().sum())

    errors: dict[str, list[float]] = {}
    for method, choice in choices.items():
        if method == "magnitude":
            size = flat.numel() if choice == "global" else weight.shape[1]
            saliency = flat.square()
        elif method == "diagonal":
            size, saliency = flat.numel(), flat.square() * (seen.square().mean(0) + choice * scale).repeat(len(weight))
        else:
            # The gradient of the squared error against outputs with noise of ±1, which would vanish without it.
            noise = torch.randint(2, (m, len(weight)), generator=trial.generator) * 2.0 - 1
            rows = (noise.unsqueeze(2) * seen[:m].unsqueeze(1)).flatten(1)
            rows = _misplaced(rows, trial.seed) if method == "misplaced" else rows
            fisher = MatrixFreeFisher(rows, choice * scale, block_size=weight.shape[1], in_place=True)
            size, saliency = flat.numel(), flat.square() / fisher.inverse_diagonal()
        errors[method] = []
        for sparsity in SPARSITIES:
            removed = torch.cat([_least(part, round(sparsity * len(part))) for part in saliency.split(size)])  # type: ignore[no-untyped-call]
            moved = flat if method in ("magnitude", "diagonal") else flat + fisher.removal_step(flat, removed)
            errors[method].append(error(moved.masked_fill(removed, 0)))
    return errors


def _tune_layer(trial: Trial, method: str = "mfac") -> dict[str, Any]:
    """Each method's choice by its mean error over the sparsities, on a split of the tokens that no trial uses."""
    grids: dict[str, Sequence[Any]] = {method: LAYER_DAMPS, "diagonal": LAYER_DAMPS, "magnitude": ("global", "row")}
    return {name: min(grid, key=lambda choice: sum(_layer_errors(trial, {name: choice})[name])) for name, grid in grids.items()}


@claim(control={"method": "misplaced"}, tune=_tune_layer)
def prune_minilm(trial: Trial, method: str = "mfac") -> Paired:
    """Error of a real layer's output with 50, 70 and 90% of its weights removed, averaged."""
    errors = _layer_errors(trial, {name: trial.tuned[name] for name in (method, "diagonal", "magnitude")})
    trial.figure("error", x=SPARSITIES, y=errors, xlabel="sparsity", ylabel="relative squared error of the output", log="y")
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    trial.log(**{f"{name}_{s:g}": v for name, values in errors.items() for s, v in zip(SPARSITIES, values, strict=True)})
    return Paired(ours=means[method], baseline=min(means["diagonal"], means["magnitude"]))


# ------------------------------------------------------------------------------------------------------------- training

WINDOW = 32
PLAIN = 12.5  # turns M-FAC's four rates into 0.5, 1, 2 and 4
MFAC_RATES, MFAC_DAMPS = (0.04, 0.08, 0.16, 0.32), (1e-2, 3e-2)
SGD_RATES, SGD_MOMENTA = (0.2, 0.4, 0.8, 1.6), (0.8, 0.9)


class MisplacedMFAC(MFAC):
    """The control: the window's gradients have their entries dealt to the weights of a tensor in a wrong order."""

    def _precondition(self, fisher: SlidingFisher, row: int, gradients: list[Tensor | None]) -> list[Tensor]:
        wrong: list[Tensor | None] = []
        for g in gradients:
            assert g is not None
            order = torch.randperm(g.numel(), generator=torch.Generator().manual_seed(g.numel()))
            wrong.append(g.reshape(-1)[order].view_as(g))
        fisher.update(row, wrong)
        return fisher.solve([g for g in gradients if g is not None])


@lru_cache(maxsize=256)
def _train(name: str, lr: float, other: float, seed: int, epochs: int) -> float:
    """Training loss of a small ResNet after so many epochs of digits, the rate falling linearly to zero."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = digits(seed=seed)
    net = ResNet(1, len(data.classes), width=8)
    optimizer: Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=other)
    else:
        kind = {"MFAC": MFAC, "MisplacedMFAC": MisplacedMFAC}[name]
        # The misplaced matrix knows nothing of the gradient, so that its step is 1/λ times that: its rates are plain SGD's.
        optimizer = kind(net.parameters(), lr=lr * (other * PLAIN if name == "MisplacedMFAC" else 1), ngrads=WINDOW, damp=other)
    n, batch = len(data.train_x), 64
    steps, worst = epochs * (n // batch), 2 * math.log(len(data.classes))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for rows in _batches(torch.randperm(n, generator=generator), batch):
            optimizer.zero_grad()
            loss = cross_entropy(net(data.train_x[rows]), data.train_y[rows])
            if not loss.isfinite():
                return worst
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
    net.eval()
    with torch.no_grad():
        return min(worst, float(cross_entropy(net(data.train_x), data.train_y).nan_to_num(nan=worst)))


def _batches(order: Tensor, batch: int) -> Iterable[Tensor]:
    return order[: len(order) // batch * batch].view(-1, batch)


def _tune_training(trial: Trial, method: str = "MFAC") -> dict[str, Any]:
    """Four rates and two of what else the method has, for each of the two."""
    epochs, rates = trial.pick(smoke=1, laptop=4, full=40), trial.pick(smoke=1, laptop=4)
    ours = min(
        ((lr, damp) for lr in MFAC_RATES[:rates] for damp in MFAC_DAMPS),
        key=lambda choice: _train(method, *choice, trial.seed, epochs),
    )
    sgd = min(
        ((lr, momentum) for lr in SGD_RATES[:rates] for momentum in SGD_MOMENTA),
        key=lambda choice: _train("SGD", *choice, trial.seed, epochs),
    )
    return {"lr": ours[0], "damp": ours[1], "sgd_lr": sgd[0], "sgd_momentum": sgd[1]}


@claim(control={"method": "MisplacedMFAC"}, tune=_tune_training)
def resnet_loss(trial: Trial, method: str = "MFAC") -> Paired:
    """Training loss of a small ResNet after equal epochs."""
    epochs, tuned = trial.pick(smoke=1, laptop=4, full=40), trial.tuned
    return Paired(
        ours=_train(method, tuned["lr"], tuned["damp"], trial.seed, epochs),
        baseline=_train("SGD", tuned["sgd_lr"], tuned["sgd_momentum"], trial.seed, epochs),
    )
