"""M-FAC against dense inverses, the paper's recursion written as a loop, and the exact pruning problem."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import prune

from corollary.linalg import SymmetricOperator
from corollary.linalg import fisher as fisher_module
from corollary.memory import peak_bytes
from corollary.models import MLP
from corollary.optim import MFAC, MatrixFreeFisher, SlidingFisher, mfac_prune


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _dense(gradients: Tensor, damp: float, block_size: int | None = None) -> Tensor:
    m, d = gradients.shape
    fisher = damp * torch.eye(d, dtype=torch.float64)
    for g in gradients:
        fisher += torch.outer(g, g) / m
    if block_size is not None:
        block = torch.arange(d) // block_size
        fisher[block.unsqueeze(0) != block.unsqueeze(1)] = 0
    return fisher


# ------------------------------------------------------------------------------------------------------ static algorithm


@given(
    m=st.integers(1, 8),
    d=st.integers(1, 20),
    damp=st.floats(1e-4, 10),
    block_size=st.none() | st.integers(1, 25),
    in_place=st.booleans(),
    seed=st.integers(0, 2**31 - 2),
)
@settings(max_examples=60, deadline=None)
def test_the_static_inverse_is_the_dense_one(
    m: int, d: int, damp: float, block_size: int | None, in_place: bool, seed: int
) -> None:
    gradients = _draw(m, d, seed=seed)
    inverse = torch.linalg.inv(_dense(gradients, damp, block_size))
    given, begin = gradients.clone(), gradients.clone()
    ours = MatrixFreeFisher(given, damp, block_size=block_size, in_place=in_place)
    assert in_place or torch.equal(given, begin)
    x = _draw(d, 3, seed=seed + 1)
    close: dict[str, float] = {"rtol": 1e-7, "atol": 1e-9 / damp}
    torch.testing.assert_close(ours.solve(x), inverse @ x, **close)
    torch.testing.assert_close(ours.solve(x[:, 0]), inverse @ x[:, 0], **close)
    torch.testing.assert_close(ours.inverse_diagonal(), inverse.diagonal(), **close)
    i, j = torch.arange(d).unsqueeze(1), torch.arange(-d, 0)
    torch.testing.assert_close(ours.inverse_element(i, j), inverse, **close)
    assert ours.inverse_element(d - 1, 0).shape == ()


@pytest.mark.parametrize("block_size", [None, 3])
def test_its_vectors_are_those_of_the_papers_recursion(block_size: int | None) -> None:
    """v_i = F_{i-1}⁻¹ g_i by Sherman-Morrison, one gradient after another, scaled by 1 / √(m + g_iᵀ v_i)."""
    gradients, damp = _draw(5, 8), 0.01
    wanted = torch.zeros_like(gradients)
    for begin in range(0, 8, block_size or 8):
        part = slice(begin, begin + (block_size or 8))
        for i in range(5):
            g = gradients[i, part]
            v = g / damp - sum((wanted[k, part] * (wanted[k, part] @ g) for k in range(i)), torch.zeros_like(g))
            wanted[i, part] = v / (5 + g @ v).sqrt()
    torch.testing.assert_close(MatrixFreeFisher(gradients, damp, block_size=block_size)._rows, wanted)


@pytest.mark.parametrize("block_size", [None, 4])
def test_the_removal_step_solves_the_pruning_problem(block_size: int | None) -> None:
    """Against the minimum of δᵀFδ with δ fixed on Q, by eliminating the other entries of the dense matrix."""
    gradients, w = _draw(6, 10), _draw(10, seed=1)
    removed = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    fisher = _dense(gradients, 0.01, block_size)
    wanted = -w.clone()
    wanted[~removed] = torch.linalg.solve(fisher[~removed][:, ~removed], fisher[~removed][:, removed] @ w[removed])
    ours = MatrixFreeFisher(gradients, 0.01, block_size=block_size)
    torch.testing.assert_close(ours.removal_step(w, removed), wanted)
    inverse = torch.linalg.inv(fisher)
    single = sum((-w[i] / inverse[i, i] * inverse[i] for i in removed.nonzero().flatten()), torch.zeros_like(w))
    separate = ours.removal_step(w, removed, joint=False)
    torch.testing.assert_close(separate[~removed], single[~removed])
    torch.testing.assert_close(separate[removed], -w[removed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_loses_its_own_rounding_alone(dtype: torch.dtype) -> None:
    gradients, x = _draw(16, 400, dtype=dtype), _draw(400, seed=1, dtype=dtype)
    ours = MatrixFreeFisher(gradients, 0.1)
    exact = torch.linalg.solve(_dense(gradients.double(), 0.1), x.double())
    assert ours.solve(x).dtype == ours.inverse_diagonal().dtype == dtype
    error = (ours.solve(x).double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_the_diagonal_stays_above_its_bound_when_rounding_eats_it() -> None:
    """One gradient of one entry, 1e8 times the damping in square: 1/λ - u² is pure rounding in float32."""
    ours = MatrixFreeFisher(torch.tensor([[1e3, 0.0]]), 1e-6)
    torch.testing.assert_close(ours.inverse_diagonal(), torch.tensor([1e-6, 1e6]))


def test_setting_up_in_place_takes_no_memory_to_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_module, "_CHUNK_BYTES", 2**16)
    gradients = torch.randn(16, 60_000)
    taken = peak_bytes(lambda: MatrixFreeFisher(gradients, in_place=True))
    assert taken < 0.2 * gradients.nbytes
    assert peak_bytes(lambda: MatrixFreeFisher(torch.randn(16, 60_000))) > 2 * gradients.nbytes


def test_the_static_inverse_is_a_symmetric_operator() -> None:
    operator: SymmetricOperator = MatrixFreeFisher(_draw(3, 6), 0.1)
    assert (operator.shape, operator.dtype) == ((6, 6), torch.float64)
    torch.testing.assert_close((operator @ torch.eye(6)).mT, operator @ torch.eye(6))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MatrixFreeFisher(torch.ones(2, 2, dtype=torch.int64)), TypeError, "'gradients' must be .*not torch.int64"),
        (lambda: MatrixFreeFisher(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "not torch.complex64"),
        (lambda: MatrixFreeFisher(torch.ones(3)), ValueError, r"'gradients' must be \(m, d\).*not \(3,\)"),
        (lambda: MatrixFreeFisher(torch.ones(0, 3)), ValueError, r"not \(0, 3\)"),
        (lambda: MatrixFreeFisher(torch.tensor([[1.0, torch.nan]])), ValueError, "'gradients' must be finite"),
        (lambda: MatrixFreeFisher(torch.tensor([[1.0, torch.inf]]), block_size=1), ValueError, "'gradients' must be finite"),
        (lambda: MatrixFreeFisher(torch.ones(2, 2), 0), ValueError, "'damp' must be above 0 and finite, not 0"),
        (lambda: MatrixFreeFisher(torch.full((2, 2), 1e9), 1e-9), ValueError, "'damp' is too small"),
        (lambda: MatrixFreeFisher(torch.ones(2, 2), block_size=0), ValueError, "'block_size' must be at least 1"),
        (lambda: MatrixFreeFisher(torch.ones(1, 2).expand(3, 2), in_place=True), ValueError, "'in_place' needs"),
        (lambda: MatrixFreeFisher(torch.ones(2, 3)).solve(torch.ones(2)), ValueError, r"'x' must be \(3,\).*not \(2,\)"),
        (lambda: MatrixFreeFisher(torch.ones(2, 3)).solve(torch.ones(3, dtype=torch.int64)), TypeError, "'x' must be real"),
        (lambda: MatrixFreeFisher(torch.ones(2, 3)).inverse_element(3, 0), ValueError, r"'i' must lie in \[-3, 3\)"),
        (lambda: MatrixFreeFisher(torch.ones(2, 3)).inverse_element(0, torch.ones(1)), TypeError, "'j' must be an integer"),
        (
            lambda: MatrixFreeFisher(torch.ones(2, 3)).removal_step(torch.ones(2), torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"'weight' must be \(3,\), not \(2,\)",
        ),
        (lambda: MatrixFreeFisher(torch.ones(2, 3)).removal_step(torch.ones(3), torch.ones(3)), TypeError, "must be bool"),
    ],
)
def test_the_static_inverse_refuses_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# ----------------------------------------------------------------------------------------------------- dynamic algorithm


@given(
    m=st.integers(1, 6),
    steps=st.integers(1, 15),
    damp=st.floats(1e-3, 10),
    shapes=st.lists(st.sampled_from([(3,), (2, 4), (1,), (0, 2), (2, 1, 3)]), min_size=1, max_size=4),
    seed=st.integers(0, 2**31 - 2),
)
@settings(max_examples=40, deadline=None)
def test_the_sliding_inverse_is_the_dense_one(
    m: int, steps: int, damp: float, shapes: list[tuple[int, ...]], seed: int
) -> None:
    sizes = [int(torch.Size(s).numel()) for s in shapes]
    d = sum(sizes)
    flat, window = _draw(steps, d, seed=seed), torch.zeros(m, d, dtype=torch.float64)
    ours = SlidingFisher([torch.zeros(m, *s, dtype=torch.float64) for s in shapes], damp)

    def pieces(x: Tensor) -> list[Tensor]:
        return [p.view(s) for p, s in zip(torch.split(x, sizes), shapes, strict=True)]

    for t, g in enumerate(flat):
        window[t % m] = g
        ours.update(t % m, pieces(g))
    dense, x = _dense(window, damp), _draw(d, seed=seed + 1)
    for got, wanted in ((ours.solve(pieces(x)), x), (ours.solve_row((steps - 1) % m), flat[-1])):
        result = torch.cat([p.reshape(-1) for p in got])
        torch.testing.assert_close(result, torch.linalg.solve(dense, wanted), rtol=1e-7, atol=1e-9 / damp)
    torch.testing.assert_close(ours.gram, window @ window.T)
    torch.testing.assert_close(SlidingFisher(ours.windows, damp).gram, ours.gram)


def test_a_product_with_the_windows_own_gradient_keeps_float32s_digits() -> None:
    """(x - Gᵀ…)/λ subtracts nearly equal numbers there; the other form of the same product does not."""
    gradients, damp = _draw(8, 100, dtype=torch.float32), 1e-7
    ours = SlidingFisher([gradients.clone()], damp)
    exact = torch.linalg.solve(_dense(gradients.double(), damp), gradients[3].double())
    [row] = ours.solve_row(3)
    assert (row.double() - exact).norm() / exact.norm() < 1e-5


def test_missing_pieces_are_zeros_and_a_failed_update_changes_nothing() -> None:
    ours = SlidingFisher([torch.zeros(2, 3), torch.zeros(2, 2)], 0.1)
    ours.update(0, [torch.ones(3), torch.ones(2)])
    ours.update(0, [torch.ones(3), None])
    assert ours.windows[1].count_nonzero() == 0
    before = [w.clone() for w in (*ours.windows, ours.gram)]
    for bad in (torch.nan, torch.inf, 1e18):
        with pytest.raises(ValueError, match="finite" if bad != 1e18 else "'damp' is too small"):
            ours.update(1, [torch.full((3,), bad), torch.ones(2)])
    assert all(torch.equal(a, b) for a, b in zip(before, (*ours.windows, ours.gram), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SlidingFisher([]), ValueError, "'windows' is empty"),
        (lambda: SlidingFisher([torch.zeros(2, 3, dtype=torch.int64)]), TypeError, r"'windows\[0\]' must be real"),
        (lambda: SlidingFisher([torch.zeros(2, 3), torch.zeros(3, 3)]), ValueError, r"'windows\[1\]' has shape \(3, 3\)"),
        (lambda: SlidingFisher([torch.zeros(3, 2).T]), ValueError, r"'windows\[0\]' must be contiguous"),
        (lambda: SlidingFisher([torch.zeros(2, 3)], -1), ValueError, "'damp' must be above 0 and finite, not -1"),
        (lambda: SlidingFisher([torch.zeros(2, 3)], gram=torch.zeros(2, 2)), ValueError, "'gram' must be .*float64"),
        (lambda: SlidingFisher([torch.zeros(2, 3)]).update(2, [torch.ones(3)]), IndexError, "'row' must be from 0 to 1, not 2"),
        (lambda: SlidingFisher([torch.zeros(2, 3)]).solve_row(-1), IndexError, "'row' must be from 0 to 1, not -1"),
        (
            lambda: SlidingFisher([torch.zeros(2, 3)]).update(0, [torch.ones(3, dtype=torch.int64)]),
            TypeError,
            r"'gradients\[0\]' must be real and floating, not torch\.int64",
        ),
        (lambda: SlidingFisher([torch.zeros(2, 3)]).update(0, []), ValueError, "each of the 1 windows, not 0"),
        (lambda: SlidingFisher([torch.zeros(2, 3)]).solve([torch.ones(2)]), ValueError, r"'vectors\[0\]' has shape \(2,\)"),
    ],
)
def test_the_sliding_inverse_refuses_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# ------------------------------------------------------------------------------------------------------------- optimizer


def test_steps_equal_those_of_the_authors_formulas_on_a_network() -> None:
    """Their loop: weight decay into the gradient, ring buffer, Woodbury by rank-one terms, mean of steps."""
    torch.manual_seed(0)
    net = MLP(4, [5], 3).double()
    lr, beta, decay, m, damp = 0.05, 0.9, 0.01, 4, 1e-3
    optimizer = MFAC(net.parameters(), lr, beta, decay, m, damp)
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    window, v = torch.zeros(m, theta.numel(), dtype=torch.float64), torch.zeros_like(theta)
    for t in range(10):
        x, y = _draw(6, 4, seed=t), torch.arange(6) % 3
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        g = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]) + decay * theta
        optimizer.step()
        window[t % m] = g
        inverse = torch.eye(theta.numel(), dtype=torch.float64) / damp
        for row in window:
            product = inverse @ row
            inverse -= torch.outer(product, product) / (m + row @ product)
        v = beta * v + (1 - beta) * (inverse @ g)
        theta = theta - lr * v
        ours = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        torch.testing.assert_close(ours, theta, rtol=1e-9, atol=1e-9)
        theta = ours.clone()  # a ReLU that flips on the last bit must not pile up
    x = [torch.ones_like(p) for p in net.parameters()]
    flat = torch.cat([p.reshape(-1) for p in optimizer.inverse_fisher_product(x)])
    torch.testing.assert_close(flat, inverse.sum(1), rtol=1e-8, atol=1e-8)


def test_a_parameter_without_gradient_counts_as_zero_and_stays() -> None:
    a, b = (nn.Parameter(_draw(3, seed=s)) for s in (0, 1))
    optimizer = MFAC([a, b], lr=0.1, ngrads=4, damp=0.1)
    for t in range(6):
        optimizer.zero_grad()
        ((a**2).sum() + ((a * b).sum() if t % 2 == 0 else 0)).backward()
        before = b.detach().clone()
        optimizer.step()
        assert torch.equal(before, b.detach()) == (t % 2 == 1)
    assert [bool(row.any()) for row in optimizer.state[b]["grads"]] == [True, False, True, False]
    gram = optimizer.state[a]["gram"]
    window = torch.cat([optimizer.state[p]["grads"] for p in (a, b)], 1)
    torch.testing.assert_close(gram, window @ window.T)


def test_the_window_does_not_move_with_the_first_parameter_alone() -> None:
    """The scalar products outlive that the parameter which keeps them is not the first any more."""
    late, early = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MFAC([late, early], lr=0.1, ngrads=3, damp=0.1)
    for t in range(5):
        optimizer.zero_grad()
        ((early**2).sum() + ((late**2).sum() if t > 1 else 0)).backward()
        optimizer.step()
    assert "gram" in optimizer.state[early]
    assert "gram" not in optimizer.state[late]
    resumed = MFAC([nn.Parameter(late.detach().clone()), nn.Parameter(early.detach().clone())])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, resumed):
        one.zero_grad()
        sum((p**2).sum() for p in one.param_groups[0]["params"]).backward()
        one.step()
    for p, q in zip(optimizer.param_groups[0]["params"], resumed.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_half_precision_and_the_scalar_products_keep_their_dtypes_through_a_checkpoint() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MFAC([param], momentum=0.9, ngrads=2)
    (param**4).sum().backward()
    optimizer.step()
    other = MFAC([nn.Parameter(param.detach().clone())])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded = next(iter(other.state.values()))
    assert {k: v.dtype for k, v in loaded.items()} == {
        "grads": torch.float32, "momentum_buffer": torch.float32, "gram": torch.float64,
    }  # fmt: skip
    assert all(torch.equal(loaded[k], v) for k, v in optimizer.state[param].items())


def test_masked_weights_stay_where_the_mask_is() -> None:
    """What the authors' ``sparse`` option does: entries without a gradient take no step."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    begin = layer.weight_orig.detach().clone()
    optimizer = MFAC(layer.parameters(), lr=0.01, ngrads=3, damp=1e-2)
    for t in range(5):
        optimizer.zero_grad()
        mse_loss(layer(_draw(8, 4, seed=t, dtype=torch.float32)), torch.ones(8, 2)).backward()
        optimizer.step()
    same = layer.weight_orig.detach() == begin
    assert torch.equal(same, layer.weight_mask == 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, "'lr' must be at least 0, not -0.1"),
        ({"momentum": 1.0}, r"'momentum' must be in \[0, 1\), not 1.0"),
        ({"weight_decay": -1}, "'weight_decay' must be at least 0, not -1"),
        ({"ngrads": 0}, "'ngrads' must be an integer of at least 1, not 0"),
        ({"ngrads": 2.5}, "'ngrads' must be an integer of at least 1, not 2.5"),
        ({"damp": 0}, "'damp' must be above 0 and finite, not 0"),
        ({"damp": float("nan")}, "'damp' must be above 0 and finite, not nan"),
    ],
)
def test_a_bad_hyperparameter_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MFAC([nn.Parameter(torch.ones(2))], **options)


def test_groups_share_the_window() -> None:
    optimizer = MFAC([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="'ngrads' must be the same in every group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "ngrads": 2})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="int64, not floating"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)]})
    with pytest.raises(RuntimeError, match="the window is empty"):
        optimizer.inverse_fisher_product([torch.ones(2)])


def test_a_nan_is_refused_before_anything_changes() -> None:
    old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MFAC([old, new], ngrads=3)
    (old**2).sum().backward()
    optimizer.step()
    state, before = copy.deepcopy(optimizer.state_dict()), old.detach().clone()
    old.grad, new.grad = torch.ones(2), torch.tensor([0.0, torch.nan])
    with pytest.raises(ValueError, match="'gradients' must be finite"):
        optimizer.step()
    assert torch.equal(old.detach(), before)
    assert new not in optimizer.state
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    for key, value in state["state"][0].items():
        assert torch.equal(optimizer.state[old][key], value)


def test_a_state_of_another_shape_is_refused() -> None:
    one = nn.Parameter(torch.ones(2))
    optimizer = MFAC([one], ngrads=3)
    one.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"state 'grads' of parameter 0 has shape \(3, 2\); this one needs \(3, 4\)"):
        MFAC([nn.Parameter(torch.ones(4))]).load_state_dict(optimizer.state_dict())


# --------------------------------------------------------------------------------------------------------------- pruning


def _batches(n: int = 30) -> list[tuple[Tensor, Tensor]]:
    return [(_draw(1, 4, seed=i), torch.tensor([i % 3])) for i in range(n)]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def _network(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(4, [6], 3).double()


@pytest.mark.parametrize("update", ["joint", "separate", "none"])
@pytest.mark.parametrize("block_size", [None, 7])
def test_pruning_is_optimal_brain_surgeon_with_the_dense_inverse(update: str, block_size: int | None) -> None:
    net, damp = _network(), 1e-2
    layers = [net.body[0], net.head]
    w = torch.cat([layer.weight.detach().reshape(-1) for layer in layers])
    weights = [layer.weight for layer in layers]
    rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(_loss(net, b), weights)]) for b in _batches()]
    fisher = _dense(torch.stack(rows), damp, block_size)
    inverse = torch.linalg.inv(fisher)
    order = sorted(range(len(w)), key=lambda i: float(w[i] ** 2 / inverse[i, i]))
    gone, rest = order[: round(0.6 * len(w))], order[round(0.6 * len(w)) :]
    wanted = w.clone()
    if update == "joint":
        wanted[rest] += torch.linalg.solve(fisher[rest][:, rest], fisher[rest][:, gone] @ w[gone])
    elif update == "separate":
        for i in gone:
            wanted[rest] -= w[i] / inverse[i, i] * inverse[i, rest]
    wanted[gone] = 0
    masks = mfac_prune(net, _batches(), _loss, 0.6, damp=damp, block_size=block_size, update=update)
    assert list(masks) == ["body.0.weight", "head.weight"]
    torch.testing.assert_close(torch.cat([layer.weight.detach().reshape(-1) for layer in layers]), wanted)
    assert torch.cat([m.reshape(-1) for m in masks.values()]).nonzero().flatten().tolist() == sorted(rest)
    assert all(p.grad is None for p in net.parameters())


def test_masks_of_torch_prune_go_in_and_out() -> None:
    net = _network().train()
    prune.random_unstructured(net.body[0], "weight", amount=10)
    before = net.body[0].weight_mask.clone()
    chosen = [(net.body[0], "weight")]
    masks = mfac_prune(net, _batches(), _loss, 0.75, parameters=chosen, damp=1e-2, recomputations=3)
    assert net.training
    [(name, mask)] = masks.items()
    assert name == "body.0.weight"
    assert int(mask.sum()) == 6
    assert not (mask & (before == 0)).any(), "what was pruned before came back"
    assert torch.equal(net.body[0].weight != 0, mask)
    assert not prune.is_pruned(net.head)
    with pytest.raises(ValueError, match=r"'sparsity' is 0\.5, but masks have removed a share of 0\.7500"):
        mfac_prune(net, _batches(), _loss, 0.5, parameters=chosen)
    prune.remove(net.body[0], "weight")
    assert int(net.body[0].weight.count_nonzero()) == 6


def test_recomputations_take_new_gradients_each_time() -> None:
    seen: list[int] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert not model.training
        seen.append(sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 2))
        return _loss(model, batch)

    mfac_prune(_network(), _batches(2), loss, 0.75, recomputations=2, damp=0.1)
    assert seen == [42, 42, 21, 21]  # 42 weights, half of them, a quarter in the end


def test_an_iterator_without_length_gives_the_same() -> None:
    one, two = _network(), _network()
    mfac_prune(one, _batches(), _loss, 0.5, damp=0.1)
    mfac_prune(two, iter(_batches()), _loss, 0.5, damp=0.1)
    assert torch.equal(one.head.weight, two.head.weight)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, ValueError, r"'sparsity' must be in \(0, 1\), not 1.0"),
        ({"recomputations": 0}, ValueError, "'recomputations' must be at least 1"),
        ({"update": "all"}, ValueError, "'update' must be one of joint, separate, none, not 'all'"),
        ({"batches": []}, ValueError, "'batches' is empty"),
        ({"loss": lambda m, b: 0.0}, TypeError, "'loss' must give a scalar tensor, not float"),
        ({"loss": lambda m, b: m(b[0])}, TypeError, r"not of shape \(1, 3\)"),
        ({"loss": lambda m, b: m(b[0]).sum() * torch.nan}, ValueError, "'gradients' must be finite"),
        ({"parameters": []}, ValueError, "'parameters' is empty"),
        ({"damp": -1.0}, ValueError, "'damp' must be above 0"),
    ],
)
def test_pruning_refuses_bad_input(options: dict[str, Any], error: type[Exception], words: str) -> None:
    net = _network()
    before = copy.deepcopy(net.state_dict())
    given: dict[str, Any] = {"batches": _batches(), "loss": _loss, "sparsity": 0.5, **options}
    with pytest.raises(error, match=words):
        mfac_prune(net, given.pop("batches"), given.pop("loss"), given.pop("sparsity"), **given)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_pruning_names_a_parameter_that_it_cannot_prune() -> None:
    net = _network()
    with pytest.raises(TypeError, match=r"'parameters\[0\]': MLP has no parameter 'weight'"):
        mfac_prune(net, _batches(), _loss, 0.5, parameters=[(net, "weight")])
    with pytest.raises(ValueError, match="'parameters' has one parameter twice"):
        mfac_prune(net, _batches(), _loss, 0.5, parameters=[(net.head, "weight")] * 2)
    net.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'parameters\[1\]' does not require gradients"):
        mfac_prune(net, _batches(), _loss, 0.5)
