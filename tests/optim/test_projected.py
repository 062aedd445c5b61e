"""The projected AdamW against the authors' packages, its theorems, its bytes, and bad input."""

import itertools
import math

import pytest
import torch
from torch import nn

from corollary.optim import Fira, GaLore, ProjectedAdamW, low_rank_groups, state_bytes
from corollary.optim.projectors import DCT, SVD, Blocks, Columns, RandomBasis, RandomizedSVD
from corollary.optim.projectors import NAMED as PROJECTORS
from corollary.optim.residuals import NAMED as RESIDUALS
from corollary.optim.residuals import NormScaled, PlainSGD, SignSGD

SHAPES = ((12, 7), (7, 12), (9, 9))


def weights(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in shapes]


def descend(optimizer, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) + p.detach()
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("residual", ["drop", "sign", "sgd", "norm"])
def test_at_full_rank_there_is_no_residual(residual):
    """With rank = min(m, n) every rule gives GaLore: the residual is zero up to rounding."""
    params = weights()
    plain = descend(ProjectedAdamW(params, 0.01, rank=1.0, projector="svd"), params, 6)
    params = weights()
    rule = SignSGD(0.0) if residual == "sign" else residual  # the sign of rounding is not small
    got = descend(ProjectedAdamW(params, 0.01, rank=1.0, projector="svd", residual=rule), params, 6)
    for a, b in zip(got, plain, strict=True):
        assert (a - b).abs().max() < 1e-6


def test_without_rank_it_is_torchs_adamw():
    for options in ({}, {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}):
        ours, theirs = weights(), weights()
        got = descend(ProjectedAdamW(ours, 0.01, rank=None, **options), ours, 8)
        expected = descend(torch.optim.AdamW(theirs, 0.01, **{"weight_decay": 0.0, **options}), theirs, 8)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(("projector", "residual"), list(itertools.product(PROJECTORS, RESIDUALS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pair_trains_and_resumes_bit_by_bit(projector, residual, dtype):
    options = {"rank": 0.34, "projector": projector, "residual": residual, "update_proj_gap": 3, "seed": 5}

    def make(params):
        return ProjectedAdamW(params, 0.01, **options)

    whole = weights(dtype=dtype)
    descend(make(whole), whole, 7)
    half = weights(dtype=dtype)
    first = make(half)
    generator = torch.Generator().manual_seed(1)
    for step in range(7):
        for p in half:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) + p.detach()
        if step == 4:  # between two refreshes
            second = make(half)
            second.load_state_dict(first.state_dict())
            first = second
        first.step()
    for a, b in zip(whole, half, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_moments_at_a_refresh(moments):
    [weight] = weights(shapes=[(8, 6)])
    optimizer = ProjectedAdamW([weight], 0.01, rank=2, projector="svd", update_proj_gap=3, moments=moments)
    descend(optimizer, [weight], 3)
    before = {k: v.clone() for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor)}
    gradient = torch.randn(8, 6, dtype=torch.float64)
    weight.grad = gradient
    optimizer.step()
    after = optimizer.state[weight]
    low = gradient @ after["basis"]
    start = {
        "keep": before["exp_avg"],
        "reset": torch.zeros_like(low),
        "rotate": before["exp_avg"] @ before["basis"].T @ after["basis"],
    }[moments]
    assert (after["exp_avg"] - (0.9 * start + 0.1 * low)).abs().max() < 1e-12
    assert after["step"] == (1 if moments == "reset" else 4)
    assert (after["exp_avg_sq"] >= 0).all()


def test_a_single_sided_direction_is_followed_in_every_subspace():
    """On a gradient of rank 1 the leading subspace holds all of it: nothing is left over, whichever exact projector."""
    a, b = torch.randn(12, 1, dtype=torch.float64), torch.randn(1, 7, dtype=torch.float64)
    for projector in (SVD(), RandomizedSVD()):
        weight = nn.Parameter(torch.zeros(12, 7, dtype=torch.float64))
        optimizer = ProjectedAdamW([weight], 0.01, rank=1, projector=projector, residual=NormScaled())
        weight.grad = a @ b
        optimizer.step()
        assert float(optimizer.state[weight]["residual_norm"]) < 1e-5


def test_lazy_refresh_waits_longer_where_the_subspace_stays():
    torch.manual_seed(0)
    still = torch.randn(8, 1, dtype=torch.float64) @ torch.randn(1, 6, dtype=torch.float64)
    params = [nn.Parameter(torch.zeros(8, 6, dtype=torch.float64)) for _ in range(2)]
    options = {"rank": 1, "projector": "svd", "update_proj_gap": 2, "lazy_threshold": 0.9, "lazy_window": 2}
    optimizer = ProjectedAdamW(params, 0.01, **options)
    for _ in range(32):
        params[0].grad = still + 1e-3 * torch.randn(8, 6, dtype=torch.float64)
        params[1].grad = torch.randn(8, 6, dtype=torch.float64)
        optimizer.step()
    lazy, busy = (optimizer.state[p] for p in params)
    # Refreshes at steps 0, 2, 4; from the second comparison on the gap doubles: 8, then 16.
    assert (lazy["refreshes"], lazy["gap"]) == (5, 16)
    assert (busy["refreshes"], busy["gap"]) == (16, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("m", "n", "rank"), [(40, 24, 5), (24, 40, 5), (16, 16, 16)])
def test_state_bytes_equal_their_formulas(m, n, rank, dtype):
    number = torch.empty((), dtype=dtype).element_size()
    long, short = max(m, n), min(m, n)
    moments = 2 * long * rank * number

    def counted(**options):
        weight = nn.Parameter(torch.randn(m, n).to(dtype))
        optimizer = ProjectedAdamW([weight], **{"rank": rank, **options})
        weight.grad = torch.randn(m, n).to(dtype)
        optimizer.step()
        return state_bytes(optimizer)

    groups = math.ceil(short * rank / 64)
    assert counted(projector="svd") == moments + short * rank * number
    assert counted(projector=RandomizedSVD()) == moments + short * rank * number
    assert counted(projector="dct") == moments + 4 * rank
    assert counted(projector=Columns(None)) == moments + 4 * rank
    assert counted(projector=SVD(4, 64)) == moments + math.ceil(short * rank / 2) + groups * (number + 1)
    assert counted(projector=SVD(8, 64)) == moments + short * rank + groups * (number + 1)
    assert counted(projector="svd", residual="norm") == moments + short * rank * number + max(4, number)
    assert counted(rank=None) == 2 * m * n * number
    assert counted(projector="blocks", rank=1) == 2 * m * n * number


def test_quantized_basis_is_near_and_trains():
    exact, rough = weights(), weights()
    a = descend(ProjectedAdamW(exact, 0.01, rank=3, projector=SVD(), residual="norm"), exact, 10)
    b = descend(ProjectedAdamW(rough, 0.01, rank=3, projector=SVD(8), residual="norm"), rough, 10)
    moved = max((x - y).abs().max() for x, y in zip(a, weights(), strict=True))
    assert max((x - y).abs().max() for x, y in zip(a, b, strict=True)) < 0.3 * moved


def test_residual_norm_without_forming_it():
    """‖G - B Bᵀ G‖ slice by slice, for orthonormal and for bent bases, on both sides."""
    from corollary.optim.subspaces import Basis

    for dim, shape in ((1, (9, 6)), (0, (6, 9))):
        gradient = torch.randn(*shape, dtype=torch.float64)
        straight = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
        for basis, orthonormal in ((straight, True), (straight + 0.1 * torch.randn(6, 3, dtype=torch.float64), False)):
            space = Basis(basis, dim, orthonormal=orthonormal)
            low = space.project(gradient)
            rest = gradient.clone()
            space.add_(rest, low, -1.0)
            assert (space.residual_norm_sq(gradient, low) - rest.square().sum(dim, keepdim=True)).abs().max() < 1e-12


def test_conv_kernels_and_channels_last():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ends = []
        for view in (False, True):
            torch.manual_seed(0)
            start = torch.randn(6, 4, 3, 3, dtype=torch.float64)
            param = nn.Parameter(start.flatten(1) if view else start.to(memory_format=memory_format))
            optimizer = Fira([param], 0.01, rank=2, projector="svd")
            for _ in range(4):
                gradient = param.detach() + 1
                param.grad = gradient
                optimizer.step()
            ends.append(param.detach().flatten(1))
        assert (ends[0] - ends[1]).abs().max() < 1e-12


def test_groups_of_a_model():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    projected, rest = low_rank_groups(model, rank=8, update_proj_gap=7)
    assert [tuple(p.shape) for p in projected["params"]] == [(32, 16)]  # the head's shorter side is 4
    assert projected["update_proj_gap"] == 7
    assert len(rest["params"]) == len(list(model.parameters())) - 1
    assert rest["rank"] is None
    named, _ = low_rank_groups(model, rank=2, targets=["3"])
    assert [tuple(p.shape) for p in named["params"]] == [(4, 32)]
    with pytest.raises(ValueError, match="no layer of the model can be projected"):
        low_rank_groups(model, rank=2, targets=["attention"])
    with pytest.raises(ValueError, match="'rank' is 64"):
        low_rank_groups(model, rank=64)


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", [GaLore, Fira])
def test_ranks_out_of_range(kind):
    [weight] = weights(shapes=[(8, 6)])
    with pytest.raises(ValueError, match=r"'rank' must be in 1\.\.6 for a matrix of shape \(8, 6\), not 7"):
        kind([weight], rank=7)
    for bad in (0, -1, 0.0, 1.5):
        with pytest.raises(ValueError, match="'rank' must be None, an integer of at least 1, or a share"):
            kind([weight], rank=bad)


def test_vectors_get_adamw_whatever_the_rank():
    vector, twin = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    ours, theirs = Fira([vector], 0.1, rank=64), torch.optim.AdamW([twin], 0.1, weight_decay=0.0)
    for optimizer, p in ((ours, vector), (theirs, twin)):
        p.grad = torch.arange(5.0)
        optimizer.step()
    assert torch.allclose(vector, twin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_proj_gap": 0}, "'update_proj_gap' must be an integer of at least 1, not 0"),
        ({"scale": 0.0}, "'scale' must be above 0"),
        ({"moments": "forget"}, "'moments' must be one of keep, reset, rotate, not forget"),
        ({"projector": "qr"}, "'projector' must be a Projector or one of 'svd'.*not 'qr'"),
        ({"residual": 3}, "'residual' must be a Residual or one of 'drop'.*not 3"),
        ({"lazy_threshold": 2.0}, "'lazy_threshold' must be None or in"),
        ({"lazy_factor": 0}, "'lazy_factor' must be at least 1"),
        ({"eps": -1.0}, "'eps' must be at least 0"),
        ({"betas": (1.0, 0.9)}, r"'betas\[0\]' must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "'weight_decay' must be at least 0"),
        ({"seed": -1}, "'seed' must be in"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ProjectedAdamW(weights(), **{"rank": 2, **options})


def test_plugins_check_their_options():
    for make, message in (
        (lambda: SVD(bits=3), "'bits' must be None, 4 or 8, not 3"),
        (lambda: RandomBasis(group_size=0), "'group_size'"),
        (lambda: DCT(norm=3), "'norm' must be 1 or 2"),
        (lambda: Columns(dim=2), "'dim' must be None, 0 or 1"),
        (lambda: Blocks("sideways"), "'order' must be"),
        (lambda: NormScaled(0.5), "'growth_limit' must be at least 1"),
        (lambda: SignSGD(-1), "'lr_scale' must be at least 0"),
        (lambda: PlainSGD(-1), "'lr_scale' must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_nan_gradient_where_a_subspace_is_chosen():
    params = weights()
    begin = [p.detach().clone() for p in params]
    optimizer = Fira(params, 0.01, rank=2)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(ValueError, match=r"gradient of a parameter of shape \(12, 7\) holds NaN"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, begin, strict=True))
    descend(optimizer, params, 2)  # and it goes on from there
    assert all(p.isfinite().all() for p in params)


def test_state_of_another_shape_or_projector():
    params = weights()
    optimizer = Fira(params, 0.01, rank=2)
    descend(optimizer, params, 1)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="parameter 0 has 'exp_avg' of shape"):
        Fira(weights(shapes=((11, 7), (7, 12), (9, 9))), 0.01, rank=2).load_state_dict(saved)
    with pytest.raises(ValueError, match="no 'indices', which DCT needs"):
        ProjectedAdamW(weights(), 0.01, rank=2, projector="dct").load_state_dict(saved)


def test_parameters_added_later():
    params = weights()
    optimizer = Fira(params[:1], 0.01, rank=2)
    descend(optimizer, params[:1], 2)
    optimizer.add_param_group({"params": params[1:], "rank": 3})
    descend(optimizer, params, 2)
    assert optimizer.state[params[1]]["exp_avg"].shape == (3, 12)
    with pytest.raises(ValueError, match="'rank' must be in"):
        optimizer.add_param_group({"params": weights(shapes=[(4, 4)]), "rank": 9})
    assert len(optimizer.param_groups) == 2, "a refused group stayed"


def test_state_bytes_of_others():
    params = weights(shapes=[(10, 4)])
    optimizer = torch.optim.SGD(params, 0.1, momentum=0.9)
    assert state_bytes(optimizer) == 0
    descend(optimizer, params, 1)
    assert state_bytes(optimizer) == 10 * 4 * 8
    with pytest.raises(TypeError, match="'optimizer' must be"):
        state_bytes({})
