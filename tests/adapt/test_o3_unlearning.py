"""O3's parts against naive loops over requests, texts and layers, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.svm import OneClassSVM
from torch import nn

from corollary.adapt import (
    LoRA,
    OODDetector,
    OrthogonalLoRA,
    SoftLoading,
    adapt,
    adapter_penalty,
    adapter_state_dict,
    add_request,
    contrastive_entropy,
    set_adapters,
)
from corollary.models import GPT


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- orthogonal LoRA


def two_layers():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def with_requests(model, *names, **options):
    for name in names:
        add_request(model, OrthogonalLoRA(rank=2, **options), name=name)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def test_the_penalty_is_the_sum_over_earlier_requests_layers_and_entries():
    model = with_requests(two_layers(), "first", "second", "third", orthogonality=0.3)
    wanted = 0.0
    for layer in (model[0], model[2]):
        new = layer.adapters["third"].lora_A.detach().numpy()
        for name in ("first", "second"):
            old = layer.adapters[name].lora_A.detach().numpy()
            wanted += sum(float(np.dot(old[i], new[j])) ** 2 for i in range(2) for j in range(2))
    assert adapter_penalty(model).item() == pytest.approx(0.3 * wanted, rel=1e-12)


def test_its_gradient_reaches_the_new_request_alone():
    model = with_requests(two_layers(), "first", "second")
    adapter_penalty(model).backward()
    assert all(("second.lora_A" in n) == (p.grad is not None) for n, p in model.named_parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{i}.adapters.second.lora_{f}" for i in (0, 2) for f in "AB"}  # fmt: skip


def test_descending_on_it_makes_the_requests_orthogonal():
    model = with_requests(two_layers(), "first", "second", orthogonality=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(3000):
        optimizer.zero_grad()
        adapter_penalty(model).backward()
        optimizer.step()
    for layer in (model[0], model[2]):
        a, b = layer.adapters["first"].lora_A.detach(), layer.adapters["second"].lora_A.detach()
        assert (a @ b.T).abs().max() < 1e-6
        # What the earlier request reads, the later one does not see: its part of the output stays as it was.
        x = (torch.randn(3, 2, dtype=torch.float64) @ a) @ torch.linalg.pinv(a) @ a
        assert (x @ b.T).abs().max() < 1e-5


def test_alone_it_is_a_lora():
    x = torch.randn(3, 6, dtype=torch.float64)
    ours, plain = two_layers(), two_layers()
    plain.load_state_dict(ours.state_dict())
    add_request(ours, OrthogonalLoRA(rank=2, alpha=6), name="a")
    adapt(plain, LoRA(rank=2, alpha=6), name="a")
    assert set(adapter_state_dict(ours, "a")) == set(adapter_state_dict(plain, "a"))
    with torch.no_grad():
        for (_, p), (_, q) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
            q.copy_(torch.randn_like(q))
            p.copy_(q)
    assert torch.equal(ours(x), plain(x))
    assert adapter_penalty(ours).item() == 0


def test_requests_add_up_and_a_refused_one_leaves_all_as_it_was():
    model, x = two_layers(), torch.randn(3, 6, dtype=torch.float64)
    base = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in (model[0], model[2])]
    with_requests(model, "first", "second")
    hidden = x
    for (weight, bias), layer in zip(base, (model[0], model[2]), strict=True):
        delta = sum(layer.adapters[n].lora_B @ layer.adapters[n].lora_A for n in ("first", "second"))
        hidden = hidden @ (weight + delta).T + bias
        hidden = torch.tanh(hidden) if layer is model[0] else hidden
    torch.testing.assert_close(model(x), hidden)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for config, name in ((LoRA(rank=2), "third"), (OrthogonalLoRA(rank=2), "first")):
        with pytest.raises((TypeError, ValueError)):
            add_request(model, config, name=name)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


# ---------------------------------------------------------------------------------------------------- contrastive entropy


def test_entropy_by_a_loop():
    q, k = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    found = contrastive_entropy(q, k)
    for layer in range(2):
        total = 0.0
        for i in range(4):
            e = [math.exp(float(q[layer, i] @ k[layer, j])) for j in range(5)]
            total -= sum(v / sum(e) * math.log(v / sum(e)) for v in e)
        assert found[layer].item() == pytest.approx(total / 4, rel=1e-12)


def test_entropy_between_one_key_and_all():
    keys = torch.eye(4, dtype=torch.float64)
    assert contrastive_entropy(200 * keys, keys).item() == pytest.approx(0, abs=1e-12)
    assert contrastive_entropy(0 * keys, keys).item() == pytest.approx(math.log(4))
    assert contrastive_entropy(torch.full((2, 2), 1e4), torch.eye(2)).isfinite()
    assert torch.autograd.gradcheck(contrastive_entropy, (torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the detector


class Table(nn.Module):
    """Two layers that give rows of two tables: features known without a model."""

    def __init__(self, width=3):
        super().__init__()
        self.first, self.second = nn.Embedding(50, width), nn.Embedding(50, width)

    def forward(self, ids, attention_mask=None):
        return self.first(ids) + self.second(ids)


def naive_detector(features, order, rest, gamma, nu, zeta, offset, floor):
    """Scores and weights of texts, by loops; ``features`` (texts, layers, width), fitted on ``order[rest:]``."""
    used, layers = features[order[rest:]], features.shape[1]
    means = [used[:, i].mean(0) for i in range(layers)]
    inverses = [np.linalg.pinv(np.cov(used[:, i].T, bias=True)) for i in range(layers)]

    def scores(f):
        out = []
        for i in range(layers):
            d = f[i] - means[i]
            far = 0.5 * d @ inverses[i] @ d
            near = max(f[i] @ u / np.linalg.norm(f[i]) / np.linalg.norm(u) for u in used[:, i])
            out.append(far - gamma * near)
        return np.array(out)

    all_scores = np.array([scores(f) for f in features])
    unit = np.abs(all_scores).mean()
    svm = OneClassSVM(kernel="linear", nu=nu).fit(all_scores[order[rest:]] / unit)
    length = np.linalg.norm(svm.coef_[0])
    distance = lambda f: float(scores(f) @ svm.coef_[0] / length - svm.offset_[0] / length * unit)  # noqa: E731
    d = np.array([distance(f) for f in features])
    m1, m2, sigma = d[order[rest:]].mean(), d[order[:rest]].mean(), d[order[:rest]].std()

    def below(v):
        return 0.5 * norm.cdf((v - m1) / sigma) + 0.5 * norm.cdf((v - m2) / sigma)

    def weight(v):
        w = 1 / (1 + math.exp(-(zeta * (1 - abs(below(v) - below(m1 + m2 - v))) - offset)))
        return 0.0 if w < floor else w

    return distance, weight


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_scores_and_weights_by_loops(floor):
    table = Table().double()
    detector = OODDetector(
        table, ["first", "second"], gamma=5.0, nu=0.2, holdout=0.25, zeta=8.0, offset=1.5, floor=floor, seed=3
    )
    ids = torch.randint(25, (24, 4))
    detector.fit(ids)
    others = torch.cat([ids[:6], torch.randint(25, 50, (6, 4))])

    def features(rows):
        return torch.stack([table.first(rows).mean(1), table.second(rows).mean(1)], 1).detach().numpy()

    order = torch.randperm(24, generator=torch.Generator().manual_seed(3)).numpy()
    distance, weight = naive_detector(features(ids), order, 6, 5.0, 0.2, 8.0, 1.5, floor)
    wanted = np.array([distance(f) for f in features(others)])
    with torch.no_grad():
        np.testing.assert_allclose(detector.score(others).numpy(), wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(detector(others).numpy(), [weight(d) for d in wanted], atol=1e-5)


def test_padding_does_not_count():
    table = Table().double()
    detector = OODDetector(table, ["first", "second"]).fit(torch.randint(25, (24, 4)))
    ids = torch.randint(25, (3, 4))
    padded = torch.cat([ids, torch.full((3, 2), 49)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 3)
    with torch.no_grad():
        torch.testing.assert_close(detector.score(padded, attention_mask=mask), detector.score(ids))


def test_learning_descends_on_both_parts_and_leaves_the_rest_frozen():
    model = GPT(32, dim=16, depth=2, heads=2, context=8)
    nn.init.normal_(model.embed.weight)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.requires_grad_(False)
    adapt(model, LoRA(rank=2), r".*\.q_proj")
    detector = OODDetector(model, ["blocks.*"])
    tokens = torch.randint(32, (12, 8))
    told = detector.learn([tokens] * 15, lambda t: t.roll(1, 1), lr=0.02)
    assert told[-1] < told[0]
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            own = name.replace(".base.", ".")
            assert own not in frozen or torch.equal(parameter, frozen[own])


def test_a_fitted_detector_is_saved_and_loaded():
    first = OODDetector(Table(), ["first", "second"]).fit(torch.randint(25, (24, 4)))
    second = OODDetector(Table(), ["first", "second"])
    second.load_state_dict(first.state_dict())
    ids = torch.randint(50, (5, 4))
    assert torch.equal(first(ids), second(ids))


def test_what_a_detector_refuses():
    ids = torch.randint(25, (24, 4))
    with pytest.raises(ValueError, match="not fitted"):
        OODDetector(Table(), ["first"])(ids)
    with pytest.raises(ValueError, match="at least 2"):
        OODDetector(Table(), ["first"]).fit(ids[:3])
    with pytest.raises(ValueError, match="matches no module"):
        OODDetector(Table(), ["none"])
    with pytest.raises(ValueError, match="'nu'"):
        OODDetector(Table(), ["first"], nu=0.0)
    with pytest.raises(ValueError, match="no parameter"):
        OODDetector(Table().requires_grad_(False), ["first"]).learn([ids], lambda t: t)
    broken = Table()
    nn.init.constant_(broken.first.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        OODDetector(broken, ["first"]).fit(ids)


# -------------------------------------------------------------------------------------------------------------- loading


class Given(nn.Module):
    """A detector that says what it was told."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def forward(self, x):
        return self.weights[: len(x)]


def test_each_input_gets_the_greatest_of_its_weights():
    model, x = two_layers(), torch.randn(3, 6, dtype=torch.float64)
    base = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in (model[0], model[2])]
    with_requests(model, "first", "second", alpha=3)
    loading = SoftLoading(model, {"second": Given(0.0, 0.5, 0.1), "first": Given(0.0, 0.2, 1.0)})
    rows = []
    for i, w in enumerate((0.0, 0.5, 1.0)):
        hidden = x[i]
        for (weight, bias), layer in zip(base, (model[0], model[2]), strict=True):
            delta = sum(1.5 * layer.adapters[n].lora_B @ layer.adapters[n].lora_A for n in ("first", "second"))
            hidden = (weight + w * delta) @ hidden + bias
            hidden = torch.tanh(hidden) if layer is model[0] else hidden
        rows.append(hidden)
    torch.testing.assert_close(loading(x), torch.stack(rows))
    plainly = torch.tanh(x @ base[0][0].T + base[0][1]) @ base[1][0].T + base[1][1]
    assert torch.equal(loading(x)[0], plainly[0]) or torch.allclose(loading(x)[0], plainly[0], atol=1e-15)
    whole = model(x)  # outside of the context all adapters act fully
    torch.testing.assert_close(whole[2], torch.stack(rows)[2])


def test_held_weights_come_off_even_after_a_failure():
    model, x = two_layers(), torch.randn(2, 6, dtype=torch.float64)
    loading = SoftLoading(with_requests(model, "first"), {"first": Given(0.3, 0.7)})
    before = model(x)
    with loading.hold(torch.tensor([0.3, 0.7], dtype=torch.float64)) as held:
        torch.testing.assert_close(held(x), loading(x))
    with pytest.raises(RuntimeError, match="boom"), loading.hold(torch.zeros(2)):
        raise RuntimeError("boom")
    assert torch.equal(model(x), before)


def test_what_loading_refuses():
    model = with_requests(two_layers(), "first")
    with pytest.raises(ValueError, match="'detectors'"):
        SoftLoading(model, {"second": Given(1.0)})
    loading = SoftLoading(model, {"first": Given(1.0, 1.0)})
    for weights in (
        torch.tensor([1.5, 0.0]),
        torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([float("nan"), 0.0]),
    ):
        with pytest.raises(ValueError, match="'weights'"), loading.hold(weights):
            pass
    with pytest.raises(ValueError, match="one weight for each row"), loading.hold(torch.ones(3)):
        model(torch.zeros(2, 6, dtype=torch.float64))
    set_adapters(model, [])
    with pytest.raises(ValueError, match="does not act"):
        loading(torch.zeros(2, 6, dtype=torch.float64))
