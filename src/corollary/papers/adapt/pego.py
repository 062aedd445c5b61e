"""How PEGO's claims are measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from corollary.adapt import PEGO, AdapterConfig, LoRA, adapt, adapter_penalty, merge_adapters
from corollary.claims import Exact, Paired, Ratio, Trial, claim
from corollary.claims.timing import interleave
from corollary.data import digits
from corollary.models import ViT
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def pego_oracle(weight: Array, state: dict[str, Array], config: PEGO) -> Array:
    """The sum of the group's products, one outer product after the other."""
    change = np.zeros_like(weight)
    for i in range(config.group_size):
        for k in range(config.rank):
            change += np.outer(state["lora_B"][i, :, k], state["lora_A"][i, k])
    return change


CONFORMANCE = {
    "corollary.adapt.PEGO": Case(
        lambda: PEGO(rank=2, group_size=3),
        tags={"oracle": pego_oracle, "parameters": lambda site: 6 * (site.in_features + site.out_features)},
    )
}

# ------------------------------------------------------------------------------------------------------------------ task

Domain = Callable[[Tensor, torch.Generator], Tensor]


def rotated(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by 25 to 45 degrees, either way."""
    sign = torch.randint(0, 2, (len(x),), generator=generator) * 2 - 1
    angle = sign * (25 + 20 * torch.rand(len(x), generator=generator)) * math.pi / 180
    zero = torch.zeros_like(angle)
    theta = torch.stack(
        [torch.stack([angle.cos(), -angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1)], 1
    )
    return grid_sample(x, affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 0.3 on images in [0, 1]."""
    return x + 0.3 * torch.randn(x.shape, generator=generator)


def inverted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast turned round and weakened."""
    return 0.8 - 0.6 * x


def plain(x: Tensor, generator: torch.Generator) -> Tensor:
    """As it is."""
    return x


DOMAINS: tuple[Domain, ...] = (rotated, noisy, inverted)
"""the domains that are held out in turn; the plain images are always trained on"""


@lru_cache(maxsize=32)
def pretrained(seed: int, steps: int) -> tuple[ViT, Tensor, Tensor, Tensor, Tensor]:
    """A ViT pre-trained on half of the digits in every domain, and the other half: images and labels to tune on and to test on."""
    split = digits(seed=seed)
    images = torch.cat([split.train_x, split.test_x])
    labels = torch.cat([split.train_y, split.test_y])
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    old, tune, test = order[:900], order[900:1100], order[1100:]
    model = ViT(8, 2, 1, 10, dim=48, depth=2, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = old[torch.randint(len(old), (64,), generator=generator)]
        parts = [domain(part, generator) for domain, part in zip((plain, *DOMAINS), images[chosen].chunk(4), strict=True)]
        loss = cross_entropy(model(torch.cat(parts)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model, images[tune], labels[tune], images[test], labels[test]


Method = AdapterConfig | None
TARGETS = "qkv"


@lru_cache(maxsize=1024)
def tuned(method: Method, lr: float, seed: int, held_out: int, steps: int) -> float:
    """Accuracy on the held-out domain after fine-tuning on 200 images in the others, with a fresh head."""
    base, x, y, x_test, y_test = pretrained(seed, 4 * steps)
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.head = nn.Linear(model.num_features, 10)
    if method is not None:
        adapt(model, method, TARGETS, modules_to_save=("head",))
    generator = torch.Generator().manual_seed(seed)
    sources = [plain, *(d for i, d in enumerate(DOMAINS) if i != held_out)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (48,), generator=generator)
        parts = [domain(part, generator) for domain, part in zip(sources, x[chosen].chunk(3), strict=True)]
        loss = cross_entropy(model(torch.cat(parts)), y[chosen])
        if method is not None:
            loss = loss + adapter_penalty(model)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        shifted = DOMAINS[held_out](x_test, torch.Generator().manual_seed(seed + 1))
        return float((model.eval()(shifted).argmax(1) == y_test).double().mean())


def held_out_accuracy(method: Method, lr: float, seed: int, steps: int) -> float:
    """The mean over the domains that are held out in turn."""
    return sum(tuned(method, lr, seed, i, steps) for i in range(len(DOMAINS))) / len(DOMAINS)


# ----------------------------------------------------------------------------------------------------------------- claims

RATES = (0.001, 0.003, 0.01)
FULL_RATES = (0.0003, 0.001, 0.003)
OURS, LORA = PEGO(rank=2, group_size=2, regularization=1e-3), LoRA(rank=4)
FLIPPED = PEGO(rank=2, group_size=2, regularization=-1e-3)


def _steps(trial: Trial) -> int:
    return trial.pick(smoke=3, laptop=100)


def _tune(baseline: Method, rates: tuple[float, ...]) -> Callable[..., dict[str, float]]:
    def hook(trial: Trial, method: Method = OURS) -> dict[str, float]:
        found = {}
        for key, tried, grid in (("ours", method, RATES), ("baseline", baseline, rates)):
            grid = grid[:1] if trial.scale == "smoke" else grid
            scores = {lr: sum(held_out_accuracy(tried, lr, trial.seed + i, _steps(trial)) for i in range(2)) for lr in grid}
            found[key] = max(scores, key=scores.__getitem__)
        return found

    return hook


def _versus(trial: Trial, method: Method, baseline: Method) -> Paired:
    ours = held_out_accuracy(method, trial.tuned["ours"], trial.seed, _steps(trial))
    other = held_out_accuracy(baseline, trial.tuned["baseline"], trial.seed, _steps(trial))
    trial.log(rate=trial.tuned["ours"], baseline_rate=trial.tuned["baseline"])
    return Paired(ours=ours, baseline=other)


@claim(control={"method": FLIPPED}, tune=_tune(LORA, RATES))
def beats_lora(trial: Trial, method: PEGO = OURS) -> Paired:
    """Held-out accuracy against LoRA's."""
    return _versus(trial, method, LORA)


@claim(control={"method": FLIPPED}, tune=_tune(None, FULL_RATES))
def beats_full_fine_tuning(trial: Trial, method: PEGO = OURS) -> Paired:
    """Held-out accuracy against full fine-tuning's."""
    return _versus(trial, method, None)


def _moved(seed: int) -> tuple[ViT, ViT]:
    """A ViT, and the same with a group that has moved from its start."""
    torch.manual_seed(seed)
    base = ViT(8, 2, 1, 10, dim=96, depth=4, heads=4).eval()
    model = adapt(copy.deepcopy(base), PEGO(rank=4, group_size=4), TARGETS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    assert isinstance(model, ViT)
    return base, model


@claim(control={"merged": False})
def no_cost_after_merging(trial: Trial, merged: bool = True) -> Ratio:
    """Time of a forward pass against the base model's, interleaved."""
    base, model = _moved(trial.seed)
    if merged:
        merge_adapters(model)
    x = torch.randn(64, 1, 8, 8, generator=trial.generator)
    with torch.no_grad():
        seconds = interleave(
            {"ours": lambda: model(x), "base": lambda: base(x)},
            rounds=trial.pick(smoke=2, laptop=21),
            warmup=3,
            min_seconds=0.02,
        )
    return Ratio(ours=seconds["ours"], baseline=seconds["base"])


@claim(control={"merged": False})
def merging_keeps_the_output(trial: Trial, merged: bool = True) -> Exact:
    """The merged output against the adapted one, relative to the change that the group makes, on digits."""
    base, model = _moved(trial.seed)
    x = digits(seed=trial.seed % 100).test_x[:64]
    with torch.no_grad():
        plain_out, adapted = base(x), model(x)
        after = merge_adapters(model)(x) if merged else plain_out
    return Exact(float((after - adapted).abs().max() / (adapted - plain_out).abs().max()))
