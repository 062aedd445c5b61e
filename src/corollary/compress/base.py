"""Compressing a trained model: what every method shares."""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from corollary.adapt.inject import Target
from corollary.adapt.site import Site
from corollary.compress.calibration import Batch, Calibration, Moments, calibrate
from corollary.compress.report import CompressionReport, LayerReport
from corollary.compress.sites import compressible, replace_layer, site_of

_REGISTRY = "_corollary_compression"
_MEMO = 2**26  # weights: above this many, a factorization is made twice rather than kept for every layer
_CONFIGS: dict[str, type[CompressConfig]] = {}

Spec = dict[str, Any]
"""what a layer was replaced by, as plain data: enough to build it again, empty, from the dense layer"""


@dataclass(frozen=True)
class Place:
    """One layer that is to be compressed.

    Args:
        name: its name in the model.
        layer: the dense layer.
        site: its geometry.
        moments: of its inputs; None where nothing was calibrated.
        memo: where a method keeps what choosing and replacing both need; empty for a model too large to keep it for all layers.
    """

    name: str
    layer: nn.Module
    site: Site
    moments: Moments | None
    memo: dict[str, Any] | None = None

    @property
    def matrix(self) -> Tensor:
        """The layer's weight as a matrix (out, in)."""
        return self.site.matrix(cast(Tensor, self.layer.weight).detach())

    @property
    def itemsize(self) -> int:
        """Bytes of one number of its weight."""
        return cast(Tensor, self.layer.weight).element_size()

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        return getattr(self.layer, "bias", None) is not None

    @property
    def bias(self) -> Tensor | None:
        """Its bias (out,), where it has one."""
        bias = getattr(self.layer, "bias", None)
        return None if bias is None else cast(Tensor, bias).detach()


@dataclass(frozen=True)
class Replacement:
    """What a method puts in a layer's place.

    Args:
        module: the new layer.
        spec: how to build it again.
        rank: of its factors, where it has some.
        macs: multiplications for one input.
        error: relative squared error in the method's metric, where it is known.
    """

    module: nn.Module
    spec: Spec
    rank: int | None
    macs: int
    error: float | None


class CompressConfig(ABC):
    """A method with its settings: a frozen dataclass, which `compress` takes.

    A method says how much of what it keeps of every layer (`choose`), given all of them, and then replaces them one by one
    (`replace`). Subclasses are found by their name when a saved model is loaded.
    """

    needs_calibration: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CONFIGS[cls.__name__] = cls

    @property
    def searches(self) -> bool:
        """Whether `choose` looks at the moments of all layers before the first one is replaced."""
        return False

    @property
    def calibrated(self) -> bool:
        """Whether these settings need moments of the layers' inputs."""
        return self.needs_calibration

    @abstractmethod
    def choose(self, places: Sequence[Place]) -> Sequence[int | None]:
        """The rank of every layer, or whatever number `replace` takes; None leaves the layer as it is."""

    @abstractmethod
    def spec(self, place: Place, choice: int) -> Spec:
        """How the layer's replacement will be built: known before its weights are."""

    @abstractmethod
    def replace(self, place: Place, choice: int) -> Replacement:
        """What comes in the layer's place."""

    @abstractmethod
    def build(self, layer: nn.Module, spec: Spec) -> nn.Module:
        """The module of a spec, empty, in the place of the dense layer: what a saved state is loaded into."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        return dataclasses.asdict(cast(Any, self))


def config_from_dict(name: str, settings: Mapping[str, Any]) -> CompressConfig:
    """The configuration that `to_dict` wrote; raises ``ValueError`` for a name or settings that there are not."""
    if name not in _CONFIGS:
        raise ValueError(f"no method '{name}'; there are: {', '.join(sorted(_CONFIGS))}")
    kind = _CONFIGS[name]
    known = {field.name for field in dataclasses.fields(cast(Any, kind))}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{name} has no setting '{unknown[0]}'; it has: {', '.join(sorted(known))}")
    return kind(**settings)


@dataclass(frozen=True)
class Step:
    """One call of `compress` on a model: the method, and what each layer was replaced by, in order."""

    config: CompressConfig
    layers: dict[str, Spec]


@dataclass
class Registry:
    """What a model knows of its compression."""

    steps: list[Step] = dataclasses.field(default_factory=list)
    report: CompressionReport | None = None


def registry_of(model: nn.Module) -> Registry:
    """The model's registry; raises ``ValueError`` where it was never compressed."""
    found = model.__dict__.get(_REGISTRY)
    if found is None:
        raise ValueError("'model' was not compressed; call compress(model, ...) first and take what it gives back")
    return cast(Registry, found)


def _bytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _numbers(module: nn.Module) -> int:
    """Parameters, shared ones counted once; codes of packed weights count too."""
    found: dict[int, int] = {}
    for part in module.modules():
        count = getattr(part, "number_of_parameters", None)
        if callable(count):
            found[id(part)] = count()
        else:
            found.update({id(p): p.numel() for p in part._parameters.values() if p is not None})
    return sum(found.values())


@torch.no_grad()
def compress(
    model: nn.Module,
    config: CompressConfig,
    targets: Target | Sequence[Target] | None = None,
    *,
    calibration: Calibration | Iterable[Batch] | None = None,
    sequential: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Replace layers of a trained model by smaller ones.

    The result is an ordinary model: the same classes around the layers, and ordinary modules in their places, so it trains, exports
    and compiles as before. `compression_report` says what was done to each layer, `save` and `load` keep it.

    Args:
        model: any module with Linear, Conv1d, Conv2d, Embedding or transformers' Conv1D layers.
        config: the method, such as ``LoRD(ratio=0.7)``.
        targets: which layers, as in `corollary.adapt.adapt`: names, their ends after a dot, regular expressions, module types. None:
            every linear layer that shares its weight with no other.
        calibration: what `calibrate` gave, or batches for it; needed by methods that look at activations.
        sequential: measure each layer's inputs anew behind the layers that are already compressed, one pass over the batches a layer,
            so that it makes up for what they changed. Needs ``calibration`` as batches that can be gone through many times.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The compressed model. Compressing it again, with another method or other targets, adds a step.

    Raises:
        TypeError: for targets that cannot be compressed.
        ValueError: for settings that do not fit the layers, or calibration that is missing or lacks a layer.

    Example:
        >>> import torch
        >>> from corollary.compress import SVD, compress, compression_report
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> small = compress(model, SVD(ratio=0.5), "0")
        >>> small[0].rank, round(compression_report(small).ratio, 2)
        (16, 0.51)
    """
    begin = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise TypeError(f"'model' must be an nn.Module, not {type(model).__name__}")
    if not isinstance(config, CompressConfig):
        raise TypeError(f"'config' must be a method's settings such as SVD(ratio=0.5), not {config!r}")
    names = list(compressible(model, targets))
    data = None if calibration is None or isinstance(calibration, Calibration) else calibration
    if config.calibrated and calibration is None:
        raise ValueError(f"{type(config).__name__} looks at activations: give 'calibration', from calibrate() or as batches")
    if sequential and (data is None or iter(data) is data):
        raise ValueError("'sequential' needs 'calibration' as batches that can be gone through once a layer, such as a list")
    before = (_numbers(model), _bytes(model))
    if not inplace:
        model = copy.deepcopy(model)
    moments: Mapping[str, Moments] = {}
    if config.calibrated and not (sequential and not config.searches):
        moments = calibrate(model, data, _exactly(names)) if data is not None else cast(Calibration, calibration)
    for name in names if moments else ():
        if name not in moments:
            raise ValueError(f"'calibration' has no layer '{name}'; it has for example: {', '.join(list(moments)[:3])}")
    layers = {name: model.get_submodule(name) for name in names}
    small = sum(cast(Tensor, layer.weight).numel() for layer in layers.values()) <= _MEMO
    places = [
        Place(n, layer, site_of(n, layer), moments[n] if moments else None, {} if small else None)
        for n, layer in layers.items()
    ]
    choices = config.choose(places)
    step, rows = Step(config, {}), []
    for place, choice in zip(places, choices, strict=True):
        if choice is not None and sequential and config.calibrated:
            seen = calibrate(model, cast(Any, data), _exactly([place.name]))[place.name]
            place = dataclasses.replace(place, moments=seen, memo=None)
        new = None if choice is None else config.replace(place, choice)
        if new is not None:
            model = replace_layer(model, place.name, new.module)
            step.layers[place.name] = new.spec
        rows.append(_row(place, new, type(config).__name__))
    registry: Registry = model.__dict__.get(_REGISTRY) or Registry()
    registry.steps.append(step)
    registry.report = CompressionReport(
        tuple(rows), _numbers(model), before[0], _bytes(model), before[1], time.perf_counter() - begin
    )
    model.__dict__[_REGISTRY] = registry
    return model


def _exactly(names: Sequence[str]) -> list[str]:
    """Targets that match these full names and nothing that ends like them; '' is the model itself."""
    return [f"(?:{re.escape(name)})" for name in names]


def _row(place: Place, new: Replacement | None, method: str) -> LayerReport:
    site, layer = place.site, place.layer
    dense = 0 if site.kind == "embedding" else site.in_features * site.out_features
    module = layer if new is None else new.module
    return LayerReport(
        layer=place.name,
        kind=site.kind,
        method="dense" if new is None else method,
        shape=(site.out_features, site.in_features),
        rank=None if new is None else new.rank,
        parameters=_numbers(module),
        parameters_before=_numbers(layer),
        bytes=_bytes(module),
        bytes_before=_bytes(layer),
        macs=dense if new is None else new.macs,
        macs_before=dense,
        error=0.0 if new is None else new.error,
    )


def compression_report(model: nn.Module) -> CompressionReport:
    """What the last call of `compress` did to this model, layer by layer.

    Raises:
        ValueError: where the model was never compressed, or was loaded and not compressed here.

    Example:
        >>> import torch
        >>> from corollary.compress import SVD, compress, compression_report
        >>> print(compression_report(compress(torch.nn.Linear(32, 32), SVD(rank=4))))
        1,056 parameters are 288, 4,224 bytes are 1,152; the compressed layers take 27.3% of their bytes
          (the model): SVD, rank 4, 4,224 bytes are 1,152, error ...
    """
    report = registry_of(model).report
    if report is None:
        raise ValueError("'model' was loaded, and the report of its compression stands in its manifest")
    return report
