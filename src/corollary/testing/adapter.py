"""Conformance checks of adapters: what `corollary.adapt` promises of every method, on every kind of layer that it takes.

A case's ``make()`` gives the configuration. Its tags:

=================  ==========================================================================================
``oracle``         required: ``oracle(weight, state, config)`` gives ΔM (out, in) as a numpy array in float64, from the frozen
                   matrix and the adapter's tensors by name (parameters and buffers, all float64); it shares no code with the
                   component. None for a method that is no change of a matrix
``parameters``     required: ``parameters(site)`` gives the number of trained numbers on a layer
``kinds``          kinds of layer to check; default all that the configuration supports
``identity``       whether the model starts as it was; default True. A number is the allowed relative change of the output
``mergeable``      whether the change is a matrix that can be merged; default True
``calibration``    ``calibration(model, inputs)`` gives what `adapt` needs; default none
``no_grad``        names of trained tensors that no gradient reaches at the perturbed point; default none
``perturb``        size of the noise that moves the adapter from its start; default 0.3
``dtypes``         dtypes of the model; default float32, float64 and bfloat16
``gradcheck``      whether gradients equal finite differences; default True
``compile``        backend of the ``torch.compile`` check; default ``"aot_eager"``; None where the method breaks the graph
=================  ==========================================================================================
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from corollary.adapt import (
    Adapter,
    AdapterConfig,
    adapt,
    adapter_state_dict,
    delete_adapter,
    disable_adapters,
    load_adapter,
    load_adapter_state_dict,
    merge_adapters,
    merge_and_unload,
    save_adapter,
    set_adapters,
    unmerge_adapters,
)
from corollary.testing.case import Case, Check, run_checks
from corollary.testing.layer import _distance, _refused


def _hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(10, 12), nn.Tanh(), Conv1D(8, 10))


_MODELS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module] | tuple[str, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8, bias=False)), nn.Linear),
    "transformers": (_hf_conv1d, ("0", "2")),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 6, 3, stride=2, padding=1, padding_mode="circular", groups=2)
        ),
        nn.Conv1d,
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, padding="same"),
            nn.Tanh(),
            nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2, padding_mode="reflect", groups=2),
        ),
        nn.Conv2d,
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5)), nn.Embedding),
}


def _inputs(kind: str, dtype: torch.dtype, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "embedding":
        return torch.randint(0, 11, (batch, 5), generator=generator)
    shape = {"linear": (batch, 2, 12), "transformers": (batch, 2, 12), "conv1d": (batch, 4, 9), "conv2d": (batch, 4, 9, 8)}[
        kind
    ]
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _kinds(case: Case) -> list[str]:
    kinds = case.tags.get("kinds", tuple(case.make().supports))
    found = [kind for kind in _MODELS if kind in kinds or (kind == "transformers" and "linear" in kinds)]
    assert found, f"no kind of layer to check: {kinds}"
    return found


def _base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return _MODELS[kind][0]().to(dtype).eval()


def _put_on(case: Case, model: nn.Module, kind: str, name: str = "default", config: AdapterConfig | None = None) -> nn.Module:
    make = case.tags.get("calibration")
    dtype = next(model.parameters()).dtype
    calibration = make(model, _inputs(kind, dtype)) if make else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return adapt(model, config or case.make(), _MODELS[kind][1], name=name, calibration=calibration)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _perturb(case: Case, model: nn.Module, seed: int = 11) -> nn.Module:
    """Move what trains away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    size = case.tags.get("perturb", 0.3)
    with torch.no_grad():
        for parameter in _trained(model).values():
            parameter.add_((size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(parameter))
    return model


def _adapted(case: Case, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return _perturb(case, _put_on(case, _base(kind, dtype), kind))


def _placed(model: nn.Module, name: str = "default") -> Iterator[tuple[str, nn.Module, Adapter]]:
    for site, layer in model.named_modules():
        held = layer._modules.get("adapters")
        if isinstance(held, nn.ModuleDict) and name in held:
            yield site, layer, cast(Adapter, held[name])


def identity_at_start(case: Case) -> None:
    """Before training the model computes what it computed without the adapter."""
    allowed = case.tags.get("identity", True)
    if allowed is False:
        return
    for kind in _kinds(case):
        model = _base(kind, torch.float64)
        x = _inputs(kind, torch.float64)
        before = model(x).detach()
        error = _distance(_put_on(case, model, kind)(x), before)
        assert error <= (1e-12 if allowed is True else allowed), (
            f"{kind}: the output changed by {error:.1e} before any training"
        )


def base_untouched(case: Case) -> None:
    """Keys and values of the base stay; the base is frozen; only the adapter's tensors come beside."""
    for kind in _kinds(case):
        model = _base(kind)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        adapted = _put_on(case, model, kind)
        assert adapted is model, "adapt() gave another model"
        after = model.state_dict()
        for key, tensor in before.items():
            assert key in after, f"{kind}: key '{key}' of the base is gone"
            assert torch.equal(after[key], tensor), f"{kind}: '{key}' of the base changed"
        for key in set(after) - set(before):
            assert ".adapters.default." in f".{key}", f"{kind}: a key '{key}' that is none of the adapter's"
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (".adapters.default." in f".{name}" and parameter.is_floating_point()), (
                f"{kind}: 'requires_grad' of '{name}' is {parameter.requires_grad}"
            )


def trainable_count(case: Case) -> None:
    """As many numbers train as the method says."""
    for kind in _kinds(case):
        model = _put_on(case, _base(kind), kind)
        for site, _, adapter in _placed(model):
            found = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
            wanted = case.tags["parameters"](adapter.site)
            assert found == wanted, f"{kind}: {found} numbers train at '{site}', promised {wanted}"


def oracle(case: Case) -> None:
    """The change of the matrix equals the independent computation, in float64."""
    if case.tags["oracle"] is None:
        return
    config = case.make()
    for kind in _kinds(case):
        model = _adapted(case, kind, torch.float64)
        for site, layer, adapter in _placed(model):
            state = {name: t.detach().double().numpy() for name, t in (*adapter.named_parameters(), *adapter.named_buffers())}
            matrix = adapter.site.matrix(cast(Tensor, layer.weight)).detach().numpy()
            wanted = np.asarray(case.tags["oracle"](matrix, state, config))
            found = adapter.delta().detach().numpy()
            assert found.shape == wanted.shape, f"{kind}: delta() is {found.shape}, the oracle's is {wanted.shape}"
            error = float(np.abs(found - wanted).max() / max(1e-12, np.abs(wanted).max()))
            assert np.abs(wanted).max() > 0, f"{kind}: the oracle's change is zero at a perturbed point"
            assert error < 1e-9, f"{kind}: delta() at '{site}' differs from the oracle by {error:.1e}"


def forward_equals_delta(case: Case) -> None:
    """The factored forward gives what the layer gives with W + ΔW in the place of W."""
    if not case.tags.get("mergeable", True):
        return
    for kind in _kinds(case):
        model = _adapted(case, kind, torch.float64)
        x = _inputs(kind, torch.float64)
        out = model(x)
        plain = copy.deepcopy(model)
        for site, layer, adapter in list(_placed(model)):
            twin = cast(Any, plain.get_submodule(site))
            with torch.no_grad():
                twin.weight.copy_(cast(Tensor, layer.weight) + adapter.site.weight(adapter.delta()))
        with disable_adapters(plain):
            error = _distance(out, plain(x))
        assert error < 1e-10, f"{kind}: forward differs from W + delta() by {error:.1e}"


def merge_equals_unmerged(case: Case) -> None:
    """Merging keeps the output, unmerging restores weight and output bit for bit, and a merged adapter does not act twice."""
    for kind in _kinds(case):
        model = _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        out = model(x).detach()
        weights = {site: cast(Tensor, layer.weight).clone() for site, layer, _ in _placed(model)}
        if not case.tags.get("mergeable", True):
            try:
                merge_adapters(model)
            except ValueError:
                assert torch.equal(model(x), out), f"{kind}: a refused merge changed the output"
                continue
            raise AssertionError("merging was accepted, though the method's tag says that it cannot")
        merge_adapters(model)
        error = _distance(model(x), out)
        assert error < 2e-5, f"{kind}: merging changes the output by {error:.1e}"
        changed = any(not torch.equal(cast(Tensor, model.get_submodule(s).weight), w) for s, w in weights.items())
        assert changed, f"{kind}: merging changed no weight"
        unmerge_adapters(model)
        for site, weight in weights.items():
            assert torch.equal(cast(Tensor, model.get_submodule(site).weight), weight), (
                f"{kind}: unmerging lost bits of '{site}'"
            )
        assert torch.equal(model(x), out), f"{kind}: after unmerging the output is another"


def unload(case: Case) -> None:
    """``merge_and_unload`` leaves a plain model with the base's keys and the adapted output."""
    if not case.tags.get("mergeable", True):
        return
    for kind in _kinds(case):
        keys = list(_base(kind).state_dict())
        model = _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        out = model(x).detach()
        merge_and_unload(model)
        assert list(model.state_dict()) == keys, f"{kind}: keys are {list(model.state_dict())}"
        assert not any(m._forward_hooks for m in model.modules()), f"{kind}: a hook is left"
        assert _distance(model(x), out) < 2e-5, f"{kind}: the unloaded model gives something else"


def gradients(case: Case) -> None:
    """Gradients reach all that trains and nothing else, and equal finite differences in float64."""
    exempt = set(case.tags.get("no_grad", ()))
    for kind in _kinds(case):
        model = _adapted(case, kind, torch.float64)
        x = _inputs(kind, torch.float64)
        generator = torch.Generator().manual_seed(2)
        out = model(x)
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, f"{kind}: the frozen '{name}' got a gradient"
            elif name.rpartition(".")[2] not in exempt:
                assert parameter.grad is not None, f"{kind}: no gradient reaches '{name}'"
                assert parameter.grad.isfinite().all(), f"{kind}: the gradient of '{name}' is not finite"
                assert parameter.grad.any(), f"{kind}: the gradient of '{name}' is zero"
        if not case.tags.get("gradcheck", True):
            continue
        given = {n: p for n, p in _trained(model).items() if n.rpartition(".")[2] not in exempt}

        def call(*tensors: Tensor, model: nn.Module = model, x: Tensor = x, names: tuple[str, ...] = tuple(given)) -> Tensor:
            called: Tensor = torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))
            return called

        try:
            torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)
        except GradcheckError as error:
            raise AssertionError(f"{kind}: {str(error).strip().splitlines()[0]}") from error


def save_and_load(case: Case) -> None:
    """Through a file and onto a fresh base the adapter gives the same bits, with its configuration inside the file."""
    for kind in _kinds(case):
        model = _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = save_adapter(model, Path(folder) / "adapter.safetensors")
            other = load_adapter(_base(kind), path, name="loaded")
            assert [p.name for p in Path(folder).iterdir()] == [path.name], "files are left beside the saved one"
        assert other.__dict__["_corollary_adapters"].entries["loaded"].config == case.make(), (
            f"{kind}: another configuration came back"
        )
        assert torch.equal(other(x), model(x)), f"{kind}: the loaded adapter gives something else"


def whole_state_dict(case: Case) -> None:
    """The whole model's ``state_dict`` loads strictly into another model that is adapted alike, and gives the same bits."""
    for kind in _kinds(case):
        model = _adapted(case, kind)
        other = _perturb(case, _put_on(case, _base(kind), kind), seed=12)
        other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
        x = _inputs(kind, torch.float32)
        assert torch.equal(other(x), model(x)), f"{kind}: the loaded model gives something else"


def wrong_state(case: Case) -> None:
    """A tensor missing, unexpected or of another shape is refused by name, and nothing is changed."""
    kind = _kinds(case)[0]
    model = _adapted(case, kind)
    x = _inputs(kind, torch.float32)
    out = model(x).detach()
    state = {key: tensor.clone() + 1 for key, tensor in adapter_state_dict(model).items()}
    first = next(iter(state))
    for broken in (
        {key: tensor for key, tensor in state.items() if key != first},
        state | {"stranger": torch.zeros(2)},
        state | {first: torch.zeros(*state[first].shape, 2)},
    ):
        _refused(lambda broken=broken: load_adapter_state_dict(model, broken), "a state that does not fit", (first, "stranger"))  # type: ignore[misc]
        assert torch.equal(model(x), out), "a refused state changed the adapter"


def disable(case: Case) -> None:
    """Within ``disable_adapters`` the model is the base model to the bit; after it the adapter acts again, also after an error."""
    for kind in _kinds(case):
        base, model = _base(kind), _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        out = model(x)
        assert not torch.equal(out, base(x)), f"{kind}: a perturbed adapter changes nothing"
        try:
            with disable_adapters(model):
                assert torch.equal(model(x), base(x)), f"{kind}: disabled, the model is not the base model"
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert torch.equal(model(x), out), f"{kind}: after the context the adapter does not act"


def several(case: Case) -> None:
    """Two named adapters switch and, together, add up; only those that act train."""
    for kind in _kinds(case):
        x = _inputs(kind, torch.float64)
        model = _perturb(case, _put_on(case, _base(kind, torch.float64), kind, "first"))
        first = model(x).detach()
        _perturb(case, _put_on(case, model, kind, "second"), seed=13)
        second = model(x).detach()
        assert not torch.equal(first, second), f"{kind}: two adapters give the same"
        set_adapters(model, "first")
        assert torch.equal(model(x), first), f"{kind}: switching back gives something else"
        assert all("second" not in name for name in _trained(model)), f"{kind}: a resting adapter trains"
        set_adapters(model, ("first", "second"))
        both = model(x).detach()
        if case.tags.get("mergeable", True):
            error = _distance(merge_adapters(model)(x), both)
            assert error < 1e-10, f"{kind}: two adapters at once differ from their merged sum by {error:.1e}"
            unmerge_adapters(model)
        set_adapters(model, ())
        assert torch.equal(model(x), _base(kind, torch.float64)(x)), f"{kind}: with no adapter chosen the model is not the base"


def delete(case: Case) -> None:
    """Deleting the last adapter leaves no trace: keys, hooks, ``requires_grad``, output."""
    for kind in _kinds(case):
        base, model = _base(kind), _base(kind)
        frozen = next(iter(model.parameters()))
        frozen.requires_grad_(False)
        required = {name: p.requires_grad for name, p in model.named_parameters()}
        delete_adapter(_perturb(case, _put_on(case, model, kind)), "default")
        assert list(model.state_dict()) == list(base.state_dict()), f"{kind}: keys are left"
        assert {name: p.requires_grad for name, p in model.named_parameters()} == required, f"{kind}: requires_grad is another"
        assert not any(m._forward_hooks or hasattr(m, "adapters") for m in model.modules()), f"{kind}: a hook or module is left"
        x = _inputs(kind, torch.float32)
        assert torch.equal(model(x), base(x)), f"{kind}: the output is another"
        assert not [key for key in model.__dict__ if "adapter" in key], f"{kind}: an attribute is left on the model"


def training(case: Case) -> None:
    """Optimizer steps move the adapter and leave the base as it was, to the bit."""
    for kind in _kinds(case):
        model = _adapted(case, kind).train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x = _inputs(kind, torch.float32)
        optimizer = torch.optim.AdamW(_trained(model).values(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert all(".adapters." in f".{name}" for name in moved), f"{kind}: the base moved"
        assert moved, f"{kind}: nothing moved"


def dtype(case: Case) -> None:
    """The adapter takes the model's dtype, its output has it, and autocast works."""
    for kind in _kinds(case):
        for kind_of_number in case.tags.get("dtypes", (torch.float32, torch.float64, torch.bfloat16)):
            model = _adapted(case, kind, kind_of_number)
            out = model(_inputs(kind, kind_of_number))
            assert out.dtype == kind_of_number, f"{kind}: a {kind_of_number} model gives {out.dtype}"
            for name, parameter in _trained(model).items():
                assert parameter.dtype == kind_of_number, f"{kind}: '{name}' is {parameter.dtype} on a {kind_of_number} model"
            out.float().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), (
                f"{kind}: a gradient is not finite"
            )
        model = _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        wanted = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = _distance(model(x).float(), wanted)
        assert error < 0.1, f"{kind}: under autocast the output differs by {error:.1e}"


def moved(case: Case) -> None:
    """``.to(dtype)`` after adapting takes the adapter along."""
    for kind in _kinds(case):
        model = _adapted(case, kind).to(torch.float64)
        assert model(_inputs(kind, torch.float64)).dtype == torch.float64, f"{kind}: the moved model gives another dtype"


def compiled(case: Case) -> None:
    """``torch.compile`` takes the adapted model as one graph and gives the same output and gradients."""
    backend = case.tags.get("compile", "aot_eager")
    if backend is None:
        return
    for kind in _kinds(case):
        model = _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        torch.compiler.reset()
        fast = torch.compile(model, backend=backend, fullgraph=True)
        results = []
        for call in (model, fast):
            try:
                out = call(x)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise AssertionError(f"{kind}: torch.compile failed: {str(error).strip().splitlines()[0]}") from error
            grads = torch.autograd.grad(out.square().sum(), list(_trained(model).values()), allow_unused=True)
            results.append([out.detach(), *(g for g in grads if g is not None)])
        for ours, true in zip(results[1], results[0], strict=True):
            assert _distance(ours, true) < 1e-4, f"{kind}: compiled and eager differ by {_distance(ours, true):.1e}"


def copies(case: Case) -> None:
    """A deep copy has adapters of its own."""
    for kind in _kinds(case):
        model = _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        out = model(x).detach()
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), out), f"{kind}: the copy gives something else"
        _perturb(case, twin, seed=14)
        assert torch.equal(model(x), out), f"{kind}: changing the copy changed the model"
        delete_adapter(twin, "default")
        assert torch.equal(twin(x), _base(kind)(x)), f"{kind}: the copy's adapter does not come off"
        assert torch.equal(model(x), out), f"{kind}: deleting the copy's adapter changed the model"


def empty_batch(case: Case) -> None:
    """No samples give no outputs."""
    for kind in _kinds(case):
        if kind == "conv2d" or kind == "conv1d":
            continue  # torch's own padding modes refuse empty batches
        model = _adapted(case, kind)
        x = _inputs(kind, torch.float32)
        assert model(x[:0]).shape == model(x)[:0].shape, f"{kind}: an empty batch gives another shape"


def reproducible(case: Case) -> None:
    """The same seed builds the same adapter."""
    for kind in _kinds(case):
        states = [adapter_state_dict(_put_on(case, _base(kind), kind)) for _ in range(2)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), f"{kind}: two builds of one seed differ"


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        identity_at_start, base_untouched, trainable_count, oracle, forward_equals_delta, merge_equals_unmerged, unload, gradients,
        save_and_load, whole_state_dict, wrong_state, disable, several, delete, training, dtype, moved, compiled, copies, empty_batch,
        reproducible,
    )
}  # fmt: skip


def check_adapter(make: Callable[[], AdapterConfig], **tags: Any) -> None:
    """Run every check of adapters on a configuration; raises ``AssertionError`` naming the first that fails.

    Args:
        make: gives the configuration, such as ``lambda: LoRA(rank=2)``. The checks' matrices are about 10 by 10.
        tags: see the module's docstring; ``oracle`` and ``parameters`` are required.

    Example:
        >>> from corollary.adapt import LoRA
        >>> from corollary.testing import check_adapter
        >>> check_adapter(
        ...     lambda: LoRA(rank=2),
        ...     kinds=("linear",),
        ...     oracle=lambda weight, state, config: state["lora_B"] @ state["lora_A"],
        ...     parameters=lambda site: 2 * (site.in_features + site.out_features),
        ... )
    """
    run_checks("adapter", Case(make, tags))
