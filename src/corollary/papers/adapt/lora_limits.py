"""How the claims on LoRA's computational limits are measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from corollary.adapt import lora_attention_gradient, norm_threshold, polynomial_attention
from corollary.adapt.lora_limits import LoRAGradient
from corollary.claims import Exact, Paired, Ratio, Slope, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import photographs
from corollary.testing import Case

DIM, RANK, TOLERANCE = 8, 2, 1e-3
BELOW, ABOVE = 0.25, 1.0  # entries in units of √(log L)
NAMES = ("query", "key", "value")

# ------------------------------------------------------------------------------------------------------------ conformance


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return polynomial_attention(query, key, value, tolerance=1e-12)


def _attention_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = ((12, 3), (10, 3), (10, 2))
    return tuple((0.4 * torch.randn(*shape, generator=generator)).to(dtype) for shape in shapes)


def _gradient(x: Tensor, y: Tensor, query: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    weights = dict(zip(NAMES, (query, key, value), strict=True))
    result = lora_attention_gradient(x, y, weights, {"query": (a, b), "value": (a, b)}, tolerance=1e-12)
    return (result.loss, *result.factors["query"], *result.factors["value"])


def _gradient_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = ((12, 4), (12, 3), (3, 4), (3, 4), (3, 4), (2, 4), (3, 2))
    return tuple((0.3 * torch.randn(*shape, generator=generator)).to(dtype) for shape in shapes)


CONFORMANCE = {
    "corollary.adapt.polynomial_attention": Case(
        lambda: _attend,
        {
            "inputs": _attention_inputs,
            "bad": {
                "keys of another width": (torch.ones(4, 3), torch.ones(4, 2), torch.ones(4, 3)),
                "norms above the threshold": (torch.full((4, 3), 40.0), 40.0 * torch.eye(4)[:, :3], torch.ones(4, 3)),
            },
        },
    ),
    "corollary.adapt.lora_attention_gradient": Case(
        lambda: _gradient,
        {
            "inputs": _gradient_inputs,
            "batched": False,
            "differentiable": False,
            "bad": {"a target of another length": (torch.ones(4, 2), torch.ones(3, 2), *[torch.ones(2, 2)] * 5)},
        },
    ),
}

# --------------------------------------------------------------------------------------------------------------- problems

Problem = dict[str, Any]


def _problem(generator: torch.Generator, x: Tensor, size: float) -> Problem:
    """A head with LoRA on all three projections; X is scaled so that the largest entry of queries and keys is size · √(log L).

    The frozen weights permute the channels, so that the entries keep their distribution; LoRA adds a tenth.
    """
    eye = torch.eye(DIM, dtype=torch.float64)
    weights = {name: eye[torch.randperm(DIM, generator=generator)] for name in NAMES}
    factors = {}
    for name in NAMES:
        a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((RANK, DIM), (DIM, RANK)))
        factors[name] = (a, 0.1 * b / (b @ a / RANK).norm(2))
    largest = max(float(q.abs().max()) for q in _projections(x, weights, factors)[:2])
    x = x * (size * math.sqrt(math.log(len(x))) / largest)
    return {"x": x, "target": x.roll(1, 0), "weights": weights, "factors": factors}


def _signs(generator: torch.Generator, length: int, size: float) -> Problem:
    """Entries at the bound, with random signs."""
    x = torch.randint(0, 2, (length, DIM), generator=generator).double() * 2 - 1
    return _problem(generator, x, size)


def _photograph(generator: torch.Generator, seed: int) -> Problem:
    """4,096 patches of 6 x 6 pixels of a photograph, on their leading principal directions."""
    names = sorted(name for name, image in photographs().items() if min(image.shape[1:]) >= 64 * 6)
    image = photographs()[names[seed % len(names)]].double()
    top, left = (int(torch.randint(0, side - 64 * 6 + 1, (), generator=generator)) for side in image.shape[1:])
    crop = image[:, top : top + 64 * 6, left : left + 64 * 6]
    patches = crop.unfold(1, 6, 6).unfold(2, 6, 6).permute(1, 2, 0, 3, 4).reshape(64 * 64, -1)
    patches = patches - patches.mean(0)
    directions = torch.linalg.eigh(patches.T @ patches).eigenvectors[:, -DIM:]
    return _problem(generator, patches @ directions, BELOW)


def _cast(problem: Problem, dtype: torch.dtype, device: str) -> Problem:
    to: Callable[[Tensor], Tensor] = lambda t: t.to(device, dtype)  # noqa: E731 - one short conversion, used five times
    return {
        "x": to(problem["x"]),
        "target": to(problem["target"]),
        "weights": {name: to(w) for name, w in problem["weights"].items()},
        "factors": {name: (to(a), to(b)) for name, (a, b) in problem["factors"].items()},
    }


def _projections(x: Tensor, weights: Any, factors: Any) -> list[Tensor]:
    return [x @ (weights[name] + factors[name][1] @ factors[name][0] / RANK).T for name in NAMES]


def exact_gradient(x: Tensor, target: Tensor, weights: Any, factors: Any) -> LoRAGradient:
    """Loss and LoRA gradient by autograd through torch's own attention, which is exact, and keeps no L x L matrix either."""
    leaves = {name: tuple(m.detach().requires_grad_() for m in pair) for name, pair in factors.items()}
    query, key, value = (p[None, None] for p in _projections(x, weights, leaves))
    out = scaled_dot_product_attention(query, key, value, scale=1 / DIM)[0, 0]
    loss = (out - target).square().sum() / 2
    grads = torch.autograd.grad(loss, [m for pair in leaves.values() for m in pair])
    return LoRAGradient(loss.detach(), {name: (grads[2 * i], grads[2 * i + 1]) for i, name in enumerate(leaves)})


def _approximate(problem: Problem, **options: Any) -> LoRAGradient:
    return lora_attention_gradient(**problem, scale=1 / DIM, **{"tolerance": TOLERANCE, **options})


def _degree(problem: Problem) -> int:
    query, key, _ = _projections(problem["x"], problem["weights"], problem["factors"])
    degree = norm_threshold(query, key, tolerance=TOLERANCE, scale=1 / DIM).degree
    assert degree is not None
    return degree


def _most(length: int) -> int:
    """The largest degree whose features are fewer than the tokens."""
    return next(g for g in range(1, 20) if math.comb(DIM + g + 1, DIM) >= length)


def _error(trial: Trial, problem: Problem, degree: int) -> float:
    """Largest error over the six gradients, each relative to its largest entry; ours in float32, the reference in float64."""
    true = exact_gradient(**_cast(problem, torch.float64, trial.device)).factors
    got = _approximate(_cast(problem, torch.float32, trial.device), degree=degree).factors
    return max(
        float((a.double() - b).abs().max() / b.abs().max())
        for name in NAMES
        for a, b in zip(got[name], true[name], strict=True)
    )


def _lengths(trial: Trial) -> tuple[int, ...]:
    return trial.pick(smoke=(256, 512), laptop=(256, 1024, 4096, 16384))


# ----------------------------------------------------------------------------------------------------------------- claims


@claim(control={"size": ABOVE})
def within_tolerance_below_threshold(trial: Trial, size: float = BELOW) -> Exact:
    """Gradient errors at the degree that the tolerance asks for below the threshold."""
    errors = []
    for length in _lengths(trial):
        state = trial.generator.get_state()
        degree = _degree(_signs(trial.generator, length, BELOW))
        trial.generator.set_state(state)
        errors.append(_error(trial, _signs(trial.generator, length, size), degree))
        trial.log(
            **{f"error_{length}": errors[-1], f"degree_{length}": degree, f"features_{length}": math.comb(DIM + degree, DIM)}
        )
    trial.figure("error", x=_lengths(trial), y={"error": errors}, xlabel="tokens", ylabel="relative gradient error", log="xy")
    return Exact(errors)


@claim(control={"size": BELOW})
def misses_tolerance_above_threshold(trial: Trial, size: float = ABOVE) -> Paired:
    """The least error with as many features as stay below the number of tokens."""
    errors = []
    for length in _lengths(trial):
        errors.append(_error(trial, _signs(trial.generator, length, size), _most(length)))
        trial.log(**{f"error_{length}": errors[-1], f"degree_{length}": _most(length)})
    trial.figure("error", x=_lengths(trial), y={"error": errors}, xlabel="tokens", ylabel="relative gradient error", log="xy")
    return Paired(ours=math.log10(min(errors)), baseline=math.log10(TOLERANCE))


@claim(control={"size": ABOVE})
def photograph_within_tolerance(trial: Trial, size: float = BELOW) -> Exact:
    """Gradient error with the patches of a photograph as tokens."""
    problem = _photograph(trial.generator, trial.seed)
    degree = _degree(problem)
    trial.log(degree=degree, features=math.comb(DIM + degree, DIM))
    return Exact(_error(trial, {**problem, "x": problem["x"] * (size / BELOW)}, degree))


def _timed(trial: Trial, lengths: tuple[int, ...], rounds: int, **options: Any) -> dict[str, float]:
    """Seconds of the approximate and of the exact gradient at each length, interleaved."""
    keep_freed_memory()
    cases: dict[str, Callable[[], object]] = {}
    for length in lengths:
        problem = _cast(_signs(trial.generator, length, BELOW), torch.float32, trial.device)
        cases[f"ours {length}"] = lambda problem=problem: _approximate(problem, **options)  # type: ignore[misc]
        cases[f"exact {length}"] = lambda problem=problem: exact_gradient(**problem)  # type: ignore[misc]
    return interleave(cases, rounds=rounds, warmup=1)


@claim(control={"method": "exact"})
def nearly_linear_time(trial: Trial, method: str = "ours") -> Slope:
    """Times of both against length; the slope of one of them."""
    lengths = trial.pick(smoke=(256, 512, 1024), laptop=(256, 512, 1024, 2048, 4096, 8192, 16384))
    seconds = _timed(trial, lengths, rounds=2)
    curves = {name: [seconds[f"{name} {length}"] for length in lengths] for name in ("ours", "exact")}
    trial.figure("time", x=lengths, y=curves, xlabel="tokens", ylabel="loss and gradient, s", log="xy")
    trial.log(**{f"ratio_{length}": a / b for length, a, b in zip(lengths, curves["ours"], curves["exact"], strict=True)})
    start = 0 if trial.scale == "smoke" else lengths.index(1024)
    return Slope(lengths[start:], curves[method][start:])


@claim(control={"degree": 7})
def faster_at_16k(trial: Trial, degree: int | None = None) -> Ratio:
    """Time of loss and gradient at the greatest length."""
    length = trial.pick(smoke=1024, laptop=16384)
    seconds = _timed(trial, (length,), rounds=2, degree=degree)
    return Ratio(ours=seconds[f"ours {length}"], baseline=seconds[f"exact {length}"])
