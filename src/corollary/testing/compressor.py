"""Conformance checks of compressors: what `corollary.compress` promises of every method, on every kind of layer that it takes.

A case's ``make()`` gives the configuration. Its tags:

===============  ============================================================================================
``oracle``       required: ``oracle(weight, bias, x, settings, rank)`` gives the outputs (rows, out) of one linear layer after
                 compression, as numpy in float64, from its matrix (out, in), its bias or None, its calibration inputs (rows, in)
                 and the rank that the report names; it shares no code with the component
``kinds``        kinds of layer to check: linear, transformers, conv1d, conv2d, embedding; default the first four
``smaller``      whether the compressed layers take fewer bytes; default True
``dtypes``       dtypes of the model; default float32, float64 and bfloat16
``trains``       whether gradients reach the compressed layers' parameters; default True where they have some
``compile``      backend of the ``torch.compile`` check; default ``"aot_eager"``; None where the method breaks the graph
===============  ============================================================================================
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corollary.compress import Calibration, CompressConfig, calibrate, compress, compression_report, load, save
from corollary.testing.case import Case, Check, run_checks
from corollary.testing.layer import _distance, _refused


def _hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(16, 24), nn.Tanh(), Conv1D(12, 16))


_MODELS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module] | tuple[str, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12, bias=False)), nn.Linear),
    "transformers": (_hf_conv1d, ("0", "2")),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 16, 3, padding="same"), nn.Tanh(), nn.Conv1d(16, 12, 3, stride=2, padding=1, padding_mode="circular")
        ),
        nn.Conv1d,
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(16, 12, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"),
        ),
        nn.Conv2d,
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 12)), nn.Embedding),
}


def _inputs(kind: str, dtype: torch.dtype, batch: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "embedding":
        return torch.randint(0, 40, (batch, 5), generator=generator)
    shape = {"conv1d": (batch, 6, 9), "conv2d": (batch, 4, 9, 8)}.get(kind, (batch, 2, 24))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    side = 1 if kind.startswith("conv") else -1
    sizes = torch.logspace(0, -1, shape[side], dtype=torch.float64)  # some inputs are larger than others, as activations are
    return (x * sizes.view([-1 if i == side % len(shape) else 1 for i in range(len(shape))]) + 0.3).to(dtype)


def _kinds(case: Case) -> tuple[str, ...]:
    kinds: tuple[str, ...] = tuple(case.tags.get("kinds", ("linear", "transformers", "conv1d", "conv2d")))
    assert kinds, "no kind of layer to check"
    return kinds


def _base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return _MODELS[kind][0]().to(dtype).eval()


def _seen(case: Case, model: nn.Module, kind: str) -> Calibration | None:
    dtype = next(model.parameters()).dtype
    return calibrate(model, [_inputs(kind, dtype)], _MODELS[kind][1]) if case.make().calibrated else None


def _small(case: Case, kind: str, dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> nn.Module:
    model = _base(kind, dtype) if model is None else model
    return compress(model, case.make(), _MODELS[kind][1], calibration=_seen(case, model, kind))


def _changed(small: nn.Module) -> list[str]:
    return [row.layer for row in compression_report(small).layers if row.method != "dense"]


def oracle(case: Case) -> None:
    """A linear layer's outputs after compression are those of an independent computation, in float64."""
    for bias in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            layer = nn.Linear(24, 16, bias=bias).double()
        rows = _inputs("linear", torch.float64).flatten(0, 1)
        config = case.make()
        small = compress(layer, config, calibration=[rows] if config.calibrated else None)
        row = compression_report(small).layers[0]
        assert row.method != "dense", "the configuration leaves a linear layer of 16 by 24 dense, so nothing can be checked"
        own = None if layer.bias is None else layer.bias.detach().numpy()
        true = torch.from_numpy(case.tags["oracle"](layer.weight.detach().numpy(), own, rows.numpy(), config, row.rank))
        error = _distance(small(rows), true)
        assert error < 1e-8, f"{'with' if bias else 'without'} a bias: outputs differ from the oracle's by {error:.1e}"


def works(case: Case) -> None:
    """On every kind of layer something is compressed, the output keeps its shape and is finite."""
    for kind in _kinds(case):
        small, x = _small(case, kind), _inputs(kind, torch.float32)
        assert _changed(small), f"{kind}: nothing was compressed"
        out = small(x)
        assert out.shape == _base(kind)(x).shape, f"{kind}: the output's shape is {tuple(out.shape)}"
        assert out.isfinite().all(), f"{kind}: the output is not finite"


def input_untouched(case: Case) -> None:
    """The given model keeps its modules, tensors, modes and hooks; ``inplace`` changes it and gives the same."""
    for kind in _kinds(case):
        model = _base(kind)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modules = [type(m) for m in model.modules()]
        small = _small(case, kind, model=model)
        assert [type(m) for m in model.modules()] == modules, f"{kind}: a module of the given model was replaced"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), f"{kind}: a hook is left"
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()), (
            f"{kind}: a tensor changed"
        )
        assert not model.training, f"{kind}: the model's mode changed"
        shared = {t.data_ptr() for t in model.parameters()} & {t.data_ptr() for t in small.parameters()}
        assert not shared, f"{kind}: the compressed model shares memory with the given one"
        x = _inputs(kind, torch.float32)
        inside = compress(model, case.make(), _MODELS[kind][1], calibration=_seen(case, model, kind), inplace=True)
        assert inside is model, f"{kind}: 'inplace' gives another model"
        assert torch.equal(inside(x), small(x)), f"{kind}: 'inplace' gives another result"


def report(case: Case) -> None:
    """The report's numbers are the model's: parameters, bytes, errors; it survives JSON."""
    for kind in _kinds(case):
        base, small = _base(kind), _small(case, kind)
        found = compression_report(small)
        held = sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
        assert found.bytes == held, f"{kind}: the report says {found.bytes} bytes, the model holds {held}"
        before = sum(t.numel() * t.element_size() for t in base.parameters())
        assert found.bytes_before == before, f"{kind}: the report says {found.bytes_before} bytes before, there were {before}"
        assert found.parameters_before == sum(p.numel() for p in base.parameters()), f"{kind}: parameters before are wrong"
        for row in found.layers:
            layer = small.get_submodule(row.layer)
            own = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
            assert row.bytes == own, f"{kind}: '{row.layer}' has {own} bytes, the report says {row.bytes}"
            assert row.error is None or (math.isfinite(row.error) and row.error >= 0), (
                f"{kind}: '{row.layer}' errs by {row.error}"
            )
            if row.method == "dense":
                assert row.bytes == row.bytes_before, f"{kind}: '{row.layer}' is said to be dense, and its bytes changed"
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["bytes"] == held, f"{kind}: to_dict() loses numbers"
        if case.tags.get("smaller", True):
            assert found.ratio < 1, f"{kind}: the compressed layers take {found.ratio:.2f} of their bytes"


def error_is_measured(case: Case) -> None:
    """Where a method calibrates, the reported error is what its layers err by on the calibration data."""
    if not case.make().calibrated:
        return
    layer, x = _base("linear", torch.float64), _inputs("linear", torch.float64)
    small = compress(layer, case.make(), "0", calibration=[x])
    row = compression_report(small).layers[0]
    assert row.error is not None, "a calibrated method reports no error"
    with torch.no_grad():
        gap, true = small[0](x) - layer[0](x), layer[0](x)  # type: ignore[index]
    # A bias is no part of what is compressed; a method that takes the mean off measures around it.
    plain = true if layer[0].bias is None else true - layer[0].bias  # type: ignore[index]
    sizes = [plain.square().sum(), (true - true.mean((0, 1))).square().sum()]
    measured = [(gap.square().sum() / size).item() for size in sizes]
    assert any(abs(row.error - m) < 1e-4 * max(m, 1e-8) + 1e-9 for m in measured), (
        f"the report says {row.error:.3e}, the outputs differ by {measured[0]:.3e} of their size and {measured[1]:.3e} of their variance"
    )


def save_and_load(case: Case) -> None:
    """A saved model comes back to the bit, into a fresh model of the original's classes; the manifest names method and layers."""
    for kind in _kinds(case):
        small, x = _small(case, kind), _inputs(kind, torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            save(small, folder)
            fresh = _MODELS[kind][0]().eval()
            again = load(folder, fresh)
            manifest = json.loads((Path(folder) / "compression.json").read_text(encoding="utf-8"))
        assert torch.equal(again(x), small(x)), f"{kind}: the loaded model gives something else"
        assert list(again.state_dict()) == list(small.state_dict()), f"{kind}: the loaded model has other keys"
        assert manifest["steps"][0]["method"] == type(case.make()).__name__, f"{kind}: the manifest names another method"
        assert list(manifest["steps"][0]["layers"]) == _changed(small), f"{kind}: the manifest names other layers"


def broken_files(case: Case) -> None:
    """A missing, truncated or foreign folder, and a model that does not fit, end in one clear line."""
    kind = _kinds(case)[0]
    small = _small(case, kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        _refused(lambda: load(path, _base(kind)), "a folder without a manifest", ("compression.json",))
        save(small, path)
        _refused(lambda: load(path, nn.Sequential(nn.ReLU())), "a model without the layers", (f"'{_changed(small)[0]}'",))
        manifest = path / "compression.json"
        text = manifest.read_text(encoding="utf-8")
        manifest.write_text(text[: len(text) // 2], encoding="utf-8")
        _refused(lambda: load(path, _base(kind)), "a truncated manifest", ("JSON",))
        manifest.write_text("{}", encoding="utf-8")
        _refused(lambda: load(path, _base(kind)), "a foreign manifest", ("no manifest",))


def deterministic(case: Case) -> None:
    """The same model and data give the same bits, and no global random state moves."""
    for kind in _kinds(case):
        model = _base(kind)
        seen = _seen(case, model, kind)
        before = torch.get_rng_state()
        first = compress(model, case.make(), _MODELS[kind][1], calibration=seen)
        assert torch.equal(torch.get_rng_state(), before), f"{kind}: the global random state moved"
        torch.rand(3)
        second = compress(model, case.make(), _MODELS[kind][1], calibration=seen)
        for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
            assert torch.equal(a, b), f"{kind}: '{name}' differs between two runs"


def streams(case: Case) -> None:
    """Batches of any size give what all data at once give; a generator is enough."""
    if not case.make().calibrated:
        return
    for kind in _kinds(case):
        model, x = _base(kind, torch.float64), _inputs(kind, torch.float64)
        whole = compress(model, case.make(), _MODELS[kind][1], calibration=[x])
        parts = compress(model, case.make(), _MODELS[kind][1], calibration=(part for part in torch.split(x, [1, 20, 3, 40])))
        error = _distance(parts(x), whole(x))
        assert error < 1e-6, f"{kind}: data in parts give outputs that differ by {error:.1e}"


def needs_calibration(case: Case) -> None:
    """A method that looks at activations refuses to work without, or with those of other layers."""
    if not case.make().calibrated:
        return
    kind = _kinds(case)[0]
    _refused(lambda: compress(_base(kind), case.make(), _MODELS[kind][1]), "no calibration", ("calibration",))
    other = calibrate(nn.Linear(3, 2), [torch.ones(4, 3)])
    _refused(
        lambda: compress(_base(kind), case.make(), _MODELS[kind][1], calibration=other), "other layers' calibration", ("'0'",)
    )


def bad_input(case: Case) -> None:
    """A model that is none, a target that is none, and integers end in a ValueError or TypeError that says what came."""
    kind = _kinds(case)[0]
    _refused(lambda: compress(case.make(), case.make()), "a configuration for a model", (type(case.make()).__name__,))
    _refused(lambda: compress(_base(kind), "svd"), "a string for a configuration", ("svd",))  # type: ignore[arg-type]
    _refused(lambda: compress(_base(kind), case.make(), "nowhere"), "a target that is not there", ("nowhere",))
    _refused(lambda: compress(nn.Sequential(nn.ReLU()), case.make(), "0"), "a target that cannot be compressed", ("'0'",))


def dtype(case: Case) -> None:
    """The compressed layers keep the model's dtype, and so does the output; ``.to(dtype)`` takes them along."""
    for kind in _kinds(case):
        true = None
        for number in (torch.float64, *case.tags.get("dtypes", (torch.float32, torch.float64, torch.bfloat16))):
            small = _small(case, kind, number)
            for name, tensor in small.state_dict().items():
                assert not tensor.is_floating_point() or tensor.dtype == number, (
                    f"{kind}: '{name}' is {tensor.dtype}, not {number}"
                )
            out = small(_inputs(kind, number))
            assert out.dtype == number, f"{kind}: a {number} model gives {out.dtype}"
            assert out.isfinite().all(), f"{kind}: {number} gives NaN or infinity"
            true = out if true is None else true
            moved = small.to(torch.float64)(_inputs(kind, torch.float64))
            assert moved.dtype == torch.float64, f"{kind}: the moved model gives {moved.dtype}"
            error = _distance(moved, true)
            assert error < (0.5 if number == torch.bfloat16 else 0.1), f"{kind}: {number} differs from float64 by {error:.1e}"


def trains(case: Case) -> None:
    """Gradients reach the parameters of the compressed layers, and a deep copy has parameters of its own."""
    for kind in _kinds(case):
        small, x = _small(case, kind), _inputs(kind, torch.float32)
        twin = copy.deepcopy(small)
        small(x).square().sum().backward()
        for name in _changed(small):
            for key, parameter in small.get_submodule(name).named_parameters():
                if case.tags.get("trains", True):
                    assert parameter.grad is not None, f"{kind}: no gradient reaches '{name}.{key}'"
                    assert parameter.grad.isfinite().all(), f"{kind}: the gradient of '{name}.{key}' is not finite"
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(1.0)
        assert not torch.equal(twin(x), small(x)), f"{kind}: the copy moves with the original"


def compiled(case: Case) -> None:
    """``torch.compile`` takes the compressed model as one graph and gives the same output."""
    backend = case.tags.get("compile", "aot_eager")
    if backend is None:
        return
    for kind in _kinds(case):
        small, x = _small(case, kind), _inputs(kind, torch.float32)
        torch.compiler.reset()
        try:
            out = torch.compile(small, backend=backend, fullgraph=True)(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise AssertionError(f"{kind}: torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        assert _distance(out, small(x)) < 1e-4, f"{kind}: compiled and eager differ by {_distance(out, small(x)):.1e}"


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        oracle, works, input_untouched, report, error_is_measured, save_and_load, broken_files, deterministic, streams,
        needs_calibration, bad_input, dtype, trains, compiled,
    )
}  # fmt: skip


def check_compressor(make: Callable[[], CompressConfig], **tags: Any) -> None:
    """Run every check of compressors on a configuration; raises ``AssertionError`` naming the first that fails.

    Args:
        make: gives the configuration, such as ``lambda: SVD(ratio=0.5)``. The checks' matrices are about 16 by 24.
        tags: see the module's docstring; ``oracle`` is required.

    Example:
        >>> import numpy as np
        >>> from corollary.compress import SVD
        >>> from corollary.testing import check_compressor
        >>> def oracle(weight, bias, x, settings, rank):
        ...     u, s, vh = np.linalg.svd(weight)
        ...     return x @ (u[:, :rank] * s[:rank] @ vh[:rank]).T + (0 if bias is None else bias)
        >>> check_compressor(lambda: SVD(ratio=0.6), oracle=oracle, kinds=("linear",), compile=None)
    """
    if "oracle" not in tags:
        raise ValueError("check_compressor needs the tag 'oracle': what a linear layer gives out after compression")
    run_checks("compressor", Case(make, tags))
