"""The networks: shapes, the theorems that their parts rest on, second derivatives, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.models import GPT, MLP, ResNet, ViT
from corollary.models.attention import attention
from corollary.models.gpt import RMSNorm, apply_rope, rope_tables

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "mlp": (lambda: MLP(64, [16, 8], 10, nn.Tanh), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 10),
    "resnet": (
        lambda: ResNet(1, 10, width=4, norm="group"),
        torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        10,
    ),
    "vit": (
        lambda: ViT(8, 4, 1, 10, dim=8, depth=2, heads=2),
        torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        10,
    ),
    "gpt": (lambda: GPT(11, dim=16, depth=2, heads=2, context=8), torch.arange(24).reshape(3, 8) % 11, 11),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_through_the_head_are_the_output(name: str) -> None:
    make, x, outputs = NETWORKS[name]
    torch.manual_seed(0)
    net = make().eval()
    out = net(x)
    assert out.shape[-1] == outputs
    assert net.features(x).shape[-1] == net.num_features == net.head.in_features
    torch.testing.assert_close(net.head(net.features(x)), out)
    torch.manual_seed(0)
    torch.testing.assert_close(make().eval()(x), out, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_vector_product_against_differences_of_the_gradient(name: str) -> None:
    make, x, outputs = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double()
    for p in net.parameters():  # away from the small start, where second derivatives vanish
        p.data += 0.1 * torch.randn_like(p)
    x = x.double() if x.is_floating_point() else x
    y = torch.arange(x.shape[0] * (x.shape[1] if name == "gpt" else 1)) % outputs
    params = list(net.parameters())

    def gradient() -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(net(x).flatten(0, -2), y)
        return torch.autograd.grad(loss, params, create_graph=True)

    v = [torch.randn_like(p) for p in params]
    product = torch.autograd.grad(sum((g * u).sum() for g, u in zip(gradient(), v, strict=True)), params)
    step = 1e-6

    def moved(sign: float) -> tuple[Tensor, ...]:
        for p, u in zip(params, v, strict=True):
            p.data.add_(u, alpha=sign * step)
        result = tuple(g.detach() for g in gradient())
        for p, u in zip(params, v, strict=True):
            p.data.add_(u, alpha=-sign * step)
        return result

    for ours, up, down in zip(product, moved(1), moved(-1), strict=True):
        torch.testing.assert_close(ours, (up - down) / (2 * step), rtol=2e-4, atol=1e-5)


def test_resnet_shapes_and_norms() -> None:
    net = ResNet(3, 5, width=8, blocks=(2, 1))
    assert net(torch.zeros(2, 3, 9, 13)).shape == (2, 5)
    assert net.num_features == 16
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 1 + 2 * 3 + 1
    group = ResNet(3, 5, width=8, norm="group").eval()
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(group(x)[:1], group(x[:1]))  # each sample alone


@settings(max_examples=50, deadline=None)
@given(shift=st.integers(0, 40), s=st.integers(0, 20), t=st.integers(0, 20), half=st.integers(1, 8), seed=st.integers(0, 99))
def test_rope_products_depend_on_relative_position_alone(shift: int, s: int, t: int, half: int, seed: int) -> None:
    dim = 2 * half
    q, k = torch.randn(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cos, sin = rope_tables(64, dim, dtype=torch.float64)
    turned_q, turned_k = (apply_rope(v.expand(64, dim), cos, sin) for v in (q, k))
    torch.testing.assert_close(turned_q[s] @ turned_k[t], turned_q[s + shift] @ turned_k[t + shift], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(64), rtol=1e-12, atol=1e-12)


def test_rope_is_multiplication_by_unit_complex_numbers() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(5, 6, dtype=torch.float64)
    out = apply_rope(x, cos, sin)
    for t in range(5):
        for i in range(3):
            z = complex(x[t, i], x[t, i + 3]) * complex(
                math.cos(t * 10000 ** (-2 * i / 6)), math.sin(t * 10000 ** (-2 * i / 6))
            )
            assert abs(z - complex(out[t, i], out[t, i + 3])) < 1e-12


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(1, 17), scale=st.floats(1e-2, 1e3), seed=st.integers(0, 99))
def test_rms_norm_against_a_loop(dim: int, scale: float, seed: int) -> None:
    x = scale * torch.randn(3, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    norm = RMSNorm(dim).double()
    norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(seed))
    for row, out in zip(x.tolist(), norm(x).tolist(), strict=True):
        root = math.sqrt(sum(v * v for v in row) / dim + 1e-6)
        assert out == pytest.approx([g * v / root for g, v in zip(norm.weight.tolist(), row, strict=True)], rel=1e-12)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (dim,), norm.weight, 1e-6))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attention(q, k, v, causal=causal), theirs)


def test_gpt_is_causal() -> None:
    torch.manual_seed(0)
    net = GPT(17, dim=32, depth=3, heads=4, context=12).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    tokens = torch.randint(17, (1, 12))
    embedded = net.embed(tokens).detach().requires_grad_()
    net.embed.register_forward_hook(lambda *_: embedded)
    logits = net(tokens)
    for t in range(12):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached[: t + 1].all()
        assert not reached[t + 1 :].any()


def test_vit_sees_patches_in_reading_order_and_every_pixel() -> None:
    torch.manual_seed(0)
    net = ViT(6, 3, 2, 4, dim=8, depth=1, heads=2).double()
    image = torch.rand(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    embedded = net.patch_embed(image).flatten(2).mT
    corners = image.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(1, 4, 18)
    torch.testing.assert_close(embedded, corners @ net.patch_embed.weight.reshape(8, 18).T + net.patch_embed.bias)
    (gradient,) = torch.autograd.grad(net(image).square().sum(), image)
    assert (gradient != 0).all()
    swapped = image.detach().roll(3, -1)  # positions make the order of patches count
    assert (net(swapped) - net(image)).abs().max() > 1e-4


def test_gpt_start() -> None:
    torch.manual_seed(0)
    net = GPT(256, dim=128, depth=8, heads=4, context=16)
    deviations = {name: float(p.detach().std()) for name, p in net.named_parameters() if p.dim() == 2}
    for name, deviation in deviations.items():
        writes = "o_proj" in name or "down_proj" in name
        assert deviation == pytest.approx(0.02 / math.sqrt(16) if writes else 0.02, rel=0.05), name
    assert not any("bias" in name for name, _ in net.named_parameters())
    loss = nn.functional.cross_entropy(net(torch.randint(256, (4, 16))).flatten(0, 1), torch.randint(256, (64,)))
    assert float(loss.detach()) == pytest.approx(math.log(256), abs=0.1)


def test_gpt_tied_embeddings_share_one_matrix() -> None:
    tied, free = (GPT(50, dim=16, depth=1, heads=2, context=4, tied=flag) for flag in (True, False))
    assert tied.head.weight is tied.embed.weight
    assert free.head.weight is not free.embed.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 16


def test_gpt_shorter_rows_give_the_same_prefix() -> None:
    net = GPT(9, dim=16, depth=2, heads=2, context=10)
    tokens = torch.randint(9, (2, 10), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(tokens)[:, :4], net(tokens[:, :4]))


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: MLP(0, [], 1), ValueError, "'in_features' must be at least 1, not 0"),
    (lambda: MLP(4, [3, 0], 1), ValueError, r"'hidden\[1\]' must be at least 1"),
    (lambda: MLP(4, [3], 1)(torch.zeros(2, 5)), ValueError, r"'x' has shape \(2, 5\)"),
    (lambda: ResNet(1, 2, norm="layer"), ValueError, "'norm' is 'layer'; allowed: batch, group"),
    (lambda: ResNet(1, 2, blocks=()), ValueError, "'blocks' is empty"),
    (lambda: ResNet(1, 2)(torch.zeros(2, 3, 8, 8)), ValueError, r"allowed: \(batch, 1, height, width\)"),
    (lambda: ViT(8, 3, 1, 2), ValueError, "'image_size' must be a multiple of 'patch_size' = 3, not 8"),
    (lambda: ViT(8, 2, 1, 2)(torch.zeros(2, 1, 8, 9)), ValueError, r"allowed: \(batch, 1, 8, 8\)"),
    (lambda: GPT(9, dim=12, heads=4), ValueError, r"'dim' must be a multiple of '2 \* heads' = 8, not 12"),
    (lambda: GPT(9, context=4)(torch.zeros(1, 5, dtype=torch.int64)), ValueError, "up to 'context' = 4"),
    (lambda: GPT(9)(torch.zeros(1, 5)), TypeError, "must hold integers"),
    (lambda: GPT(9)(torch.zeros(5, dtype=torch.int64)), ValueError, r"allowed: \(batch, tokens\)"),
    (lambda: GPT(9, depth=1.5), TypeError, "'depth' must be an int"),
])  # fmt: skip
def test_bad_input(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
