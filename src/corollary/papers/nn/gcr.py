"""How the claims of the Grassmann class representation are measured: small networks on patches of real photographs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.claims import Paired, Slope, Trial, claim
from corollary.data import Split, image_patches
from corollary.linalg import Grassmann
from corollary.models import MLP
from corollary.nn import GrassmannLinear
from corollary.optim import JointOptimizer, RiemannianSGD, split_parameters
from corollary.testing import Case

DIM = 8
DIMS = (1, 2, 4, 8)
WIDTH = 64
# The same number of choices for both heads: one rate for softmax, backbone and head rate for the subspaces.
SOFTMAX_GRID = ((0.005, 0.005), (0.01, 0.01), (0.02, 0.02), (0.04, 0.04))
GRASSMANN_GRID = ((0.001, 0.03), (0.001, 0.1), (0.003, 0.03), (0.003, 0.1))


class OneDirection(GrassmannLinear):
    """The key idea broken: of each class's subspace only one direction, the mean of its frame, reaches the logit."""

    def forward(self, input: Tensor) -> Tensor:
        direction = F.normalize(self.weight.sum(1), dim=-1)
        return self.gamma * F.linear(F.normalize(input, dim=-1), direction).abs()


Head = Callable[[int, int], nn.Module]


def patches(trial: Trial, seed: int | None = None) -> Split:
    """Colour patches of 8 by 8 pixels, standardized by the training part; the class is the photograph."""
    split = image_patches(
        size=8,
        per_image=trial.pick(smoke=60, laptop=1200),
        test_size=0.25,
        seed=trial.seed if seed is None else seed,
    )
    mean, std = split.train_x.mean(), split.train_x.std()
    train_x, test_x = ((x - mean).div(std).flatten(1) for x in (split.train_x, split.test_x))
    return Split(train_x, split.train_y, test_x, split.test_y, split.classes)


def train(trial: Trial, split: Split, head: Head, rates: Sequence[float]) -> MLP:
    """A small network with this head: AdamW for the backbone (and a softmax head), Riemannian SGD for class subspaces."""
    torch.manual_seed(trial.seed)  # every head stands on the same start of the backbone
    model = MLP(split.train_x.shape[1], [WIDTH], split.num_classes)
    model.head = head(model.num_features, split.num_classes)  # type: ignore[assignment]
    model = model.to(trial.device)
    split = split.to(trial.device)
    curved, rest = split_parameters(model)
    members: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=rates[0], foreach=True)]
    if curved:
        members.append(RiemannianSGD(curved, lr=rates[1], momentum=0.9))
    optimizer = JointOptimizer(members)
    steps, batch = trial.pick(smoke=20, laptop=400), 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(trial.seed)
    for _ in range(steps):
        rows = torch.randint(len(split.train_x), (batch,), generator=generator).to(trial.device)
        loss = F.cross_entropy(model(split.train_x[rows]), split.train_y[rows])
        optimizer.zero_grad()
        loss.backward()
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
    """The best of four choices for each head, by the error on two splits that no trial uses."""
    trials = [Trial(trial.seed + i, trial.scale, trial.device) for i in range(trial.pick(smoke=1, laptop=2))]
    splits = [patches(t) for t in trials]

    def best(head: Head, grid: Sequence[Sequence[float]]) -> list[float]:
        def error(rates: Sequence[float]) -> float:
            return sum(test_error(train(t, s, head, rates), s, trial.device) for t, s in zip(trials, splits, strict=True))

        return list(min(grid, key=error))

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
    for label in labels.unique():
        cosines = unit[labels == label] @ unit[labels == label].T
        above = torch.ones_like(cosines).triu(1).bool()
        angles.append(cosines[above].clamp(-1, 1).arccos().mean())
    return float(torch.stack(angles).mean().rad2deg())


@claim(control={"head": OneDirection})
def variability_grows(trial: Trial, head: type[GrassmannLinear] = GrassmannLinear) -> Slope:
    """Intra-class angles of the test features at growing dimension; the control reads one direction of each subspace."""
    split = patches(trial)
    angles = []
    for dim in DIMS:
        model = train(trial, split, lambda n, c, dim=dim: head(n, c, dim), (0.003, 0.1))  # type: ignore[misc]
        angles.append(intra_class_angle(features(model, split.test_x, trial.device), split.test_y))
    trial.figure(
        "intra-class angle", x=DIMS, y={head.__name__: angles}, xlabel="subspace dimension", ylabel="degrees", log="x"
    )
    return Slope(x=DIMS, y=angles)


def held_out(trial: Trial) -> tuple[Split, Split]:
    """Half of the photographs, drawn by the seed, to train the backbone; the other half for the linear probe."""
    split = patches(trial)
    order = torch.randperm(split.num_classes, generator=torch.Generator().manual_seed(trial.seed))
    halves = []
    for chosen in order.tensor_split(2):
        new = torch.full((split.num_classes,), -1)
        new[chosen] = torch.arange(len(chosen))
        keep, kept = new[split.train_y] >= 0, new[split.test_y] >= 0
        halves.append(
            Split(
                split.train_x[keep], new[split.train_y[keep]], split.test_x[kept], new[split.test_y[kept]],
                tuple(split.classes[i] for i in chosen.tolist()),
            )
        )  # fmt: skip
    return halves[0], halves[1]


def probe_error(model: MLP, split: Split, device: str) -> float:
    """Error of a logistic regression on frozen features, on classes that the model never saw."""
    train_x, test_x = (features(model, x, device).double().numpy() for x in (split.train_x, split.test_x))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(train_x, split.train_y.numpy())
    return 1.0 - float(probe.score(test_x, split.test_y.numpy()))


@claim(control={"head": OneDirection})
def transfer_improves(trial: Trial, head: type[GrassmannLinear] = GrassmannLinear) -> Slope:
    """Error of a linear probe on unseen classes at growing dimension; the control reads one direction of each subspace."""
    seen, unseen = held_out(trial)
    errors = []
    for dim in DIMS:
        model = train(trial, seen, lambda n, c, dim=dim: head(n, c, dim), (0.003, 0.1))  # type: ignore[misc]
        errors.append(probe_error(model, unseen, trial.device))
    trial.figure("transfer error", x=DIMS, y={head.__name__: errors}, xlabel="subspace dimension", ylabel="error", log="x")
    return Slope(x=DIMS, y=errors)


def _turn(manifold: Grassmann, generator: torch.Generator, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Another orthonormal basis of the same subspaces."""
    q: Tensor = torch.linalg.qr(torch.randn(5, manifold.k, manifold.k, generator=generator, dtype=dtype)).Q
    return lambda x: x @ q


CONFORMANCE = {
    "corollary.nn.GrassmannLinear": Case(
        lambda: GrassmannLinear(6, 4, 2),
        {"inputs": ((6,),), "output": (4,), "dtypes": (torch.float32, torch.float64, torch.bfloat16)},
    ),
    "corollary.linalg.Grassmann": Case(lambda: Grassmann(6, 2), {"gauge": _turn}),
    "corollary.optim.RiemannianSGD": Case(lambda params, **options: RiemannianSGD(params, lr=0.05, momentum=0.9, **options)),
}
