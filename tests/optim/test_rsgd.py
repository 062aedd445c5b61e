"""Riemannian SGD against a numpy float64 run of the paper's algorithm, torch's SGD, and a problem with a known answer."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from corollary.linalg import Euclidean, Grassmann, ManifoldParameter, Transposed
from corollary.nn import GrassmannLinear
from corollary.optim import JointOptimizer, RiemannianSGD, split_parameters


def algorithm_1(s: np.ndarray, gradients: list[np.ndarray], lr: float, momentum: float) -> np.ndarray:
    """The paper's algorithm for one frame, line by line, with the geodesic through the thin SVD."""
    m = np.zeros_like(s)
    for d in gradients:
        g = d - s @ (s.T @ d)
        m = m - s @ (s.T @ m)
        m = momentum * m + g
        u, sigma, vt = np.linalg.svd(-lr * m, full_matrices=False)
        s = (s @ vt.T @ np.diag(np.cos(sigma)) + u @ np.diag(np.sin(sigma))) @ vt
    return s


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trajectory_is_the_papers(momentum: float) -> None:
    rng = np.random.default_rng(0)
    manifold = Grassmann(7, 3)
    start = manifold.random_point(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [rng.normal(size=(4, 7, 3)) for _ in range(20)]
    p = ManifoldParameter(start.clone(), manifold)
    optimizer = RiemannianSGD([p], lr=0.1, momentum=momentum)
    for g in gradients:
        p.grad = torch.from_numpy(g)
        optimizer.step()
    expected = [algorithm_1(start[i].numpy(), [g[i] for g in gradients], 0.1, momentum) for i in range(4)]
    np.testing.assert_allclose(p.detach(), expected, atol=1e-11)


def test_trajectory_of_subspaces_is_the_authors_without_momentum_and_differs_with_it() -> None:
    """Their buffer sums Euclidean gradients and only the step is projected; the paper carries the projected momentum."""

    def authors(s: np.ndarray, gradients: list[np.ndarray], lr: float, momentum: float) -> np.ndarray:
        buffer = np.zeros_like(s)
        for d in gradients:
            buffer = momentum * buffer + d
            g = buffer - s @ (s.T @ buffer)
            u, sigma, vt = np.linalg.svd(g, full_matrices=False)
            s = (s @ vt.T @ np.diag(np.cos(-lr * sigma)) + u @ np.diag(np.sin(-lr * sigma))) @ vt
        return s

    rng = np.random.default_rng(1)
    manifold = Grassmann(6, 2)
    start = manifold.random_point(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [rng.normal(size=(6, 2)) for _ in range(5)]
    for momentum, same in ((0.0, True), (0.9, False)):
        p = ManifoldParameter(start.clone(), manifold)
        optimizer = RiemannianSGD([p], lr=0.1, momentum=momentum)
        for g in gradients:
            p.grad = torch.from_numpy(g)
            optimizer.step()
        theirs = torch.from_numpy(authors(start.numpy(), gradients, 0.1, momentum))
        assert (float(manifold.distance(p.detach(), theirs)) < 1e-10) == same


@pytest.mark.parametrize("retraction", ["geodesic", "qr", "polar"])
def test_finds_the_leading_subspace(retraction: str) -> None:
    rng = np.random.default_rng(2)
    q, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    matrix = torch.from_numpy(q @ np.diag([9.0, 8.0, 7.0, *range(3, -4, -1)]) @ q.T)
    manifold = Grassmann(10, 3, retraction)
    p = ManifoldParameter(manifold.random_point(generator=torch.Generator().manual_seed(1), dtype=torch.float64), manifold)
    optimizer = RiemannianSGD([p], lr=0.02, momentum=0.8, maximize=True)
    for _ in range(400):
        optimizer.zero_grad()
        (p.mT @ matrix @ p).trace().backward()
        optimizer.step()
    assert float(manifold.distance(p.detach(), torch.from_numpy(q[:, :3].copy()))) < 1e-10


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_flat_parameters_get_torch_sgd(carried: bool, maximize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(4, 3, generator=generator).requires_grad_(), torch.randn(5, generator=generator).requires_grad_()]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    decay = 0.0 if carried else 0.1
    group = {"params": ours, "manifold": Euclidean()} if carried else {"params": ours}
    a = RiemannianSGD([group], lr=0.1, momentum=0.9, weight_decay=decay, maximize=maximize)
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=decay, maximize=maximize)
    for step in range(6):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = None if step == 0 and x.ndim == 1 else torch.randn(x.shape, generator=generator)
            y.grad = None if x.grad is None else x.grad.clone()
        kept = [x.grad for x in ours]
        a.step()
        b.step()
        for x, y, g in zip(ours, theirs, kept, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
            assert (x.grad is None) == (g is None)
            assert y.grad is None or torch.equal(x.grad, y.grad), "the step wrote into a gradient"


def test_points_are_never_decayed() -> None:
    manifold = Grassmann(5, 2)
    p = ManifoldParameter(manifold.random_point(), manifold)
    before = p.detach().clone()
    optimizer = RiemannianSGD([p], lr=0.5, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("retraction", ["geodesic", "polar"])
def test_the_choice_of_frame_does_not_matter(retraction: str) -> None:
    manifold = Grassmann(8, 3, retraction)
    generator = torch.Generator().manual_seed(3)
    x = manifold.random_point(generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    target = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    ends = []
    for start in (x, x @ q):
        p = ManifoldParameter(start.clone(), manifold)
        optimizer = RiemannianSGD([p], lr=0.05, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            (target @ p @ p.mT).sin().sum().backward()  # a function of the subspace alone
            optimizer.step()
        ends.append(p.detach())
    assert float(manifold.distance(*ends)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_long_runs_stay_on_the_manifold(dtype: torch.dtype) -> None:
    manifold = Transposed(Grassmann(16, 4))
    generator = torch.Generator().manual_seed(0)
    p = ManifoldParameter(manifold.random_point(3, generator=generator, dtype=dtype), manifold)
    optimizer = RiemannianSGD([p], lr=0.05, momentum=0.9)
    for _ in range(500):
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    gram = (p.detach() @ p.detach().mT).double()
    assert float((gram - torch.eye(4)).abs().max()) < 10 * torch.finfo(dtype).eps
    assert p.dtype == optimizer.state[p]["momentum_buffer"].dtype == dtype


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), GrassmannLinear(8, 3, 2))


def _joint(model: nn.Module) -> tuple[JointOptimizer, torch.optim.lr_scheduler.LRScheduler]:
    curved, rest = split_parameters(model)
    optimizer = JointOptimizer([RiemannianSGD(curved, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)])
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(value.detach()))
    return losses


def test_joint_training_learns_and_equals_the_members_stepped_alone() -> None:
    model = _model()
    losses = _train(model, *_joint(model), range(20))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    other = _model()
    curved, rest = split_parameters(other)
    members = [RiemannianSGD(curved, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(m, T_max=20) for m in members]
    for step in range(20):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        other.zero_grad()
        nn.functional.cross_entropy(other(x), x[:, :3].argmax(1)).backward()
        for m in members:
            m.step()
        for s in schedules:
            s.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resume_is_bit_equal_through_a_weights_only_file() -> None:
    whole = _model()
    _train(whole, *_joint(whole), range(12))
    model = _model()
    optimizer, schedule = _joint(model)
    _train(model, optimizer, schedule, range(5))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    model = _model()
    optimizer, schedule = _joint(model)
    for part, state in zip((model, optimizer, schedule), states, strict=True):
        part.load_state_dict(state)
    _train(model, optimizer, schedule, range(5, 12))
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_joint_optimizer_keeps_the_interface_of_one() -> None:
    model = _model()
    optimizer, _ = _joint(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).sum()
        loss.backward()
        return loss

    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    assert torch.is_tensor(optimizer.step(closure))
    assert (len(calls), len(steps)) == (1, 1)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(p in optimizer.state for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.optimizers[0].param_groups[0]["lr"] == 0.5
    twin = copy.deepcopy(optimizer)
    assert len(twin.param_groups) == 2
    assert "JointOptimizer" in repr(optimizer)


def test_grad_scaler_sees_the_joint_optimizer() -> None:
    model = _model()
    optimizer, _ = _joint(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_refusals() -> None:
    p = nn.Parameter(torch.eye(4)[:, :2].clone())
    for keywords, words in (
        ({"lr": -1.0}, "lr must be at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be at least 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            RiemannianSGD([p], **keywords)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        RiemannianSGD([])
    with pytest.raises(ValueError, match=r"must have shape \(..., 5, 2\)"):
        RiemannianSGD([{"params": [p], "manifold": Grassmann(5, 2)}])
    p = nn.Parameter(torch.ones(4, 2))
    with pytest.raises(ValueError, match="must lie on"):
        RiemannianSGD([{"params": [p], "manifold": Grassmann(4, 2)}])
    with pytest.raises(TypeError, match="must be a Manifold"):
        RiemannianSGD([{"params": [p], "manifold": "sphere"}])
    p = ManifoldParameter(torch.eye(4)[:, :2].clone(), Grassmann(4, 2))
    with pytest.raises(ValueError, match="but a parameter of it carries"):
        RiemannianSGD([{"params": [p], "manifold": Grassmann(4, 2, "qr")}])
    sparse = nn.Parameter(torch.ones(3, 2))
    sparse.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        RiemannianSGD([sparse]).step()
    with pytest.raises(ValueError, match="at least one"):
        JointOptimizer([])
    with pytest.raises(TypeError, match="torch optimizers, got int"):
        JointOptimizer([1])
    with pytest.raises(ValueError, match="share parameters; 1 of them"):
        JointOptimizer([torch.optim.SGD([sparse], lr=0.1), torch.optim.Adam([sparse])])
    with pytest.raises(ValueError, match="LBFGS"):
        JointOptimizer([torch.optim.LBFGS([sparse])])
    joint = JointOptimizer([torch.optim.SGD([sparse], lr=0.1)])
    with pytest.raises(TypeError, match="add the group to the member"):
        joint.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match="1 optimizers, got 0"):
        joint.load_state_dict({"optimizers": []})
