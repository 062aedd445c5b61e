"""How the claims of the Grassmann class representation are measured: small networks on patches of real photographs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.claims import Paired, Slope, Trial, claim
from corollary.data import Split, image_patches
from corollary.linalg import Grassmann, ManifoldParameter
from corollary.models import MLP
from corollary.nn import GrassmannLinear
from corollary.optim import JointOptimizer, RiemannianSGD, split_parameters
from corollary.testing import Case
from corollary.testing.optimizer import Problem, separable

DIM = 8
DIMS = (1, 2, 4, 8)
# A line that fails to hold its class leaves the features spread, which hides the growth; planes and up hold theirs.
PLANES = (2, 4, 8, 16)
LABELLED = 100  # of each unseen class, for the linear probe
WIDTHS = (128, 128)
# AdamW's and Riemannian SGD's rate where the dimension is what varies.
RATES = {"variability": (0.003, 0.1), "transfer": (0.01, 0.1)}
# As many choices for either head: AdamW's rate for softmax; AdamW's and Riemannian SGD's for subspaces.
SOFTMAX_GRID = ((0.005,), (0.01,), (0.02,))
GRASSMANN_GRID = ((0.001, 0.1), (0.003, 0.03), (0.003, 0.1))


class OneDirection(GrassmannLinear):
    """The key idea broken: of each class's subspace only the first direction reaches the logit, whatever the dimension."""

    def forward(self, input: Tensor) -> Tensor:
        return self.gamma * F.linear(F.normalize(input, dim=-1), self.weight[:, 0]).abs()


Head = Callable[[int, int], nn.Module]


def patches(trial: Trial) -> Split:
    """Colour patches of 8 by 8 pixels, standardized by the training part; the class is the photograph."""
    split = image_patches(size=8, per_image=trial.pick(smoke=60, laptop=1200), test_size=0.25, seed=trial.seed)
    mean, std = split.train_x.mean(), split.train_x.std()
    train_x, test_x = ((x - mean).div(std).flatten(1) for x in (split.train_x, split.test_x))
    return Split(train_x, split.train_y, test_x, split.test_y, split.classes)


def train(trial: Trial, split: Split, head: Head, rates: Sequence[float], steps: int = 300) -> MLP:
    """A small network with this head: AdamW for the backbone (and a softmax head), Riemannian SGD for class subspaces."""
    torch.manual_seed(trial.seed)  # every head stands on the same start of the backbone
    model = MLP(split.train_x.shape[1], WIDTHS, split.num_classes)
    model.head = head(model.num_features, split.num_classes)  # type: ignore[assignment]
    model = model.to(trial.device)
    split = split.to(trial.device)
    curved, rest = split_parameters(model)
    members: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=rates[0], fused=True)]
    if curved:
        members.append(RiemannianSGD(curved, lr=rates[1], momentum=0.9))
    optimizer = JointOptimizer(members)
    steps, batch = trial.pick(smoke=20, laptop=steps, full=10 * steps), 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(trial.seed)
    for _ in range(steps):
        rows = torch.randint(len(split.train_x), (batch,), generator=generator).to(trial.device)
        loss = F.cross_entropy(model(split.train_x[rows]), split.train_y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def test_error(model: nn.Module, split: Split, device: str) -> float:
    """Share of the test patches that the model gets wrong."""
    predicted = model(split.test_x.to(device)).argmax(1).cpu()
    return float((predicted != split.test_y).double().mean())


@torch.no_grad()
def features(model: MLP, x: Tensor, device: str) -> Tensor:
    return model.features(x.to(device)).cpu()


def tune_rates(trial: Trial, dim: int = DIM) -> Mapping[str, Any]:
    """The best of three choices for each head, by the error on a split that no trial uses."""
    split = patches(trial)

    def best(head: Head, grid: Sequence[Sequence[float]]) -> list[float]:
        errors = [test_error(train(trial, split, head, rates), split, trial.device) for rates in grid]
        return list(grid[errors.index(min(errors))])

    return {
        "softmax": best(nn.Linear, SOFTMAX_GRID),
        "grassmann": best(lambda n, c: GrassmannLinear(n, c, dim), GRASSMANN_GRID),
    }


@claim(control={"dim": 1}, tune=tune_rates)
def beats_softmax(trial: Trial, dim: int = DIM) -> Paired:
    """Test error of subspaces and of softmax, from the same backbone, split and batches; the control shrinks to lines."""
    split = patches(trial)
    ours = train(trial, split, lambda n, c: GrassmannLinear(n, c, dim), trial.tuned["grassmann"])
    softmax = train(trial, split, nn.Linear, trial.tuned["softmax"])
    return Paired(ours=test_error(ours, split, trial.device), baseline=test_error(softmax, split, trial.device))


def intra_class_angle(x: Tensor, labels: Tensor) -> float:
    """Mean angle in degrees between two features of one class, averaged over the classes."""
    unit = F.normalize(x.double(), dim=1)
    angles = []
    for label in torch.unique(labels):
        cosines = unit[labels == label] @ unit[labels == label].T
        above = torch.ones_like(cosines).triu(1).bool()
        angles.append(cosines[above].clamp(-1, 1).arccos().mean())
    return float(torch.stack(angles).mean().rad2deg())


def halves(trial: Trial) -> tuple[Split, Split]:
    """The patches of half of the photographs, drawn by the seed, and those of the other half."""
    split = patches(trial)
    order = torch.randperm(split.num_classes, generator=torch.Generator().manual_seed(trial.seed))

    def half(chosen: Tensor) -> Split:
        new = torch.full((split.num_classes,), -1)
        new[chosen] = torch.arange(len(chosen))
        train_y, test_y = new[split.train_y], new[split.test_y]
        keep, kept = train_y >= 0, test_y >= 0
        names = tuple(split.classes[i] for i in chosen.tolist())
        return Split(split.train_x[keep], train_y[keep], split.test_x[kept], test_y[kept], names)

    first, second = order.tensor_split(2)
    return half(first), half(second)


@claim(control={"head": OneDirection})
def variability_grows(trial: Trial, head: type[GrassmannLinear] = GrassmannLinear) -> Slope:
    """Intra-class angles of test features, the mean of both halves, at growing dimension; the control reads one direction."""
    both = halves(trial)
    angles = []
    for dim in PLANES:
        angle = 0.0
        for split in both:
            model = train(trial, split, partial(head, dim=dim), RATES["variability"], steps=600)
            angle += intra_class_angle(features(model, split.test_x, trial.device), split.test_y) / 2
        angles.append(angle)
    trial.figure(
        "intra-class angle", x=PLANES, y={head.__name__: angles}, xlabel="subspace dimension", ylabel="degrees", log="x"
    )
    return Slope(x=PLANES, y=angles)


def probe_error(model: MLP, split: Split, device: str) -> float:
    """Error of a logistic regression on frozen features, learned from a few labels of classes that the model never saw."""
    few = torch.cat([(split.train_y == label).nonzero().flatten()[:LABELLED] for label in range(split.num_classes)])
    train_x, test_x = (features(model, x, device).double().numpy() for x in (split.train_x[few], split.test_x))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train_x, split.train_y[few].numpy())
    return 1.0 - float(probe.score(test_x, split.test_y.numpy()))


@claim(control={"head": OneDirection})
def transfer_improves(trial: Trial, head: type[GrassmannLinear] = GrassmannLinear) -> Slope:
    """Error of a linear probe on unseen classes, both ways, at growing dimension; the control reads one direction."""
    first, second = halves(trial)
    errors = []
    for dim in DIMS:
        error = 0.0
        for seen, unseen in ((first, second), (second, first)):
            model = train(trial, seen, partial(head, dim=dim), RATES["transfer"], steps=400)
            error += probe_error(model, unseen, trial.device) / 2
        errors.append(error)
    trial.figure("transfer error", x=DIMS, y={head.__name__: errors}, xlabel="subspace dimension", ylabel="error", log="x")
    return Slope(x=DIMS, y=errors)


def _turn(manifold: Grassmann, generator: torch.Generator, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Another orthonormal basis of the same subspaces."""
    q: Tensor = torch.linalg.qr(torch.randn(5, manifold.k, manifold.k, generator=generator, dtype=dtype)).Q
    return lambda x: x @ q


def frames_and_flat() -> Problem:
    """Three frames of planes in six dimensions, and two ordinary parameters beside them."""
    problem = separable(((3, 6, 2), (4, 3), (5,)))
    return replace(problem, start=(np.linalg.qr(problem.start[0]).Q, *problem.start[1:]))


def frame_parameter(tensor: Tensor) -> nn.Parameter:
    """The first of the problem's parameters lives on the Grassmannian."""
    return ManifoldParameter(tensor, Grassmann(6, 2)) if tensor.shape[1:] == (6, 2) else nn.Parameter(tensor)


def oracle(
    problem: Problem, steps: int, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0, maximize: bool = False
) -> list[list[NDArray[np.float64]]]:
    """The paper's Algorithm 1 for each frame, by the thin SVD; stochastic gradient descent with momentum for the rest."""
    params = [p.copy() for p in problem.start]
    buffers = [np.zeros(p.shape) for p in params]
    path = []
    for _ in range(steps):
        for p, d, m in zip(params, problem.gradient(params), buffers, strict=True):
            if p.ndim < 3:
                m[:] = momentum * m + (-d if maximize else d) + weight_decay * p
                p -= lr * m
                continue
            for s, gradient, buffer in zip(p, d, m, strict=True):
                flat = np.eye(6) - s @ s.T
                buffer[:] = momentum * flat @ buffer + flat @ (-gradient if maximize else gradient)
                u, sigma, vt = np.linalg.svd(-lr * buffer, full_matrices=False)
                s[:] = (s @ vt.T @ np.diag(np.cos(sigma)) + u @ np.diag(np.sin(sigma))) @ vt
        path.append([p.copy() for p in params])
    return path


def rsgd(params: Any, lr: float = 0.05, momentum: float = 0.9, **options: Any) -> RiemannianSGD:
    return RiemannianSGD(params, lr=lr, momentum=momentum, **options)


CONFORMANCE = {
    "corollary.nn.GrassmannLinear": Case(
        lambda: GrassmannLinear(6, 4, 2),
        {"inputs": ((6,),), "output": (4,), "dtypes": (torch.float32, torch.float64, torch.bfloat16)},
    ),
    "corollary.linalg.Grassmann": Case(lambda: Grassmann(6, 2), {"gauge": _turn}),
    "corollary.optim.RiemannianSGD": Case(
        rsgd,
        {
            "oracle": oracle,
            "problem": frames_and_flat,
            "parameter": frame_parameter,
            "options": ({}, {"momentum": 0.0}, {"lr": 0.02, "weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}),
            "foreach": False,  # the ordinary parameters always take it
            "complex": "works",
        },
    ),
}
