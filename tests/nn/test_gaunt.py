"""Gaunt products against the sum of Gaunt coefficients, e3nn's harmonics and rotations, and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.physics.wigner import gaunt as sympy_gaunt
from torch import Tensor

from corollary.linalg.sphere import gaunt_coefficients, spherical_harmonics, theta_factors, wigner_3j
from corollary.nn import GauntConvolution, GauntManyBody, GauntTensorProduct
from corollary.nn.gaunt import from_irreps, to_irreps

METHODS = ("dense", "separable", "fft")


def sympy_real_gaunt(lmax1: int, lmax2: int, lmax3: int) -> Tensor:
    """The real Gaunt tensor from sympy's complex one, by real = (1/√2)(...) written out for each sign of m."""

    def terms(degree: int, m: int) -> list[tuple[complex, int]]:
        if m == 0:
            return [(1, 0)]
        if m > 0:  # √2 cos mφ: real part of the complex harmonic, its sign (-1)^m taken off
            return [(2**-0.5 * (-1) ** m, m), (2**-0.5, -m)]
        return [(-1j * 2**-0.5 * (-1) ** m, -m), (1j * 2**-0.5, m)]

    def indices(lmax: int) -> list[tuple[int, int]]:
        return [(degree, m) for degree in range(lmax + 1) for m in range(-degree, degree + 1)]

    out = torch.zeros((lmax1 + 1) ** 2, (lmax2 + 1) ** 2, (lmax3 + 1) ** 2, dtype=torch.float64)
    for i, (l1, a) in enumerate(indices(lmax1)):
        for j, (l2, b) in enumerate(indices(lmax2)):
            for k, (l3, c) in enumerate(indices(lmax3)):
                total = 0j
                for u, m1 in terms(l1, a):
                    for v, m2 in terms(l2, b):
                        for w, m3 in terms(l3, c):
                            if m1 + m2 + m3 == 0:
                                total += u * v * w * float(sympy_gaunt(l1, l2, l3, m1, m2, m3))
                assert abs(total.imag) < 1e-14
                out[i, j, k] = total.real
    return out


def pair(lmax1: int, lmax2: int, *lead: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*lead, (n + 1) ** 2, generator=generator, dtype=torch.float64) for n in (lmax1, lmax2))
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype), (y / y.norm(dim=-1, keepdim=True)).to(dtype)


def rotation(seed: int) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * torch.linalg.det(q)


def wigner(lmax: int, matrix: Tensor) -> Tensor:
    """e3nn's representation matrix on degrees 0..lmax."""
    return torch.block_diag(*(o3.Irrep(degree, 1).D_from_matrix(matrix) for degree in range(lmax + 1)))


@pytest.fixture(scope="module", autouse=True)
def float64_for_e3nn() -> Any:
    """e3nn takes the precision of its rotations from torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_harmonics_are_those_of_e3nn_in_order_axes_and_sign() -> None:
    vectors = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    theirs = o3.spherical_harmonics(list(range(12)), vectors, normalize=True, normalization="integral")
    torch.testing.assert_close(spherical_harmonics(11, vectors), theirs, rtol=0, atol=1e-13)


def test_harmonics_are_smooth_at_the_poles_and_still_at_zero() -> None:
    poles = torch.tensor([[0.0, 1.0, 0.0], [0.0, -2.0, 0.0], [1e-9, 1.0, 0.0]], requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: spherical_harmonics(4, v), (poles,))
    zero = torch.zeros(3, requires_grad=True)
    values = spherical_harmonics(3, zero)
    values.sum().backward()
    assert not values[1:].any()
    assert torch.equal(zero.grad, torch.zeros(3))  # type: ignore[arg-type]


def test_theta_factors_stay_orthonormal_at_high_degree() -> None:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(101)
    values = theta_factors(100, np.arccos(nodes))
    for m in (0, 1, 50, 99):
        gram = 2 * np.pi * (values[m, m:] * weights) @ values[m, m:].T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


def test_gaunt_coefficients_against_sympy() -> None:
    torch.testing.assert_close(gaunt_coefficients(2, 1, 3), sympy_real_gaunt(2, 1, 3), rtol=0, atol=1e-15)
    assert wigner_3j(2, 3, 4, 1, -2, 1) == pytest.approx(float(__import__("sympy").physics.wigner.wigner_3j(2, 3, 4, 1, -2, 1)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("lmax1", "lmax2", "lmax_out"), [(0, 0, 0), (1, 1, 2), (2, 2, 4), (4, 4, 8), (5, 2, 3), (2, 5, 6), (0, 3, 3)]
)
def test_equals_the_gaunt_sum(method: str, lmax1: int, lmax2: int, lmax_out: int) -> None:
    table = gaunt_coefficients(lmax1, lmax2, lmax_out)
    x, y = pair(lmax1, lmax2, 20)
    true = torch.einsum("na,nb,abc->nc", x, y, table)
    product = GauntTensorProduct(lmax1, lmax2, lmax_out, method=method)
    assert (product(x, y) - true).abs().max() < 1e-14
    single = product.float()(x.float(), y.float())
    assert (single - torch.einsum("na,nb,abc->nc", x.float().double(), y.float().double(), table)).abs().max() < 1e-6


def test_equals_the_gaunt_sum_of_sympy() -> None:
    x, y = pair(2, 2, 4)
    true = torch.einsum("na,nb,abc->nc", x, y, sympy_real_gaunt(2, 2, 2))
    torch.testing.assert_close(GauntTensorProduct(2, 2, 2)(x, y), true, rtol=0, atol=1e-14)


def test_methods_agree_at_high_degree() -> None:
    x, y = pair(20, 13, 3)
    results = [GauntTensorProduct(20, 13, 25, method=m)(x, y) for m in METHODS]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 7), st.integers(0, 7), st.sampled_from(METHODS), st.integers(0, 2**31), st.data())
def test_values_multiply(lmax1: int, lmax2: int, method: str, seed: int, data: st.DataObject) -> None:
    """The product's values anywhere are the products of the values; a smaller output is its truncation."""
    x, y = pair(lmax1, lmax2, 2, seed=seed)
    full = GauntTensorProduct(lmax1, lmax2, method=method)(x, y)
    vectors = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed))
    f, g = x @ spherical_harmonics(lmax1, vectors).mT, y @ spherical_harmonics(lmax2, vectors).mT
    torch.testing.assert_close(full @ spherical_harmonics(lmax1 + lmax2, vectors).mT, f * g, rtol=0, atol=1e-12)
    lmax_out = data.draw(st.integers(0, lmax1 + lmax2))
    small = GauntTensorProduct(lmax1, lmax2, lmax_out, method=method)(x, y)
    torch.testing.assert_close(small, full[..., : (lmax_out + 1) ** 2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_commutes_with_rotations_and_inversion(method: str) -> None:
    matrix = rotation(3)
    x, y = pair(4, 3, 6)
    product = GauntTensorProduct(4, 3, weighted=True, method=method)
    with torch.no_grad():
        for weight in product.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    turned = product(x @ wigner(4, matrix).mT, y @ wigner(3, matrix).mT)
    torch.testing.assert_close(turned, product(x, y) @ wigner(7, matrix).mT, rtol=0, atol=1e-12)
    flips = [torch.tensor([(-1.0) ** d for d in range(n + 1) for _ in range(2 * d + 1)]) for n in (4, 3, 7)]
    torch.testing.assert_close(product(x * flips[0], y * flips[1]), product(x, y) * flips[2], rtol=0, atol=1e-13)


def test_weights_multiply_the_paths() -> None:
    product = GauntTensorProduct(2, 1, 3, channels=4, weighted=True)
    with torch.no_grad():
        for weight in product.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(2))
    x, y = pair(2, 1, 5, 4)
    w1, w2, w3 = (torch.stack([w[:, d] for d in range(w.shape[1]) for _ in range(2 * d + 1)], 1) for w in product.parameters())
    true = torch.einsum("nca,ca,ncb,cb,abk,ck->nck", x, w1, y, w2, gaunt_coefficients(2, 1, 3), w3)
    torch.testing.assert_close(product(x, y), true, rtol=0, atol=1e-13)


def test_equals_e3nn_restricted_to_the_gaunt_paths() -> None:
    """Same multiplicities, same flat layout: e3nn's tensor product with each path scaled to its Gaunt coefficient."""
    lmax, channels = 2, 3
    irreps = o3.Irreps([(channels, (d, (-1) ** d)) for d in range(lmax + 1)])
    out = o3.Irreps([(channels, (d, (-1) ** d)) for d in range(2 * lmax + 1)])
    paths = [
        (i, j, k, "uuu", False, ((2 * i + 1) * (2 * j + 1) * (2 * k + 1) / (4 * torch.pi)) * wigner_3j(i, j, k, 0, 0, 0) ** 2)
        for i in range(lmax + 1)
        for j in range(lmax + 1)
        for k in range(abs(i - j), i + j + 1, 2)
    ]
    theirs = o3.TensorProduct(irreps, irreps, out, paths, irrep_normalization="none", path_normalization="none")
    x, y = irreps.randn(7, -1), irreps.randn(7, -1)
    ours = to_irreps(GauntTensorProduct(lmax, lmax)(from_irreps(x, lmax, channels), from_irreps(y, lmax, channels)))
    torch.testing.assert_close(ours, theirs(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_leading_axes_broadcast(method: str) -> None:
    product = GauntTensorProduct(2, 1, method=method)
    x, y = torch.randn(5, 1, 9), torch.randn(3, 4)
    out = product(x, y)
    assert out.shape == (5, 3, 16)
    torch.testing.assert_close(out[4, 2], product(x[4, 0], y[2]))


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method: str) -> None:
    """Forces are derivatives, and training on them takes second ones."""
    convolution = GauntConvolution(1, 2, 2, channels=2, method=method)
    features, vectors, radial = torch.randn(2, 2, 4), torch.randn(2, 3), torch.randn(2, 2, 3)
    for value in (features, vectors, radial):
        value.requires_grad_()
    assert torch.autograd.gradcheck(convolution, (features, vectors, radial))
    assert torch.autograd.gradgradcheck(convolution, (features, vectors, radial))


@pytest.mark.parametrize("method", METHODS)
def test_convolution_is_the_product_with_the_filter(method: str) -> None:
    features, vectors, radial = torch.randn(6, 3, 9), torch.randn(6, 3), torch.randn(6, 3, 5)
    convolution = GauntConvolution(2, 4, 3, channels=3, method=method)
    harmonics = o3.spherical_harmonics(list(range(5)), vectors, normalize=True, normalization="integral")
    spread = torch.cat([radial[..., d : d + 1].expand(-1, -1, 2 * d + 1) for d in range(5)], -1)
    true = torch.einsum("nca,nb,ncb,abk->nck", features, harmonics, spread, gaunt_coefficients(2, 4, 3))
    torch.testing.assert_close(convolution(features, vectors, radial), true, rtol=0, atol=1e-12)
    matrix = rotation(5)
    turned = convolution(features @ wigner(2, matrix).mT, vectors @ matrix.mT, radial)
    torch.testing.assert_close(turned, true @ wigner(3, matrix).mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_many_body_is_the_product_taken_one_by_one(method: str, order: int) -> None:
    lmax = 2
    factors = [torch.randn(4, (lmax + 1) ** 2) for _ in range(order)]
    true, degree = factors[0], lmax
    for factor in factors[1:]:
        true = torch.einsum("na,nb,abk->nk", true, factor, _coefficients(degree, lmax))
        degree += lmax
    torch.testing.assert_close(GauntManyBody(lmax, order, method=method)(*factors), true, rtol=0, atol=1e-11)
    small = GauntManyBody(lmax, order, 1, method=method)
    torch.testing.assert_close(small(*factors), true[:, :4], rtol=0, atol=1e-11)
    torch.testing.assert_close(small(factors[0]), small(*factors[:1] * order), rtol=0, atol=1e-11)


_tables: dict[tuple[int, int], Tensor] = {}


def _coefficients(lmax1: int, lmax2: int) -> Tensor:
    key = (lmax1, lmax2)
    if key not in _tables:
        _tables[key] = gaunt_coefficients(lmax1, lmax2, lmax1 + lmax2)
    return _tables[key]


def test_many_body_weights() -> None:
    layer = GauntManyBody(1, 3, 2, channels=2, weighted=True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(4, 2, 4)
    scaled = [x * w[:, [0, 1, 1, 1]] for w in layer.weight]  # type: ignore[union-attr]
    true = GauntManyBody(1, 3, 2)(*scaled) * layer.weight_out[:, [0] + 3 * [1] + 5 * [2]]  # type: ignore[index]
    torch.testing.assert_close(layer(x), true)


def test_a_grid_below_the_bandlimit_aliases() -> None:
    x, y = pair(3, 3, 4)
    true = GauntTensorProduct(3, 3, 3)(x, y)
    assert (GauntTensorProduct(3, 3, 3, bandlimit=3)(x, y) - true).abs().max() > 1e-3


def test_state_holds_weights_alone_and_tables_keep_float64() -> None:
    product = GauntTensorProduct(3, 3, weighted=True)
    assert set(product.state_dict()) == {"weight1", "weight2", "weight_out"}
    assert not GauntTensorProduct(3, 3).state_dict()
    x, y = pair(3, 3, 4)
    before = product(x, y)
    assert torch.equal(product.to(torch.float32).to(torch.float64)(x, y), before)


def test_auto_takes_the_dense_matrix_at_small_degrees_alone() -> None:
    assert GauntTensorProduct(3, 3).method == "dense"
    assert GauntTensorProduct(12, 12).method == "separable"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GauntTensorProduct(-1, 2), "lmax must be an integer of at least 0, not -1"),
        (lambda: GauntTensorProduct(1.5, 0), "lmax must be an integer of at least 0, not 1.5"),  # type: ignore[arg-type]
        (lambda: GauntTensorProduct(2, 2, 5), "lmax_out must lie between 0 and 4.*it is 5"),
        (lambda: GauntTensorProduct(2, 2, channels=0), "channels must be an integer of at least 1, not 0"),
        (lambda: GauntTensorProduct(2, 2, method="fast"), "method is 'fast'; allowed: auto, dense, separable, fft"),
        (lambda: GauntTensorProduct(2, 2, bandlimit=3), "bandlimit must be at least 4"),
        (lambda: GauntManyBody(2, 0), "order must be an integer of at least 1, not 0"),
        (lambda: spherical_harmonics(-1, torch.zeros(3)), "lmax must be at least 0"),
        (lambda: spherical_harmonics(1, torch.zeros(4)), r"vectors must be floating of shape \(..., 3\).*\(4,\)"),
        (lambda: from_irreps(torch.zeros(7), 1, 2), r"values must have shape \(..., 8\), not \(7,\)"),
        (lambda: to_irreps(torch.zeros(2, 5)), r"coefficients must have shape .* not \(2, 5\)"),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs_are_named() -> None:
    product = GauntTensorProduct(2, 1, channels=3, weighted=True)
    with pytest.raises(ValueError, match=r"input2 must have shape \(..., 4\) for lmax = 1, not \(3, 9\)"):
        product(torch.randn(3, 9), torch.randn(3, 9))
    with pytest.raises(ValueError, match=r"input1 must have shape \(..., 3, 9\), not \(2, 9\)"):
        product(torch.randn(2, 9), torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"input1 is torch.float32, but the module is torch.float64"):
        product(torch.randn(3, 9, dtype=torch.float32), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"do not broadcast: input1 \(2,\), input2 \(3,\)"):
        GauntTensorProduct(1, 1)(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"input1 is torch.bfloat16; method 'fft' takes float32 and float64"):
        GauntTensorProduct(1, 1, method="fft").bfloat16()(*torch.randn(2, 4).bfloat16())
    convolution = GauntConvolution(1, 1, channels=2)
    with pytest.raises(ValueError, match=r"vectors must have shape \(..., 3\), not \(4,\)"):
        convolution(torch.randn(2, 4), torch.randn(4))
    with pytest.raises(ValueError, match=r"radial must have shape \(..., 2 or 1, 2\), not \(3, 2\)"):
        convolution(torch.randn(2, 4), torch.randn(3), torch.randn(3, 2))
    with pytest.raises(TypeError, match=r"radial is torch.int64, but features is torch.float64"):
        convolution(torch.randn(2, 4), torch.randn(3), torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"do not broadcast: features \(5,\), vectors \(4,\), radial \(\)"):
        convolution(torch.randn(5, 2, 4), torch.randn(4, 3))
    with pytest.raises(ValueError, match="inputs must be 3 tensors, or one for all of them, not 2"):
        GauntManyBody(1, 3)(torch.randn(4), torch.randn(4))
