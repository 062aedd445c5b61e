"""AdamP and SGDP against the authors' package, closed forms and properties; the conformance checks cover the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import adamp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import corollary.optim._scale_invariant as projection
import corollary.optim.adamp as module
from corollary.models import GPT, ResNet
from corollary.optim import SGDP, AdamP

Make = Callable[[Iterable[Tensor]], Optimizer]


def _normalized(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose weights take every branch: by channel before BatchNorm, by layer before LayerNorm, and neither."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind == "resnet":
        images = torch.randn(24, 1, 8, 8, generator=generator, dtype=torch.float64)
        return ResNet(1, 5, width=4, blocks=(1, 1)).double(), images, torch.randint(5, (24,), generator=generator)
    if kind == "gpt":
        tokens = torch.randint(20, (4, 9), generator=generator)
        return GPT(20, dim=8, depth=2, heads=2, context=8).double(), tokens[:, :-1], tokens[:, 1:]
    net = nn.Sequential(nn.Linear(6, 7, bias=False), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.LayerNorm(5))
    return net.double(), torch.randn(24, 6, generator=generator, dtype=torch.float64), torch.randint(5, (24,))


def _trajectory(kind: str, make: Make, steps: int = 12) -> tuple[list[Tensor], list[float]]:
    net, x, y = _normalized(kind)
    optimizer = make(net.parameters())
    path, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
        norms.append(float(next(net.parameters()).detach().norm()))
    return path, norms


_ADAM = ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "nesterov": True, "delta": 0.4, "wd_ratio": 0.5, "betas": (0.8, 0.9)})
_SGD = (
    {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True, "dampening": 0.3},
    {"momentum": 0.0, "weight_decay": 0.05, "delta": 0.4},
)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("options", _ADAM)
@pytest.mark.parametrize("kind", ["resnet", "gpt", "layernorm"])
def test_adamp_takes_the_steps_of_the_authors_package(kind: str, options: dict[str, Any], foreach: bool | None) -> None:
    ours, _ = _trajectory(kind, lambda p: AdamP(p, lr=0.01, foreach=foreach, **options))
    theirs, _ = _trajectory(kind, lambda p: adamp.AdamP(p, lr=0.01, **options))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", _SGD)
@pytest.mark.parametrize("kind", ["resnet", "gpt", "layernorm"])
def test_sgdp_takes_the_steps_of_the_authors_package(kind: str, options: dict[str, Any]) -> None:
    ours, _ = _trajectory(kind, lambda p: SGDP(p, lr=0.05, **options))
    theirs, _ = _trajectory(kind, lambda p: adamp.SGDP(p, lr=0.05, **options))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-9)


def test_without_nesterov_the_authors_package_projects_its_buffer_too() -> None:
    """Their update is the buffer itself and is projected in place; the paper's Algorithm 1 keeps the momentum whole."""
    theirs, _ = _trajectory("resnet", lambda p: adamp.SGDP(p, lr=0.05, momentum=0.9, weight_decay=0.05, dampening=0.2))
    for keep, same in ((True, True), (False, False)):
        ours, _ = _trajectory(
            "resnet",
            lambda p, keep=keep: SGDP(p, lr=0.05, momentum=0.9, weight_decay=0.05, dampening=0.2, project_momentum=keep),
        )
        assert (float((ours[-1] - theirs[-1]).abs().max()) < 1e-9) is same


def test_every_branch_is_taken_in_these_tests() -> None:
    """Else the comparisons above could agree on nothing but plain Adam."""
    whole, _ = _trajectory("layernorm", lambda p: AdamP(p, lr=0.01))
    rows, _ = _trajectory("resnet", lambda p: AdamP(p, lr=0.01))
    for kind, path in (("layernorm", whole), ("resnet", rows)):
        plain, _ = _trajectory(kind, lambda p: AdamP(p, lr=0.01, delta=0.0))
        assert float((plain[-1] - path[-1]).abs().max()) > 1e-4
    net, x, y = _normalized("layernorm")
    nn.functional.cross_entropy(net(x), y).backward()
    weight = net[0].weight
    cosine = nn.functional.cosine_similarity(weight, weight.grad, dim=1).abs()
    assert cosine.max() > 0.1 / 6**0.5  # no channel view
    assert nn.functional.cosine_similarity(weight.flatten(), weight.grad.flatten(), dim=0).abs() < 1e-4  # a layer view


@given(scale=st.floats(0.1, 10), nesterov=st.booleans(), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_on_a_scale_invariant_loss_the_norm_grows_by_pythagoras(scale: float, nesterov: bool, seed: int) -> None:
    """Proposition: the projected step stands at right angles to the row, so ‖w'‖² = ‖w‖² + η² ‖Πu‖²."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(scale * torch.randn(4, 6, dtype=torch.float64, generator=generator))
    target = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    for optimizer in (AdamP([weight], lr=0.1, nesterov=nesterov), SGDP([weight], lr=0.1, momentum=0.9, nesterov=nesterov)):
        for _ in range(4):
            before = weight.detach().clone()
            optimizer.zero_grad()
            (nn.functional.normalize(weight, dim=1) * target).sum().backward()
            optimizer.step()
            step = weight.detach() - before
            torch.testing.assert_close((step * before).sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-7)
            squares = before.square().sum(1) + step.square().sum(1)
            torch.testing.assert_close(weight.detach().square().sum(1), squares, rtol=1e-6, atol=0)


def test_the_direction_moves_as_without_projection() -> None:
    """Scale invariance: dropping the radial part changes the effective step size alone, to first order in the step."""
    ends = {}
    for delta in (0.0, 0.1):
        weight = nn.Parameter(torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64))
        optimizer = AdamP([weight], lr=1e-5, delta=delta)
        (nn.functional.normalize(weight, dim=1) * torch.tensor([1.0, 0.0, 0.5])).sum().backward()
        start = nn.functional.normalize(weight.detach(), dim=1)
        optimizer.step()
        ends[delta] = nn.functional.normalize(weight.detach(), dim=1) - start
    torch.testing.assert_close(ends[0.1], ends[0.0], rtol=1e-4, atol=1e-10)


def test_decay_is_scaled_where_projected_and_whole_elsewhere() -> None:
    """By hand: zero gradients pass the test (cosine 0), so a matrix decays by wd_ratio and a vector in full."""
    for make, full in (
        (lambda p: AdamP(p, lr=0.5, weight_decay=0.2, wd_ratio=0.1), 0.1),
        (lambda p: SGDP(p, lr=0.5, momentum=0.5, weight_decay=0.1, wd_ratio=0.1), 0.1),
    ):
        matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
        matrix.grad, vector.grad = torch.zeros(2, 3), torch.zeros(3)
        make([matrix, vector]).step()
        torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 1 - full / 10))
        torch.testing.assert_close(vector.detach(), torch.full((3,), 1 - full))


def test_zero_weights_stay_finite() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.zeros(3, 4)
    for optimizer in (AdamP([weight], eps=1e-30), SGDP([weight], momentum=0.9, eps=1e-30)):
        optimizer.step()
        assert (weight == 0).all()


@pytest.mark.parametrize("make", [lambda p: AdamP(p, lr=0.01), lambda p: SGDP(p, lr=0.05, momentum=0.9)])
def test_memory_format_changes_nothing(make: Make) -> None:
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = ResNet(3, 4, width=4, blocks=(1, 1)).double().to(memory_format=memory_format)
        x = torch.randn(8, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
        optimizer = make(net.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), torch.arange(8) % 4).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [lambda p: AdamP(p, lr=0.1), lambda p: SGDP(p, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("laid", ["channels_last gradient", "transposed weight", "rows of a larger tensor"])
def test_no_layout_in_memory_is_misread(laid: str, make: Make) -> None:
    """The fused kernels walk through raw memory, and must not be given tensors of different orders."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    grad = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    grad -= plain * ((grad * plain).sum((1, 2, 3)) / plain.square().sum((1, 2, 3)))[:, None, None, None]
    ends = []
    for special in (False, True):
        values, slope = plain.clone(), grad.clone()
        if special and laid == "channels_last gradient":
            slope = slope.to(memory_format=torch.channels_last)
        elif special and laid == "transposed weight":
            values = values.transpose(0, 3).contiguous().transpose(0, 3)
        elif special:
            values = torch.cat([values, values], dim=1)[:, :3]
        weight = nn.Parameter(values)
        optimizer = make([weight])
        for _ in range(3):
            weight.grad = slope
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [lambda p: AdamP(p, lr=0.01, nesterov=True), lambda p: AdamP(p, lr=0.01)])
def test_the_fused_and_the_foreach_path_agree(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator runs, on the CPU."""
    fused, _ = _trajectory("resnet", make)
    monkeypatch.setattr(module, "_one_pass", lambda *_: False)
    monkeypatch.setattr(projection, "on_host", lambda _: False)
    plain, _ = _trajectory("resnet", make)
    torch.testing.assert_close(fused[-1], plain[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", _SGD)
def test_sgdps_fused_and_foreach_path_agree(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = _trajectory("resnet", lambda p: SGDP(p, lr=0.05, **options))
    monkeypatch.setattr(module, "_one_pass", lambda *_: False)
    monkeypatch.setattr(projection, "on_host", lambda _: False)
    plain, _ = _trajectory("resnet", lambda p: SGDP(p, lr=0.05, **options))
    torch.testing.assert_close(fused[-1], plain[-1], rtol=0, atol=1e-12)


def test_parameters_that_join_late_keep_their_own_bias_correction() -> None:
    """The first step of Adam is lr in every entry, whenever it comes."""
    early, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = AdamP([early, late], lr=0.1)
    early.grad = torch.ones(2)
    optimizer.step()
    late.grad = torch.full((2,), -3.0)
    optimizer.step()
    np.testing.assert_allclose(late.detach(), 0.1, rtol=1e-5)
    np.testing.assert_allclose(early.detach(), -0.2, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (AdamP, {"lr": -0.1}, "'lr' must be at least 0, not -0.1"),
        (AdamP, {"betas": (1.0, 0.9)}, r"'betas\[0\]' must be in \[0, 1\), not 1.0"),
        (AdamP, {"betas": (0.9, -0.1)}, r"'betas\[1\]' must be in \[0, 1\), not -0.1"),
        (AdamP, {"eps": 0.0}, "'eps' must be above 0, not 0.0"),
        (AdamP, {"wd_ratio": 2}, r"'wd_ratio' must be in \[0, 1\], not 2"),
        (AdamP, {"delta": float("nan")}, "'delta' must be at least 0, not nan"),
        (SGDP, {"momentum": 1.0}, r"'momentum' must be in \[0, 1\), not 1.0"),
        (SGDP, {"dampening": -1}, r"'dampening' must be in \[0, 1\], not -1"),
        (SGDP, {"weight_decay": -1}, "'weight_decay' must be at least 0, not -1"),
    ],
)
def test_a_bad_hyperparameter_is_named(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind([nn.Parameter(torch.ones(2))], **options)


def test_state_of_another_shape_is_refused() -> None:
    param, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    optimizer = AdamP([param])
    param.grad = torch.ones(2, 3)
    optimizer.step()
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(2, 3\) for parameter 0, which has shape \(3, 2\)"):
        AdamP([other]).load_state_dict(optimizer.state_dict())


def test_a_sparse_gradient_stops_the_step_before_anything_moves() -> None:
    dense, table = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4, 3))
    optimizer = AdamP([{"params": [dense]}, {"params": [table]}])
    (dense.sum() + nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum()).backward()
    with pytest.raises(RuntimeError, match=r"dense gradients, not torch\.sparse_coo"):
        optimizer.step()
    assert (dense == 1).all()


def test_half_precision_keeps_float32_state_through_a_checkpoint() -> None:
    param = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    optimizer = AdamP([param])
    param.grad = torch.full((2, 3), 0.1, dtype=torch.bfloat16)
    optimizer.step()
    other = AdamP([nn.Parameter(param.detach().clone())])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[param].items():
        loaded = next(iter(other.state.values()))[key]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, value)
