"""How the claims of the Gaunt tensor product are measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from corollary.claims import Exact, Ratio, Slope, Trial, claim
from corollary.claims.timing import interleave
from corollary.linalg.sphere import gaunt_coefficients, spherical_harmonics, wigner_3j
from corollary.nn import GauntConvolution, GauntManyBody, GauntTensorProduct
from corollary.testing import Case

METHODS = ("dense", "separable", "fft")
CONFORMANCE = {
    "corollary.nn.GauntTensorProduct": Case(
        lambda: GauntTensorProduct(2, 3, 4, weighted=True),
        {
            "inputs": ((9,), (16,)),
            "output": (25,),
            "exact_tables": True,
            "dtypes": (torch.float32, torch.float64, torch.bfloat16),
        },
    ),
    "corollary.nn.GauntConvolution": Case(
        lambda: GauntConvolution(7, 6, 3, channels=3, weighted=True),
        {"inputs": ((3, 64), (3,), (3, 7)), "output": (3, 16), "exact_tables": True},
    ),
    "corollary.nn.GauntManyBody": Case(
        lambda: GauntManyBody(2, 3, 3, channels=3, weighted=True, method="fft"),
        {"inputs": ((3, 9), (3, 9), (3, 9)), "output": (3, 16), "exact_tables": True},
    ),
}

_coefficients = lru_cache(maxsize=16)(gaunt_coefficients)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _random(trial: Trial, lmax: int, *lead: int) -> Tensor:
    x = torch.randn(*lead, (lmax + 1) ** 2, generator=trial.generator, dtype=torch.float64)
    return _unit(x).to(trial.device)


def _panoramas(trial: Trial, lmax: int, count: int) -> tuple[Tensor, Tensor]:
    """Coefficients of random crops of two photographs, their brightness read as equirectangular panoramas of the sphere."""
    height, width = 32, 64
    theta = (torch.arange(height, dtype=torch.float64) + 0.5) * torch.pi / height
    phi = 2 * torch.pi * torch.arange(width, dtype=torch.float64) / width
    sin, cos = theta.sin()[:, None], theta.cos()[:, None]
    directions = torch.stack([sin * phi.sin(), cos.expand(-1, width), sin * phi.cos()], -1)
    basis = sin[..., None] * spherical_harmonics(lmax, directions)
    found = []
    for photograph in load_sample_images().images:
        brightness = torch.from_numpy(photograph.mean(-1) / 255)
        crops = []
        for _ in range(count):
            high = int(trial.rng.integers(100, brightness.shape[0] // 2 + 100))
            wide = min(2 * high, brightness.shape[1])
            top, left = (
                int(trial.rng.integers(0, have - need + 1)) for have, need in zip(brightness.shape, (high, wide), strict=True)
            )
            crop = brightness[None, None, top : top + high, left : left + wide]
            crops.append(torch.nn.functional.adaptive_avg_pool2d(crop, (height, width))[0, 0])
        found.append(_unit(torch.einsum("nhw,hwk->nk", torch.stack(crops), basis)))
    return found[0].to(trial.device), found[1].to(trial.device)


@claim(control={"aliased": True})
def equals_gaunt_sum(trial: Trial, aliased: bool = False) -> Exact:
    errors = {}
    for lmax in trial.pick(smoke=(2,), laptop=(2, 4, 6)):
        x, y = (c.float() for c in _panoramas(trial, lmax, 16))
        table = _coefficients(lmax, lmax, 2 * lmax).to(trial.device)
        true = torch.einsum("na,nb,abk->nk", x.double(), y.double(), table)
        for lmax_out in (lmax,) if aliased else (lmax, 2 * lmax):
            for method in METHODS:
                bandlimit = lmax if aliased else None
                product = GauntTensorProduct(lmax, lmax, lmax_out, method=method, bandlimit=bandlimit, device=trial.device)
                error = (product(x, y).double() - true[:, : (lmax_out + 1) ** 2]).abs().max()
                errors[f"{method}_{lmax}_{lmax_out}"] = float(error)
    trial.log(**errors)
    return Exact(list(errors.values()))


class _EvenAtEveryOrder(GauntTensorProduct):
    """Continues Θ_lm(θ) to θ < 0 evenly for odd m too, where it is odd."""

    def _tables(self) -> dict[str, Tensor]:
        tables = super()._tables()
        for lmax in self._inputs:
            rows = tables[f"in{lmax}_rows"].clone()
            rows[1 : lmax + 1 : 2, self.band + 1 :] *= -1
            rows[lmax + 2 :: 2, self.band + 1 :] *= -1
            tables[f"in{lmax}_rows"] = rows
        return tables


@claim(control={"broken": True})
def equals_gaunt_sum_float64(trial: Trial, broken: bool = False) -> Exact:
    errors = []
    for lmax1, lmax2 in trial.pick(smoke=((2, 1),), laptop=((2, 2), (4, 3), (5, 5))):
        x, y = _random(trial, lmax1, 32), _random(trial, lmax2, 32)
        lmax_out = lmax1 + lmax2
        true = torch.einsum("na,nb,abk->nk", x, y, _coefficients(lmax1, lmax2, lmax_out).to(trial.device))
        for method in ("fft",) if broken else METHODS:
            make = _EvenAtEveryOrder if broken else GauntTensorProduct
            product = make(lmax1, lmax2, lmax_out, method=method, device=trial.device, dtype=torch.float64)
            errors.append(float((product(x, y) - true).abs().max()))
    return Exact(errors)


def _rotation(trial: Trial) -> Tensor:
    q, r = np.linalg.qr(trial.rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q * np.linalg.det(q)).to(trial.device)


def _representation(lmax: int, rotation: Tensor, generator: torch.Generator) -> Tensor:
    """D with Y(R p) = D Y(p), by least squares over random directions p; no formula for Wigner matrices comes in."""
    directions = torch.randn(4 * (lmax + 1) ** 2, 3, generator=generator, dtype=torch.float64).to(rotation.device)
    before, after = spherical_harmonics(lmax, directions), spherical_harmonics(lmax, directions @ rotation.mT)
    solution: Tensor = torch.linalg.lstsq(before, after).solution
    return solution.mT


@claim(control={"aliased": True})
def commutes_with_rotation(trial: Trial, aliased: bool = False) -> Exact:
    errors = {}
    rotation = _rotation(trial)
    options: dict[str, Any] = {"device": trial.device, "dtype": torch.float64}
    for lmax in trial.pick(smoke=(2,), laptop=(2, 4, 7)):
        turn = _representation(lmax, rotation, trial.generator).mT
        options["bandlimit"] = lmax if aliased else None
        x, y = _random(trial, lmax, 16, 2), _random(trial, lmax, 16, 2)
        vectors = torch.randn(16, 3, generator=trial.generator, dtype=torch.float64).to(trial.device)
        product = GauntTensorProduct(lmax, lmax, lmax, **options)
        convolution = GauntConvolution(lmax, lmax, lmax, channels=2, **options)
        many = GauntManyBody(lmax, 4, lmax, **options)
        for name, turned, straight in (
            ("product", product(x @ turn, y @ turn), product(x, y)),
            ("convolution", convolution(x @ turn, vectors @ rotation.mT), convolution(x, vectors)),
            ("many_body", many(x @ turn), many(x)),
        ):
            errors[f"{name}_{lmax}"] = float((turned - straight @ turn).abs().max())
    trial.log(**errors)
    return Exact(list(errors.values()))


def _forward_backward(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], object]:
    """One forward and backward pass through both inputs, with the same gradient of the output each time."""
    grad = torch.ones_like(call(x, y))
    return lambda: torch.autograd.grad(call(x, y), (x, y), grad)


def _leaves(trial: Trial, lmax: int, batch: int) -> tuple[Tensor, Tensor]:
    x, y = (_random(trial, lmax, batch).float().requires_grad_() for _ in range(2))
    return x, y


@lru_cache(maxsize=8)
def _dense_table(lmax: int) -> Tensor:
    """The Gaunt tensor in float32, by multiplying basis functions pair by pair: the exact symbols would take too long here."""
    basis = torch.eye((lmax + 1) ** 2)
    product = GauntTensorProduct(lmax, lmax)
    return torch.stack([product(row, basis) for row in basis])


def dense_sum(lmax: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The Gaunt sum as one contraction with the dense tensor of (L+1)²(L+1)²(2L+1)² numbers."""
    table = _dense_table(lmax)
    return lambda x, y: torch.einsum("na,nb,abk->nk", x, y, table.to(x))


@claim(control={"dense": True})
def cubic_cost(trial: Trial, dense: bool = False) -> Slope:
    degrees = trial.pick(smoke=(4, 6, 8), laptop=(8, 10, 12, 14) if dense else (24, 32, 40, 48, 64))
    cases = {}
    for lmax in degrees:
        x, y = _leaves(trial, lmax, 8)
        if dense:
            cases[str(lmax)] = _forward_backward(dense_sum(lmax), x, y)
        else:
            cases[str(lmax)] = _forward_backward(GauntTensorProduct(lmax, lmax, device=trial.device), x, y)
    seconds = interleave(cases, rounds=5, min_seconds=0.01)
    times = [seconds[str(lmax)] for lmax in degrees]
    trial.figure("time", x=degrees, y={"seconds": times}, xlabel="degree L", ylabel="forward and backward, s", log="xy")
    return Slope(degrees, times)


def e3nn_o3() -> ModuleType:
    """e3nn's ``o3``; the error says how to get it."""
    try:
        return importlib.import_module("e3nn.o3")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this is measured against e3nn: pip install 'corollary[bench]'", name=error.name) from error


def triples(lmax: int) -> list[tuple[int, int, int]]:
    """Degrees (l1, l2, l) of every path that the Gaunt product has."""
    return [
        (i, j, k) for i in range(lmax + 1) for j in range(lmax + 1) for k in range(abs(i - j), i + j + 1, 2)
    ]  # the sum of the three is even


@lru_cache(maxsize=16)
def e3nn_full(lmax: int) -> torch.nn.Module:
    """e3nn's full product of all degrees up to ``lmax``, each once."""
    o3 = e3nn_o3()
    irreps = o3.Irreps([(1, (d, (-1) ** d)) for d in range(lmax + 1)])
    module: torch.nn.Module = o3.FullTensorProduct(irreps, irreps)
    return module


@lru_cache(maxsize=16)
def e3nn_gaunt(lmax: int) -> torch.nn.Module:
    """e3nn's product with the Gaunt paths alone, scaled so that it equals `GauntTensorProduct` (lmax, lmax)."""
    o3 = e3nn_o3()
    into, out = (o3.Irreps([(1, (d, (-1) ** d)) for d in range(top + 1)]) for top in (lmax, 2 * lmax))
    # e3nn's symbols are normalized to 1 and the path weight is a squared factor.
    paths = [
        (i, j, k, "uuu", False, (2 * i + 1) * (2 * j + 1) * (2 * k + 1) / (4 * np.pi) * wigner_3j(i, j, k, 0, 0, 0) ** 2)
        for i, j, k in triples(lmax)
    ]
    module: torch.nn.Module = o3.TensorProduct(into, into, out, paths, irrep_normalization="none", path_normalization="none")
    return module


@lru_cache(maxsize=16)
def _blocks(lmax: int) -> list[tuple[slice, slice, int, Tensor]]:
    table = _coefficients(lmax, lmax, 2 * lmax).float()
    at = [slice(d**2, (d + 1) ** 2) for d in range(2 * lmax + 1)]
    return [(at[i], at[j], k, table[at[i], at[j], at[k]].contiguous()) for i, j, k in triples(lmax)]


def path_by_path(lmax: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The Gaunt sum without any change of basis: one contraction for each triple of degrees."""
    blocks = _blocks(lmax)

    def call(x: Tensor, y: Tensor) -> Tensor:
        parts: list[list[Tensor]] = [[] for _ in range(2 * lmax + 1)]
        for first, second, k, block in blocks:
            parts[k].append(torch.einsum("na,nb,abk->nk", x[:, first], y[:, second], block.to(x)))
        return torch.cat([torch.stack(part).sum(0) for part in parts], -1)

    return call


@claim(control={"ours": path_by_path})
def faster_than_e3nn(trial: Trial, ours: Callable[[int], Callable[[Tensor, Tensor], Tensor]] | None = None) -> Ratio:
    cases = {}
    degrees = trial.pick(smoke=(2,), laptop=(2, 3, 4, 5, 6))
    for lmax in degrees:
        x, y = _leaves(trial, lmax, 64)
        call = GauntTensorProduct(lmax, lmax, device=trial.device) if ours is None else ours(lmax)
        cases[f"ours_{lmax}"] = _forward_backward(call, x, y)
        cases[f"full_{lmax}"] = _forward_backward(e3nn_full(lmax).to(trial.device), x, y)
        cases[f"gaunt_{lmax}"] = _forward_backward(e3nn_gaunt(lmax).to(trial.device), x, y)
    seconds = interleave(cases, rounds=3, warmup=2, min_seconds=0.005)  # TorchScript specializes in the first calls
    ratios = [(seconds[f"ours_{d}"], min(seconds[f"full_{d}"], seconds[f"gaunt_{d}"])) for d in degrees]
    trial.log(**{f"ratio_{d}": a / b for d, (a, b) in zip(degrees, ratios, strict=True)})
    trial.figure(
        "time",
        x=degrees,
        y={who: [seconds[f"{who}_{d}"] for d in degrees] for who in ("ours", "full", "gaunt")},
        xlabel="degree L",
        ylabel="forward and backward, s",
        log="y",
    )
    return Ratio(*max(ratios, key=lambda pair: pair[0] / pair[1]))
