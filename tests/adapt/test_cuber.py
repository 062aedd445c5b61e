"""GPM, CUBER and EWC against naive float64 oracles, and what their theory promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from corollary.adapt import CUBER, EWC, GPM
from corollary.adapt.continual import layer_inputs

# ------------------------------------------------------------------------------------------------------------------ oracles


def gpm_oracle(tasks, threshold):
    """Bases by numpy's SVD of the inputs themselves, with equations 5, 8 and 9 followed vector by vector."""
    basis = None
    for rows in tasks:
        r = rows.T
        if basis is None:
            basis = np.zeros((len(r), 0))
        total = (r**2).sum()
        left = r - basis @ basis.T @ r
        u, s, _ = np.linalg.svd(left, full_matrices=False)
        held = total - (left**2).sum()
        for vector, sigma in zip(u.T, s, strict=True):
            if held >= threshold * total or sigma**2 <= 1e-12 * total:
                break
            basis = np.column_stack([basis, vector])
            held += sigma**2
    return basis


def small_net(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()


def task(seed, n=8, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g, dtype=torch.float64) + shift, torch.randint(3, (n,), generator=g)


def loss_on(net, data):
    return lambda: F.cross_entropy(net(data[0]), data[1], reduction="none")


def train(net, data, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(net, data)().mean().backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------- GPM


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 1.0])
def test_gpm_bases_equal_the_singular_vectors(threshold):
    net = small_net(bias=False)
    memory = GPM(net, threshold=threshold)
    tasks = []
    for seed in range(3):
        x, y = task(seed, n=3)
        memory.end_task(loss_on(net, (x, y)))
        tasks.append((x.numpy(), torch.tanh(net[0](x)).detach().numpy()))
    for layer, name in enumerate(("0", "2")):
        expected = gpm_oracle([t[layer] for t in tasks], threshold)
        ours = memory.bases[name].numpy()
        assert ours.shape == expected.shape
        assert np.abs(ours @ ours.T - expected @ expected.T).max() < 1e-6
        assert np.abs(ours.T @ ours - np.eye(ours.shape[1])).max() < 1e-12


def test_gpm_step_equals_projected_sgd_by_hand():
    net, twin = small_net(), small_net()
    memory = GPM(net, threshold=0.8)
    memory.end_task(loss_on(net, task(1)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    memory.attach(optimizer)
    loss = loss_on(twin, task(2))().mean()
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    train(net, task(2), optimizer, steps=1)
    for index, name in ((0, "0"), (2, "2")):
        g = torch.cat([grads[index], grads[index + 1][:, None]], 1).numpy()
        u = memory.bases[name].numpy()
        g = g - g @ u @ u.T
        weight, bias = twin[int(name)].weight.detach().numpy(), twin[int(name)].bias.detach().numpy()
        assert np.abs(net[int(name)].weight.detach().numpy() - (weight - 0.1 * g[:, :-1])).max() < 1e-14
        assert np.abs(net[int(name)].bias.detach().numpy() - (bias - 0.1 * g[:, -1])).max() < 1e-14


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["sgd", "momentum", "adamw"]))
def test_with_the_whole_energy_old_outputs_never_change(seed, kind):
    """The theorem behind GPM: no step across the inputs changes W x; with projected updates under any optimizer."""
    net = small_net(seed)
    old, new = task(seed, n=3), task(seed + 1, n=20)
    memory = GPM(net, threshold=1.0, project="gradient" if kind == "sgd" else "update")
    memory.end_task(loss_on(net, old))
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    }[kind](net.parameters())
    memory.attach(optimizer)
    before, fresh = net(old[0]).detach(), net(new[0]).detach()
    train(net, new, optimizer)
    assert (net(old[0]) - before).abs().max() < 1e-9
    assert (net(new[0]) - fresh).abs().max() > 1e-6, "the new task did not move the model at all"


def test_projected_update_equals_projected_gradient_for_sgd():
    ends = []
    for project in ("gradient", "update"):
        net = small_net()
        memory = GPM(net, threshold=0.8, project=project)
        memory.end_task(loss_on(net, task(1)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        memory.attach(optimizer)
        train(net, task(2), optimizer)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": 2, "padding": (1, 0), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "bias": False},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_inputs_of_a_convolution_times_its_weights_are_its_outputs(options):
    layer = nn.Conv2d(2, 4, **options).double()
    x = torch.randn(3, 2, 7, 9, dtype=torch.float64)
    weight = layer.weight.flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias[:, None]], 1)
    out = layer(x)
    ours = (layer_inputs(layer, x) @ weight.T).reshape(3, -1, 4).transpose(1, 2)
    assert (ours - out.flatten(2)).abs().max() < 1e-12


def test_convolutions_keep_their_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    old, new = torch.randn(1, 1, 4, 4).double(), torch.randn(6, 1, 4, 4).double()
    memory = GPM(net, threshold=1.0)
    # One image has 16 patches for the 10 weights of a filter: of the first layer nothing is left to move.
    memory.end_task(lambda: net(old).square().sum())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    memory.attach(optimizer)
    before, conv = net(old).detach(), net[0].weight.detach().clone()
    net(new).square().sum().backward()
    optimizer.step()
    assert (net(old) - before).abs().max() < 1e-9
    assert (net[0].weight - conv).abs().max() < 1e-9


def test_other_parameters_stand_still_after_the_first_task_and_excluded_ones_do_not():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    data = (task(0)[0].float(), task(0)[1])
    memory = GPM(net, exclude=["2"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    memory.attach(optimizer)
    train(net, data, optimizer)
    memory.end_task(loss_on(net, data))
    norm, head = net[1].weight.detach().clone(), net[2].weight.detach().clone()
    train(net, data, optimizer)
    assert torch.equal(net[1].weight, norm)
    assert not torch.equal(net[2].weight, head)
    assert "2" not in memory.layers


# -------------------------------------------------------------------------------------------------------------------- CUBER


def regime_oracle(gradient, old, rows, min_projection, min_correlation, threshold):
    """The two conditions for one old task with its own inputs' leading singular vectors, entry by entry."""
    u, s, _ = np.linalg.svd(rows.T, full_matrices=False)
    rank = int(np.searchsorted(np.cumsum(s**2), threshold * (s**2).sum() - 1e-12) + 1)
    space = u[:, :rank]
    projected = gradient @ space @ space.T
    if np.linalg.norm(projected) < min_projection * np.linalg.norm(gradient):
        return 1
    inner = sum(a * b for a, b in zip(gradient.flat, old.flat, strict=True))
    return 3 if inner >= min_correlation * np.linalg.norm(gradient) * np.linalg.norm(old) else 2


@pytest.mark.parametrize("seed", range(12))
def test_regimes_of_the_first_old_task_equal_the_oracle(seed):
    net = small_net(seed, bias=False)
    old, new = task(seed, n=3), task(seed + 50, n=4)
    learner = CUBER(net, threshold=0.9, min_projection=0.6, min_correlation=0.05)
    learner.end_task(loss_on(net, old))
    gradients = [torch.autograd.grad(loss_on(net, data)().mean(), [net[0].weight, net[2].weight]) for data in (old, new)]
    learner.begin_task(loss_on(net, new))
    inputs = (old[0].numpy(), torch.tanh(net[0](old[0])).detach().numpy())
    for layer, name in enumerate(("0", "2")):
        before, now = gradients[0][layer].numpy(), gradients[1][layer].numpy()
        assert learner.regimes()[name] == [regime_oracle(now, before, inputs[layer], 0.6, 0.05, 0.9)]


def test_step_in_an_opened_subspace_equals_the_formula():
    """Two steps in a task whose old one is opened: the gradient of the regularized loss, whole."""
    net, twin = small_net(), small_net()
    learner = CUBER(net, threshold=0.9, min_projection=0.0, min_correlation=-1.0, regularization=0.7)
    learner.end_task(loss_on(net, task(1)))
    learner.begin_task(loss_on(net, task(2)))
    assert learner.regimes() == {"0": [3], "2": [3]}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    learner.attach(optimizer)
    train(net, task(2), optimizer, steps=2)
    spaces = {name: (basis @ basis.T).clone() for name, basis in learner.bases.items()}
    start = {n: torch.cat([twin[int(n)].weight, twin[int(n)].bias[:, None]], 1).detach().clone() for n in spaces}
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        by_hand.zero_grad()
        loss = loss_on(twin, task(2))().mean()
        for n, space in spaces.items():
            now = torch.cat([twin[int(n)].weight, twin[int(n)].bias[:, None]], 1)
            loss = loss + 0.7 * ((now - start[n]) @ space).square().sum()
        loss.backward()
        by_hand.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_protected_and_opened_tasks_part_the_space():
    """With one task opened and one not, the layer moves in the first one's directions but for those the second one has too."""
    net = nn.Linear(4, 2, bias=False).double()
    eye = torch.eye(4, dtype=torch.float64)
    learner = CUBER(net, threshold=1.0, min_projection=0.1)
    learner.end_task(lambda: (net(eye[[0, 1]]) - 9).square())  # opened below: inputs 0 and 1
    learner.end_task(lambda: (net(eye[[1, 2]]) + 9).square())  # the opposite targets: inputs 1 and 2
    learner.begin_task(lambda: (net(eye[[0]]) - 9).square() + (net(eye[[2]]) - 9).square())
    assert learner.regimes() == {"": [3, 2]}
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    learner.attach(optimizer)
    (net(eye) - 9).square().sum().backward()
    optimizer.step()
    moved = (net.weight - before).abs().amax(0) > 1e-9
    assert moved.tolist() == [True, False, False, True]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_small_step_where_the_tasks_agree_lowers_the_old_loss(seed):
    """Backward transfer to first order: all layers opened and the joint inner product positive, so the old loss falls."""
    net = small_net(seed)
    old, new = task(seed), task(seed, n=6, shift=0.3)
    learner = CUBER(net, threshold=1.0, min_projection=0.0, min_correlation=1e-3, regularization=0.0)
    learner.end_task(loss_on(net, old))
    learner.begin_task(loss_on(net, new))
    before = loss_on(net, old)().mean().item()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    learner.attach(optimizer)
    train(net, new, optimizer, steps=1)
    after = loss_on(net, old)().mean().item()
    opened = any(3 in regimes for regimes in learner.regimes().values())
    assert after < before if opened else abs(after - before) < 1e-9


def test_without_a_beginning_everything_is_protected():
    ends = []
    for kind in (GPM, CUBER):
        net = small_net()
        learner = kind(net, threshold=1.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        learner.attach(optimizer)
        learner.end_task(loss_on(net, task(1, n=3)))
        train(net, task(2), optimizer)
        ends.append(net(task(1)[0]).detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-9


def test_assess_again_changes_the_regimes_and_keeps_the_anchor():
    net = nn.Linear(3, 1, bias=False).double()
    eye = torch.eye(3, dtype=torch.float64)
    learner = CUBER(net)
    learner.end_task(lambda: (net(eye) - 5).square())
    learner.begin_task(lambda: (net(eye) - 9).square())
    anchor = learner.state_dict()[".anchor"].clone()
    with torch.no_grad():
        net.weight.fill_(20.0)
    learner.assess(lambda: (net(eye) - 9).square())
    assert learner.regimes() == {"": [2]}
    assert torch.equal(learner.state_dict()[".anchor"], anchor)


# ---------------------------------------------------------------------------------------------------------------------- EWC


def test_ewc_equals_the_penalty_differentiated_task_by_task():
    net = small_net()
    learner = EWC(net, strength=3.0, chunk=3)
    remembered = []
    for seed in (1, 2):
        data = task(seed)
        fisher = [torch.zeros_like(p) for p in net.parameters()]
        for loss in loss_on(net, data)():
            for total, g in zip(fisher, torch.autograd.grad(loss, list(net.parameters()), retain_graph=True), strict=True):
                total += g.square() / len(data[0])
        remembered.append((fisher, [p.detach().clone() for p in net.parameters()]))
        learner.end_task(loss_on(net, data))
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * torch.randn_like(p)
    penalty = sum(
        (1.5 * f * (p - old).square()).sum()
        for fisher, olds in remembered
        for f, p, old in zip(fisher, net.parameters(), olds, strict=True)
    )
    expected = torch.autograd.grad(penalty, list(net.parameters()))
    assert all(
        (a - b).abs().max() < 1e-12
        for a, b in zip(torch.autograd.grad(learner.penalty(), list(net.parameters())), expected, strict=True)
    )
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    learner.attach(optimizer)
    optimizer.step()
    for p, old, gradient in zip(net.parameters(), before, expected, strict=True):
        assert (old - p - gradient).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------------------- common


@pytest.mark.parametrize("kind", [GPM, CUBER, EWC])
def test_resumes_in_the_middle_of_a_task(kind):
    def start(net):
        learner = kind(net)
        learner.end_task(loss_on(net, task(1)))
        learner.begin_task(loss_on(net, task(2)))
        return learner

    net = small_net()
    learner = start(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    learner.attach(optimizer)
    train(net, task(2), optimizer, steps=2)
    state, kept = load(save({k: v.contiguous() for k, v in learner.state_dict().items()})), net.state_dict()
    twin = small_net(5)
    twin.load_state_dict(kept)
    other = kind(twin)
    other.load_state_dict(state)
    again = torch.optim.SGD(twin.parameters(), lr=0.1)
    other.attach(again)
    for model, step in ((net, optimizer), (twin, again)):
        train(model, task(2), step, steps=2)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.memory_bytes() == learner.memory_bytes() > 0


@pytest.mark.parametrize("kind", [GPM, CUBER, EWC])
def test_comes_off_cleanly(kind):
    net = small_net()
    keys = list(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with kind(net).attach(optimizer) as learner:
        learner.end_task(loss_on(net, task(1)))
    assert list(net.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    twin = small_net()
    train(net, task(2), optimizer)
    train(twin, task(2), torch.optim.SGD(twin.parameters(), lr=0.1))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hooks_come_off_where_the_loss_raises():
    net = small_net()
    with pytest.raises(RuntimeError):
        GPM(net).end_task(lambda: net(torch.zeros(2, 7, dtype=torch.float64)))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_bad_input_is_named():
    net = small_net()
    for call, words in (
        (lambda: GPM(net, threshold=0.0), r"'threshold' must be in \(0, 1\], not 0.0"),
        (lambda: GPM(net, project="both"), "'project' is 'both'; allowed: 'gradient', 'update'"),
        (lambda: GPM(net, exclude=["head*"]), "'exclude' has 'head\\*', which matches no module"),
        (lambda: GPM(nn.ReLU()), "nothing to protect"),
        (lambda: GPM(nn.Conv2d(4, 4, 1, groups=2)), "groups=2; allowed: 1"),
        (lambda: CUBER(net, min_projection=1.5), r"'min_projection' must be in \[0, 1\], not 1.5"),
        (lambda: CUBER(net, min_correlation=-2), r"'min_correlation' must be in \[-1, 1\], not -2"),
        (lambda: CUBER(net, regularization=-1.0), "'regularization' must be finite and at least 0, not -1.0"),
        (lambda: EWC(net, strength=-1.0), "'strength' must be finite and at least 0, not -1.0"),
        (lambda: EWC(net).end_task(lambda: net(task(0)[0]).sum()), r"one loss for each sample, of shape \(n,\), not \(\)"),
        (lambda: GPM(net).end_task(lambda: net(task(0)[0]).sum() * torch.nan), "NaN or infinity; allowed: finite losses"),
        (lambda: GPM(net).end_task(lambda: torch.ones(1)), "without gradient"),
        (lambda: GPM(net).end_task(lambda: net[0](task(0)[0]).sum()), "layer '2' saw no input"),
        (lambda: GPM(net).load_state_dict({}), "'0.basis' is missing"),
        (lambda: CUBER(net).load_state_dict(GPM(net).state_dict()), "'0.anchor' is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match=r"'model' must be a torch.nn.Module, not int"):
        GPM(3)
    with pytest.raises(TypeError, match=r"'optimizer' must be a torch.optim.Optimizer, not list"):
        GPM(net).attach([])
    with pytest.raises(TypeError, match="'loss' must be a function of no arguments"):
        GPM(net).end_task(torch.ones(1))
    other = GPM(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))).state_dict()
    with pytest.raises(ValueError, match=r"'0.basis' has shape \(4, 0\); allowed: \(7, r\)"):
        GPM(net).load_state_dict(other)
