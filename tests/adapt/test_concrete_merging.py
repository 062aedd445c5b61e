"""Concrete masks and AdaMerging against loops written out by hand: sampling, merging, both levels of the fit, files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.adapt import (
    ConcreteMasks,
    MergeError,
    concrete,
    fit_adamerging,
    fit_concrete_masks,
    load_concrete_masks,
    task_arithmetic,
)
from corollary.adapt.merging.masks import concrete_sample
from corollary.data import LoadError

# ------------------------------------------------------------------------------------------------------------------ masks


@settings(max_examples=80, deadline=None)
@given(x=st.floats(-20, 20), u=st.floats(0, 1), temperature=st.floats(0.05, 5))
def test_sample_is_the_formula(x: float, u: float, temperature: float) -> None:
    ours = float(concrete_sample(torch.tensor(x, dtype=torch.float64), torch.tensor(u, dtype=torch.float64), temperature))
    u = min(max(u, 2**-53), 1 - 2**-53)
    z = (x + math.log(u) - math.log1p(-u)) / temperature
    expected = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert (ours > 0.5) == (z > 0)


def test_share_of_ones_is_the_probability() -> None:
    logits = torch.linspace(-3, 3, 7).repeat_interleave(20_000)
    for how, allowed in (("binary", 0.015), ("mean", 1e-5)):
        masks = ConcreteMasks({"w": logits}, {}, how=how, seed=3)
        mask = masks.draw("w")
        assert float(mask.mean()) == pytest.approx(1, abs=1e-5)
        shares = (mask / mask.max()).reshape(7, -1).mean(1) if how == "binary" else mask.reshape(7, -1)[:, 0] * 0.5
        assert shares.tolist() == pytest.approx(torch.linspace(-3, 3, 7).sigmoid().tolist(), abs=allowed)


def by_hand(x: Tensor, name: str, seed: int, temperature: float) -> list[float]:
    """The mask entry by entry, from the noise that the name and the seed stand for."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little")))
    values = [
        1 / (1 + math.exp(-(xi + math.log(u) - math.log(1 - u)) / temperature))
        for xi, u in zip(x.flatten().tolist(), noise.double().flatten().tolist(), strict=True)
    ]
    return [v / (math.fsum(values) / len(values)) for v in values]


@pytest.mark.parametrize("scale", [None, 0.7, [0.1, 0.9]])
def test_merge_is_the_loop_over_entries(scale: Any) -> None:
    torch.manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,)}
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tuned = [{name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()} for _ in range(2)]
    logits = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    scales = {"a": torch.tensor([0.2, 0.4]), "b": torch.tensor([0.5, 0.3])}
    masks = ConcreteMasks(logits, scales, temperature=0.4, seed=9)
    merged = concrete(base | {"buffer": torch.ones(2)}, [t | {"buffer": torch.zeros(2)} for t in tuned], masks, scale=scale)
    assert torch.equal(merged["buffer"], torch.ones(2))  # no mask, no merge: as in the fit
    for name in ("b", "a"):  # in any order
        rows = scales[name].tolist() if scale is None else [scale] * 2 if isinstance(scale, float) else scale
        mask = by_hand(logits[name], name, 9, 0.4)
        for j, start in enumerate(base[name].flatten().tolist()):
            change = math.fsum(r * (float(t[name].flatten()[j]) - start) for r, t in zip(rows, tuned, strict=True))
            assert float(merged[name].flatten()[j]) == pytest.approx(start + mask[j] * change, abs=1e-6)


def test_open_mask_is_task_arithmetic() -> None:
    torch.manual_seed(0)
    base, tuned = {"w": torch.randn(4, 5)}, [{"w": torch.randn(4, 5)} for _ in range(3)]
    for how in ("sample", "mean", "binary"):
        masks = ConcreteMasks({"w": torch.full((4, 5), 60.0)}, {"w": torch.full((3,), 0.3)}, how=how)
        assert torch.allclose(concrete(base, tuned, masks)["w"], task_arithmetic(base, tuned)["w"], atol=1e-6)


# -------------------------------------------------------------------------------------------------------------------- fit


def toy() -> tuple[nn.Linear, list[dict[str, Tensor]], list[list[Tensor]], list[Callable[[Tensor], Tensor]]]:
    """A linear model, what two tasks made of it, two batches for each, and a head for each."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    tuned = [{"weight": torch.randn(3, 4).double(), "bias": torch.randn(3).double()} for _ in range(2)]
    batches = [[torch.randn(6, 4).double() for _ in range(2)] for _ in range(2)]
    return model, tuned, batches, [lambda z: 2 * z, lambda z: z.flip(-1)]


class Adam:
    """Written out from its paper."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t, self.m, self.v = lr, 0, 0.0, 0.0

    def step(self, x: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g  # type: ignore[assignment]
        self.v = 0.999 * self.v + 0.001 * g * g  # type: ignore[assignment]
        return x - self.lr * (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)) ** 0.5 + 1e-8)


def entropy_by_hand(weight: Tensor, bias: Tensor, xs: list[Tensor], heads: list[Callable[[Tensor], Tensor]]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, head in zip(xs, heads, strict=True):
        e = head(x @ weight.T + bias).exp()
        p = e / e.sum(1, keepdim=True)
        total = total - (p * p.log()).sum() / len(x)
    return total


def oracle(merging: str, steps: int, adapt_steps: int, lr: float, inner_lr: float) -> tuple[list[Tensor], Tensor]:
    """Logits of weight and bias, and the factors (tensor, task), by the authors' order of steps."""
    model, tuned, batches, heads = toy()
    base = [model.weight.detach(), model.bias.detach()]
    vectors = [[t["weight"] - base[0], t["bias"] - base[1]] for t in tuned]
    generator = torch.Generator().manual_seed(5)
    logits = [torch.zeros_like(b) for b in base]
    rows = 2 if merging == "layerwise_adamerging" else 1
    start = torch.full((rows, 2), 0.3, dtype=torch.float64)
    upper, lower, used = [Adam(lr), Adam(lr)], Adam(inner_lr), 0

    def merged(factors: Tensor, masks: list[Tensor]) -> list[Tensor]:
        f = factors.clamp(0, 1)
        return [base[i] + masks[i] * (f[i % rows, 0] * vectors[0][i] + f[i % rows, 1] * vectors[1][i]) for i in range(2)]

    def batch() -> list[Tensor]:
        nonlocal used
        used += 1
        return [task[(used - 1) % 2] for task in batches]

    factors = start
    for _ in range(steps):
        noise = [torch.rand(x.shape, generator=generator).double() for x in logits]
        leaves = [x.clone().requires_grad_() for x in logits]
        masks = [torch.sigmoid((x + torch.log(u / (1 - u))) / 0.5) for x, u in zip(leaves, noise, strict=True)]
        masks = [m / m.mean() for m in masks]
        factors = start
        if merging != "task_arithmetic":
            leaf = start.clone().requires_grad_()
            loss = entropy_by_hand(*merged(leaf, [m.detach() for m in masks]), batch(), heads)
            factors = lower.step(start, torch.autograd.grad(loss, [leaf])[0])
        loss = entropy_by_hand(*merged(factors, masks), batch(), heads)
        gradients = torch.autograd.grad(loss, leaves)
        logits = [a.step(x, g) for a, x, g in zip(upper, logits, gradients, strict=True)]
    factors = start
    if merging != "task_arithmetic":
        final = [
            torch.tensor(by_hand(x, name, 5, 0.5), dtype=torch.float64).reshape(x.shape)
            for x, name in zip(logits, ("weight", "bias"), strict=True)
        ]
        last = Adam(0.02)
        for _ in range(adapt_steps):
            leaf = factors.clone().requires_grad_()
            loss = entropy_by_hand(*merged(leaf, final), batch(), heads)
            factors = last.step(factors, torch.autograd.grad(loss, [leaf])[0])
    return logits, factors.clamp(0, 1).expand(2, 2)


@pytest.mark.parametrize("merging", ["task_arithmetic", "taskwise_adamerging", "layerwise_adamerging"])
def test_fit_is_the_loop_by_hand(merging: str) -> None:
    model, tuned, batches, heads = toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = fit_concrete_masks(
        model, tuned, batches, heads=heads, merging=merging, steps=12, lr=0.1, inner_lr=0.2, adapt_steps=8, adapt_lr=0.02, seed=5
    )  # fmt: skip
    logits, factors = oracle(merging, 12, 8, 0.1, 0.2)
    assert torch.allclose(masks["weight"], logits[0], atol=1e-9)
    assert torch.allclose(masks["bias"], logits[1], atol=1e-9)
    assert torch.allclose(torch.stack([masks.scales["weight"], masks.scales["bias"]]), factors, atol=1e-9)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("layerwise", [True, False])
def test_adamerging_is_the_loop_by_hand(layerwise: bool) -> None:
    model, tuned, batches, heads = toy()
    found = fit_adamerging(model, tuned, batches, heads=heads, layerwise=layerwise, steps=9, lr=0.05)
    base = [model.weight.detach(), model.bias.detach()]
    rows, adam = (2 if layerwise else 1), Adam(0.05)
    factors = torch.full((rows, 2), 0.3, dtype=torch.float64)
    for step in range(9):
        leaf = factors.clone().requires_grad_()
        f = leaf.clamp(0, 1)
        weight, bias = (
            base[i] + sum(f[i % rows, t] * (tuned[t][name] - base[i]) for t in range(2)) for i, name in enumerate(("weight", "bias"))
        )  # fmt: skip
        loss = entropy_by_hand(weight, bias, [task[step % 2] for task in batches], heads)
        factors = adam.step(factors, torch.autograd.grad(loss, [leaf])[0])
    for i, name in enumerate(("weight", "bias")):
        assert torch.allclose(found[name], factors[i % rows].clamp(0, 1), atol=1e-9)


def test_fit_lowers_what_it_minimizes_and_merges_as_it_fitted() -> None:
    model, tuned, batches, heads = toy()
    seen: list[float] = []
    masks = fit_concrete_masks(
        model, tuned, batches, heads=heads, steps=150, lr=0.1, progress=lambda _, loss: seen.append(loss)
    )
    assert len(seen) == 150
    merged = concrete(model.state_dict(), tuned, masks)
    plain = task_arithmetic(model.state_dict(), tuned)
    xs = [torch.cat(task) for task in batches]
    assert entropy_by_hand(merged["weight"], merged["bias"], xs, heads) < entropy_by_hand(
        plain["weight"], plain["bias"], xs, heads
    )


def test_labels_and_buffers_are_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    tuned = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    x, y = torch.randn(20, 4), torch.zeros(20, dtype=torch.int64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    masks = fit_concrete_masks(model.eval(), tuned, [loader, x], steps=3)
    assert set(masks) == {"0.weight", "1.weight", "1.bias"}
    assert torch.equal(model[1].running_mean, torch.zeros(3))


# ------------------------------------------------------------------------------------------------------------------ files


def test_saved_masks_draw_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    masks = ConcreteMasks(
        {"a": torch.randn(3, 4), "b": torch.randn(2)}, {"a": torch.rand(2), "b": torch.rand(2)}, temperature=0.3, seed=12, how="binary"
    )  # fmt: skip
    back = load_concrete_masks(masks.save(tmp_path / "masks.safetensors"))
    assert (back.temperature, back.seed, back.how, len(back)) == (0.3, 12, "binary", 2)
    for name in masks:
        assert torch.equal(back.draw(name), masks.draw(name))
        assert torch.equal(back.scales[name], masks.scales[name])
    assert not torch.equal(ConcreteMasks(dict(masks), {}, seed=13).draw("a"), ConcreteMasks(dict(masks), {}, seed=12).draw("a"))


def test_bad_mask_files(tmp_path: Path) -> None:
    good = {"format": "corollary-concrete-masks", "temperature": "0.5", "seed": "0", "how": "sample", "scales": '{"a": [0.3]}'}
    path = tmp_path / "m.safetensors"
    for metadata, match in [
        (None, "holds no Concrete masks"),
        (good | {"format": "x"}, "holds no Concrete masks"),
        (good | {"temperature": "cold"}, "metadata of the masks is broken"),
        (good | {"temperature": "-1"}, "'temperature' must be finite and above 0"),
        (good | {"how": "pickle"}, "'how' is 'pickle'; allowed: sample, mean, binary"),
        (good | {"scales": "{"}, "metadata of the masks is broken"),
        (good | {"scales": '{"b": [1]}'}, "no factors for tensor 'a'"),
        (good | {"scales": "[]"}, "metadata of the masks is broken"),
    ]:
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(LoadError, match=match):
            load_concrete_masks(path)
    with pytest.raises(LoadError, match="no such file"):
        load_concrete_masks(tmp_path / "gone.safetensors")


def test_bad_arguments() -> None:
    model, tuned, batches, heads = toy()
    masks = ConcreteMasks({"weight": torch.zeros(3, 4)}, {"weight": torch.tensor([0.3, 0.3])})
    state = dict(model.state_dict())

    def fit(**changed: Any) -> Any:
        return fit_concrete_masks(
            **{"model": model, "checkpoints": tuned, "inputs": batches, "heads": heads, "steps": 1, **changed}  # type: ignore[arg-type]
        )

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: ConcreteMasks({}, {}, temperature=math.nan), "'temperature' must be finite"),
        (lambda: ConcreteMasks({}, {}, how="hard"), "'how' is 'hard'"),
        (lambda: ConcreteMasks({"w": torch.zeros(2, dtype=torch.int64)}, {}).draw("w"), r"logits of torch\.int64"),
        (lambda: ConcreteMasks({"w": torch.full((3,), -900.0)}, {}, how="binary").draw("w"), "mean 0.0 and cannot be rescaled"),
        (lambda: ConcreteMasks({"w": torch.full((3,), math.nan)}, {}).draw("w"), "mean nan"),
        (lambda: concrete(state, tuned, {"weight": torch.zeros(3, 4)}), "'masks' must be ConcreteMasks"),  # type: ignore[arg-type]
        (lambda: concrete(state, tuned[:1], masks), "'weight' must be 1 finite numbers"),
        (lambda: concrete(state, tuned, masks, scale=[1.0]), "one finite number or 2 of them"),
        (lambda: concrete(state, tuned, ConcreteMasks({"z": torch.zeros(1)}, {})), "'masks' has tensor 'z', which the base has not"),
        (lambda: concrete(state, tuned, ConcreteMasks({"bias": torch.zeros(1)}, {})), r"'bias' is \(1,\), in the base it is \(3,\)"),
        (lambda: fit(checkpoints=[]), "'checkpoints' is empty"),
        (lambda: fit(inputs=batches[:1]), "'inputs' has 1 entries for 2 checkpoints"),
        (lambda: fit(heads=heads[:1]), "'heads' has 1 entries for 2 checkpoints"),
        (lambda: fit(inputs=[torch.zeros(0, 4), batches[1]]), r"inputs\[0\]: is empty"),
        (lambda: fit(inputs=[iter([]), batches[1]]), r"inputs\[0\]: gave no batch"),
        (lambda: fit(checkpoints=[tuned[0], {"weight": tuned[1]["weight"]}]), r"checkpoints\[1\]: has no tensor 'bias'"),
        (lambda: fit(checkpoints=[tuned[0], tuned[1] | {"bias": torch.zeros(2)}]), r"'bias' is \(2,\), the model's is \(3,\)"),
        (lambda: fit(merging="mean"), "'merging' is 'mean'; allowed: task_arithmetic"),
        (lambda: fit(scale=2.0), r"'scale' must lie in \[0, 1\]"),
        (lambda: fit(batch_size=0), "'batch_size' must be at least 1"),
        (lambda: fit(temperature=0.0), "'temperature' must be finite and above 0"),
        (lambda: fit(model=nn.Flatten(), checkpoints=tuned), "no trainable floating parameters"),
    ]  # fmt: skip
    for call, match in cases:
        with pytest.raises((MergeError, TypeError), match=match):
            call()
