"""LionK against a naive loop and published Lions; each kappa against its definition and a convex solver; the theorems."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import lion_pytorch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.optim import L1, Entropic, GroupL2, Huber, Kappa, LionK, LogCosh, Lp

KAPPAS: tuple[Kappa, ...] = (L1(), Lp(2), Lp(1.5), Lp(3), GroupL2(), GroupL2(1), Huber(0.3), LogCosh(0.5), Entropic(0.7))


def _entries(x: np.ndarray, kappa: Kappa) -> tuple[float, np.ndarray]:
    """Value and gradient by the textbook formula, entry by entry."""
    flat, gradient = x.ravel(), np.zeros(x.size)
    value = 0.0
    if isinstance(kappa, Lp):
        value = sum(abs(v) ** kappa.p for v in flat) ** (1 / kappa.p)
        for i, v in enumerate(flat):
            gradient[i] = math.copysign(abs(v) ** (kappa.p - 1) / value ** (kappa.p - 1), v)
    elif isinstance(kappa, Entropic):
        total = sum(math.exp(v / kappa.temperature) for v in flat)
        value = kappa.temperature * math.log(total)
        gradient = np.array([math.exp(v / kappa.temperature) / total for v in flat])
    elif isinstance(kappa, GroupL2):
        gradient = gradient.reshape(x.shape)
        for r in range(x.shape[kappa.dim]):
            place = (slice(None),) * kappa.dim + (r,)
            norm = math.sqrt(sum(v * v for v in x[place].ravel()))
            value += norm
            gradient[place] = x[place] / norm
    else:
        for i, v in enumerate(flat):
            if isinstance(kappa, L1):
                value, gradient[i] = value + abs(v), np.sign(v)
            elif isinstance(kappa, Huber):
                inside = abs(v) <= kappa.delta
                value += v * v / (2 * kappa.delta) if inside else abs(v) - kappa.delta / 2
                gradient[i] = v / kappa.delta if inside else np.sign(v)
            elif isinstance(kappa, LogCosh):
                value += kappa.temperature * math.log(math.cosh(v / kappa.temperature))
                gradient[i] = math.tanh(v / kappa.temperature)
    return value, gradient.reshape(x.shape)


@pytest.mark.parametrize("kappa", KAPPAS, ids=repr)
def test_value_and_gradient_are_the_textbooks(kappa: Kappa) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)) * 2
    value, gradient = _entries(x, kappa)
    assert float(kappa.value(torch.tensor(x))) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(kappa.gradient(torch.tensor(x)).numpy(), gradient, rtol=1e-12, atol=1e-14)
    [batched] = kappa.gradients([torch.tensor(x)])
    np.testing.assert_allclose(batched.numpy(), gradient, rtol=1e-12, atol=1e-14)


def _cvxpy_value(kappa: Kappa, x: cp.Variable) -> cp.Expression:
    if isinstance(kappa, L1):
        return cp.norm1(cp.vec(x, order="C"))
    if isinstance(kappa, Lp):
        return cp.pnorm(cp.vec(x, order="C"), kappa.p)
    if isinstance(kappa, GroupL2):
        return cp.sum(cp.norm(x, 2, axis=1 - kappa.dim))
    if isinstance(kappa, Huber):
        return cp.sum(cp.huber(x, kappa.delta)) / (2 * kappa.delta)
    if isinstance(kappa, LogCosh):
        return kappa.temperature * (
            cp.sum(cp.logistic(2 * x / kappa.temperature) - x / kappa.temperature) - x.size * math.log(2)
        )
    assert isinstance(kappa, Entropic)
    return kappa.temperature * cp.log_sum_exp(x / kappa.temperature)


@pytest.mark.parametrize("kappa", KAPPAS, ids=repr)
def test_the_conjugate_is_the_supremum_that_a_convex_solver_finds(kappa: Kappa) -> None:
    """At a point inside the domain, which a shrunken gradient is; and outside it the supremum is infinite."""
    x = np.random.default_rng(1).normal(size=(2, 3))
    y = kappa.gradient(torch.tensor(x)).numpy()
    if not isinstance(kappa, Entropic):
        y = 0.7 * y
    variable = cp.Variable(y.shape)
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(y, variable)) - _cvxpy_value(kappa, variable)))
    problem.solve(solver=cp.CLARABEL)
    assert float(kappa.conjugate(torch.tensor(y))) == pytest.approx(problem.value, abs=1e-5)
    assert float(kappa.excess(torch.tensor(y))) == pytest.approx(0, abs=1e-12)
    outside = cp.Problem(cp.Maximize(cp.sum(cp.multiply(3 * y, variable)) - _cvxpy_value(kappa, variable)))
    outside.solve(solver=cp.CLARABEL)
    assert outside.value == math.inf
    assert float(kappa.excess(torch.tensor(3 * y))) > 0.1


@given(
    index=st.integers(0, len(KAPPAS) - 1),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_fenchel_young_holds_with_equality_at_the_gradient(index: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    """κ(x) + κ*(∇κ(x)) = ⟨x, ∇κ(x)⟩, at sizes where a careless power over- or underflows too; and 0 goes to a point inside."""
    kappa = KAPPAS[index]
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(3, 4, generator=generator, dtype=dtype)
    y = kappa.gradient(x.clone())
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    assert float(kappa.excess(y)) <= precision
    gap = float(kappa.value(x) + kappa.conjugate(y) - (x * y).sum())
    assert abs(gap) <= 20 * precision * max(scale, 1.0)
    assert float(kappa.excess(kappa.gradient(torch.zeros(3, 4, dtype=dtype)))) <= precision


def _problem(seed: int, size: tuple[int, ...] = (3, 4)) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """A convex quadratic of one tensor, a start, and the Lipschitz constant of its gradient."""
    generator = torch.Generator().manual_seed(seed)
    entries = math.prod(size)
    root = torch.randn(entries, entries, generator=generator, dtype=torch.float64)
    hessian = root @ root.T / entries + 0.1 * torch.eye(entries, dtype=torch.float64)
    centre = 2 * torch.randn(entries, generator=generator, dtype=torch.float64)
    start = torch.randn(size, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        gap = x.flatten() - centre
        return gap @ hessian @ gap / 2

    return loss, start, float(torch.linalg.eigvalsh(hessian)[-1])


@pytest.mark.parametrize("kappa", KAPPAS, ids=repr)
def test_the_trajectory_is_the_papers_iteration(kappa: Kappa) -> None:
    """m as the paper has it, the gradient's negative, in numpy."""
    loss, start, _ = _problem(3)
    weight = nn.Parameter(start.clone())
    optimizer = LionK([weight], lr=0.05, betas=(0.8, 0.95), weight_decay=0.5, kappa=kappa)
    x, m = start.numpy().copy(), np.zeros(start.shape)
    for _ in range(15):
        point = torch.tensor(x, requires_grad=True)
        [gradient] = torch.autograd.grad(loss(point), point)
        mixed = 0.8 * m - 0.2 * gradient.numpy()
        m = 0.95 * m - 0.05 * gradient.numpy()
        x = x + 0.05 * (_entries(mixed, kappa)[1] - 0.5 * x)
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), x, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[weight]["exp_avg"].numpy(), -m, rtol=1e-9, atol=1e-12)


def test_with_the_sign_it_is_the_published_lion() -> None:
    ends = []
    for make in (LionK, lion_pytorch.Lion):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
        optimizer = make(net.parameters(), lr=0.01, weight_decay=0.3)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


@given(
    index=st.integers(0, len(KAPPAS) - 1),
    seed=st.integers(0, 10_000),
    lr=st.floats(0.001, 0.3),
    decay=st.floats(0.1, 3.0),
    far=st.floats(0.1, 100),
)
@settings(max_examples=60, deadline=None)
def test_phase_one_enters_the_domain_geometrically(index: int, seed: int, lr: float, decay: float, far: float) -> None:
    """excess(λx) falls by the factor 1 - ηλ a step or faster, whatever the gradients; from inside it stays inside."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(far * torch.randn(3, 4, generator=generator, dtype=torch.float64))
    optimizer = LionK([weight], lr=lr, weight_decay=decay, kappa=KAPPAS[index])
    before = float(optimizer.excess())
    for _ in range(5):
        weight.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        optimizer.step()
        after = float(optimizer.excess())
        assert after <= (1 - lr * decay) * before + 1e-12 * (1 + far)
        before = after


@given(
    index=st.integers(0, len(KAPPAS) - 1),
    seed=st.integers(0, 10_000),
    lr=st.floats(0.001, 0.2),
    betas=st.sampled_from([(0.9, 0.99), (0.5, 0.9), (0.0, 0.9), (0.9, 0.9)]),
)
@settings(max_examples=60, deadline=None)
def test_phase_two_lowers_the_lyapunov_function_up_to_the_second_order(
    index: int, seed: int, lr: float, betas: tuple[float, float]
) -> None:
    """H' - H <= L/2 ‖x' - x‖², for any step size and any κ, once λx is feasible."""
    loss, _, lipschitz = _problem(seed)
    kappa, decay = KAPPAS[index], 0.6
    generator = torch.Generator().manual_seed(seed)
    feasible = kappa.gradient(torch.randn(3, 4, generator=generator, dtype=torch.float64)) / decay
    weight = nn.Parameter(feasible if isinstance(kappa, Entropic) else 0.9 * feasible)
    optimizer = LionK([weight], lr=lr, betas=betas, weight_decay=decay, kappa=kappa)
    before = float(optimizer.lyapunov(loss(weight.detach())))
    for _ in range(15):
        old = weight.detach().clone()
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()
        after = float(optimizer.lyapunov(loss(weight.detach())))
        assert after - before <= lipschitz / 2 * float((weight.detach() - old).square().sum()) + 1e-9
        before = after


@dataclass(frozen=True)
class Quartic(Kappa):
    """A kappa of a user's own: the sum of fourth powers, with no bound on λx."""

    def value(self, x: Tensor) -> Tensor:
        return x.pow(4).sum() / 4

    def gradient(self, x: Tensor) -> Tensor:
        return x.pow(3)

    def conjugate(self, y: Tensor) -> Tensor:
        return 3 / 4 * y.abs().pow(4 / 3).sum()

    def excess(self, y: Tensor) -> Tensor:
        return torch.zeros((), dtype=y.dtype)


def test_a_kappa_of_ones_own_solves_its_problem() -> None:
    """f + κ*(λx)/λ with κ* = (3/4) Σ |y|^(4/3) has ∇f + |λx|^(1/3) sign x = 0."""
    weight = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
    optimizer = LionK([weight], lr=0.02, weight_decay=1.0, kappa=Quartic())
    for _ in range(3000):
        optimizer.zero_grad()
        ((weight - torch.tensor([2.0, -3.0])) ** 2).sum().backward()
        optimizer.step()
    x = weight.detach()
    torch.testing.assert_close(2 * (x - torch.tensor([2.0, -3.0])), -x.sign() * x.abs() ** (1 / 3), rtol=1e-6, atol=1e-6)


def test_groups_may_have_different_kappas_and_the_state_knows_them() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    optimizer = LionK([{"params": [matrix], "kappa": GroupL2()}, {"params": [vector]}], lr=0.1)
    matrix.grad, vector.grad = torch.ones(2, 3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 1 - 0.1 / 3**0.5))
    torch.testing.assert_close(vector.detach(), torch.full((3,), 0.9))
    saved = optimizer.state_dict()
    assert [group["kappa"] for group in saved["param_groups"]] == ["GroupL2(dim=0)", "L1()"]
    other = LionK([{"params": [nn.Parameter(torch.ones(2, 3))], "kappa": GroupL2()}, {"params": [nn.Parameter(torch.ones(3))]}])
    other.load_state_dict(saved)
    assert [group["kappa"] for group in other.param_groups] == [GroupL2(), L1()]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.1]
    with pytest.raises(ValueError, match=r"saved with kappa GroupL2\(dim=0\) in group 0, which has L1\(\)"):
        LionK([{"params": [matrix]}, {"params": [vector]}]).load_state_dict(saved)


@pytest.mark.parametrize("kappa", KAPPAS, ids=repr)
def test_foreach_equals_the_loop_for_every_kappa(kappa: Kappa) -> None:
    ends = []
    for flag in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((3, 4), (5,), (2, 3, 2, 2), (0, 3), ())]
        optimizer = LionK(params, lr=0.1, weight_decay=0.5, kappa=kappa, foreach=flag)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: LionK(p, lr=-0.1), ValueError, "'lr' must be at least 0, not -0.1"),
        (lambda p: LionK(p, betas=(0.9, 1.0)), ValueError, r"'betas\[1\]' must be in \[0, 1\), not 1.0"),
        (lambda p: LionK(p, weight_decay=-1), ValueError, "'weight_decay' must be at least 0, not -1"),
        (lambda p: LionK(p, kappa="l1"), TypeError, "'kappa' must be a Kappa, such as L1"),
        (lambda p: Lp(1.0), ValueError, "'p' must be above 1 and finite, not 1.0"),
        (lambda p: Huber(0.0), ValueError, "'delta' must be above 0 and finite, not 0.0"),
        (lambda p: Entropic(-1.0), ValueError, "'temperature' must be above 0 and finite, not -1.0"),
        (lambda p: GroupL2(-1), ValueError, "'dim' must be at least 0, not -1"),
        (lambda p: LionK(p).lyapunov(0.0), ValueError, r"'lr' \* 'weight_decay' must be in \(0, 1\)"),
        (lambda p: LionK(p, betas=(0.9, 0.5), weight_decay=1).lyapunov(0.0), ValueError, "'betas' must not fall"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", KAPPAS, ids=repr)
def test_a_nan_is_not_hidden(kappa: Kappa, dtype: torch.dtype) -> None:
    """The sign of NaN is 0 to torch."""
    matrix, vector = nn.Parameter(torch.ones(2, 3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = LionK([matrix, vector], kappa=kappa)
    for p in (matrix, vector):
        p.grad = torch.ones_like(p)
        p.grad.view(-1)[1] = float("nan")
    optimizer.step()
    assert matrix[0, 1].isnan()
    assert vector[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lions_step_is_lr_in_every_entry_and_dtype(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(5, dtype=dtype))
    weight.grad = torch.tensor([1e-4, -1e4, 0.0, 3.0, -1.0], dtype=dtype)
    LionK([weight], lr=0.25).step()
    wanted = torch.tensor([-0.25, 0.25, 0.0, -0.25, 0.25], dtype=dtype)
    torch.testing.assert_close(weight.detach(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
