"""Conformance checks of layers: any ``nn.Module`` whose forward takes tensors and gives one tensor.

A case's ``make()`` builds the layer. Its tags:

==================  =========================================================================================
``inputs``          required: the trailing shape of each input, such as ``((9,), (9,))``
``output``          required: the trailing shape of the output
``leading``         leading shapes to try; default ``((4,), (2, 3), ())``; the first one serves all other checks
``draw``            ``draw(shape, generator, dtype)`` for one input; default: standard normal
``dtypes``          floating dtypes it promises; default float32 and float64 (add bfloat16 where it holds)
``precision``       dtype to allowed error relative to float64; default 1e-4, 1e-10 and 5e-2 (bfloat16)
``exact_tables``    whether constant tables survive ``.to(float32).to(float64)`` unrounded; default False
``independent``     whether a sample's output depends on that sample alone; default True
``stochastic``      whether training mode draws random numbers (dropout); default False
``train_differs``   whether training mode computes something else than evaluation; default ``stochastic``
``differentiable``  indices of the inputs that gradients reach; default all
``no_grad``         names of parameters that the output does not depend on; default none
``free``            pairs (input, trailing axis) whose size the layer does not fix; default none
``compile``         backend of the ``torch.compile`` check; default ``"aot_eager"``
==================  =========================================================================================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from corollary.testing.case import Case, Check, run_checks

_PRECISION = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def _make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer: nn.Module = case.make()
    return layer.to(dtype).eval()


def _leading(case: Case) -> Sequence[tuple[int, ...]]:
    shapes: Sequence[tuple[int, ...]] = case.tags.get("leading", ((4,), (2, 3), ()))
    return shapes


def _draw(
    case: Case, leading: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[Tensor]:
    leading = _leading(case)[0] if leading is None else leading
    generator = torch.Generator().manual_seed(1)
    draw = case.tags.get("draw", lambda shape, generator, dtype: torch.randn(shape, generator=generator, dtype=dtype))
    return [draw((*leading, *trailing), generator, dtype) for trailing in case.tags["inputs"]]


def _differentiable(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    chosen = case.tags.get("differentiable", range(len(inputs)))
    return [inputs[i].requires_grad_() for i in chosen]


def _distance(ours: Tensor, true: Tensor) -> float:
    """Largest difference relative to the largest entry of ``true``."""
    if not true.numel():
        return 0.0
    ours, true = ours.detach().double(), true.detach().double()
    return float((ours - true).abs().max() / true.abs().max().clamp_min(1e-30))


def _refused(call: Callable[[], Any], what: str, mention: Sequence[str] = ()) -> None:
    """The call must end in a ValueError or TypeError whose text holds one of ``mention``."""
    try:
        call()
    except (ValueError, TypeError) as error:
        caught: Exception = error
    except (RuntimeError, IndexError, AssertionError) as error:
        raise AssertionError(f"{what}: ended in {error!r}; it must be a ValueError or TypeError that says what came") from error
    else:
        raise AssertionError(f"{what}: was accepted")
    assert not mention or any(m in str(caught) for m in mention), f"{what}: the error does not say what came: {caught!r}"


def shape(case: Case) -> None:
    """The output has the promised shape for every leading shape."""
    layer = _make(case)
    for leading in _leading(case):
        out = layer(*_draw(case, leading))
        assert isinstance(out, Tensor), f"the output is {type(out).__name__}, not a tensor"
        wanted = (*leading, *case.tags["output"])
        assert tuple(out.shape) == wanted, f"leading shape {leading}: output is {tuple(out.shape)}, promised {wanted}"
        assert out.isfinite().all(), f"leading shape {leading}: output is not finite for ordinary inputs"


def leading_dims(case: Case) -> None:
    """Several leading dimensions give what the same samples give in one, and a sample alone gives what it gives in a batch."""
    if not case.tags.get("independent", True):
        return
    layer = _make(case, torch.float64)
    for leading in _leading(case):
        inputs = _draw(case, leading, torch.float64)
        out = layer(*inputs)
        if len(leading) > 1:
            start = len(leading)
            flat = layer(*(x.reshape(-1, *x.shape[start:]) for x in inputs)).reshape(out.shape)
            assert _distance(out, flat) < 1e-9, f"leading shape {leading} differs from the flattened batch"
        if leading:
            half = layer(*(x[: (leading[0] + 1) // 2] for x in inputs))
            assert _distance(half, out[: (leading[0] + 1) // 2]) < 1e-9, "a sample's output depends on the rest of its batch"


def empty_batch(case: Case) -> None:
    """No samples give no outputs, and a backward pass through them gives zero gradients."""
    layer = _make(case)
    inputs = _draw(case, (0, *_leading(case)[0][1:]))
    leaves = _differentiable(case, inputs)
    out = layer(*inputs)
    wanted = (0, *_leading(case)[0][1:], *case.tags["output"])
    assert tuple(out.shape) == wanted, f"empty batch: output is {tuple(out.shape)}, expected {wanted}"
    if leaves:
        assert out.requires_grad, "empty batch: the output has no gradient, though inputs or parameters ask for one"
        out.sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is None or not parameter.grad.any(), f"empty batch: parameter '{name}' got a gradient"


def dtype(case: Case) -> None:
    """In each promised dtype the output has that dtype and is near the float64 result; ``.to`` loses no table."""
    true = None
    for kind in (torch.float64, *case.tags.get("dtypes", (torch.float32, torch.float64))):
        # Inputs and parameters are rounded to the coarse dtype first, so that only the layer's own rounding is measured.
        layer = _make(case).to(kind)
        inputs = [x.to(kind) for x in _draw(case)]
        out = layer(*inputs)
        assert out.dtype == kind, f"{kind} inputs gave {out.dtype}"
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            assert not tensor.is_floating_point() or tensor.dtype == kind, f"'{name}' stayed {tensor.dtype} after .to({kind})"
        back = copy.deepcopy(layer).to(torch.float64)
        true = back(*(x.double() for x in inputs))
        allowed = {**_PRECISION, **case.tags.get("precision", {})}[kind]
        error = _distance(out, true)
        assert error <= allowed, f"{kind}: relative error {error:.2e} against float64, allowed {allowed:.0e}"
    fresh, moved = _make(case, torch.float64), _make(case).to(torch.float32).to(torch.float64)
    with torch.no_grad():
        for parameter, rounded in zip(fresh.parameters(), moved.parameters(), strict=True):
            parameter.copy_(rounded)  # parameters are rounded by right; constant tables are what is looked at
    inputs = _draw(case, dtype=torch.float64)
    error = _distance(moved(*inputs), fresh(*inputs))
    assert error < (1e-12 if case.tags.get("exact_tables", False) else 1e-5), (
        f"float32 and back to float64 changes the result by {error:.1e}"
    )


def determinism(case: Case) -> None:
    """The same input gives the same bits; in training mode too, given the same seed."""
    layer = _make(case)
    for mode in (False, True):
        layer.train(mode)
        runs = []
        for _ in range(2):
            state = copy.deepcopy(layer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                runs.append(state(*_draw(case)))
                if mode and not case.tags.get("stochastic", False):
                    torch.manual_seed(6)
                    assert torch.equal(copy.deepcopy(layer)(*_draw(case)), runs[-1]), "training mode draws random numbers"
        assert torch.equal(*runs), f"two runs {'in training mode ' if mode else ''}differ"


def train_eval(case: Case) -> None:
    """``train()`` changes the result only where the layer says so, and ``eval()`` restores it."""
    layer = _make(case)
    inputs = _draw(case)
    before = layer(*inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        trained = copy.deepcopy(layer).train()(*inputs)
    differs = not torch.equal(before, trained)
    promised = case.tags.get("train_differs", case.tags.get("stochastic", False))
    assert differs == promised, (
        f"training mode {'changes' if differs else 'does not change'} the output; the tag says otherwise"
    )
    assert torch.equal(layer.train().eval()(*inputs), before), "eval() after train() gives something else"


def gradients(case: Case) -> None:
    """Gradients are finite and reach every differentiable input and every trainable parameter."""
    layer = _make(case)
    inputs = _draw(case)
    leaves = _differentiable(case, inputs)
    out = layer(*inputs)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    exempt = set(case.tags.get("no_grad", ()))
    named = [(f"input {i}", leaf) for i, leaf in enumerate(leaves)]
    named += [(f"parameter '{n}'", p) for n, p in layer.named_parameters() if p.requires_grad and n not in exempt]
    for name, leaf in named:
        assert leaf.grad is not None, f"no gradient reaches {name}"
        assert leaf.grad.any(), f"the gradient of {name} is zero"
        assert leaf.grad.isfinite().all(), f"the gradient of {name} is not finite"


def gradcheck(case: Case) -> None:
    """First derivatives in inputs and parameters equal finite differences in float64."""
    layer = _make(case, torch.float64)
    leading = _leading(case)[0]
    inputs = _draw(case, (min(2, leading[0]), *leading[1:]) if leading else (), torch.float64)
    leaves = _differentiable(case, inputs)
    exempt = set(case.tags.get("no_grad", ()))
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad and n not in exempt}

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(parameters, tensors[len(leaves) :], strict=True))
        replaced = {id(leaf): tensor for leaf, tensor in zip(leaves, tensors[: len(leaves)], strict=True)}
        out: Tensor = torch.func.functional_call(layer, given, tuple(replaced.get(id(x), x) for x in inputs))
        return out

    try:
        # fast_mode compares along random directions: the cost stays small and a wrong formula still shows.
        torch.autograd.gradcheck(call, (*leaves, *parameters.values()), fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(str(error).strip().splitlines()[0]) from error


def inputs_unchanged(case: Case) -> None:
    """Neither forward nor backward writes into the inputs, whether or not they require gradients."""
    for tracked in (False, True):
        layer = _make(case)
        inputs = _draw(case)
        kept = [x.clone() for x in inputs]
        given = inputs
        if tracked:
            _differentiable(case, inputs)
            given = [x * 1 if x.requires_grad else x for x in inputs]  # a leaf would refuse; an inner result would not
        versions = [x._version for x in given]
        out = layer(*given)
        if out.requires_grad:
            out.sum().backward()
        for i, (x, before, version) in enumerate(zip(given, kept, versions, strict=True)):
            assert torch.equal(x, before), f"input {i} was changed in place"
            assert x._version == version, f"input {i} was written to in place"


def state_dict(case: Case) -> None:
    """The state goes through safetensors and back: the loaded layer gives the same bits."""
    layer = _make(case)
    inputs = _draw(case)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    state = {name: tensor.contiguous().clone() for name, tensor in layer.state_dict().items()}
    other = _make(case, seed=4)  # another seed: what is drawn at construction and not in the state shows
    other.load_state_dict(load(save(state)), strict=True)
    assert torch.equal(other(*inputs), layer(*inputs)), "the loaded layer gives another result: some state is not in state_dict"


def compiled(case: Case) -> None:
    """``torch.compile`` takes the layer as one graph, and gives the same output and gradients."""
    layer = _make(case)
    torch.compiler.reset()
    fast = torch.compile(layer, backend=case.tags.get("compile", "aot_eager"), fullgraph=True)
    results = []
    for call in (layer, fast):
        inputs = _draw(case)
        leaves = _differentiable(case, inputs)
        try:
            out = call(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise AssertionError(f"torch.compile(fullgraph=True) failed: {str(error).strip().splitlines()[0]}") from error
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, true in zip(results[1], results[0], strict=True):
        assert _distance(ours, true) < 1e-5, f"compiled and eager differ by {_distance(ours, true):.1e}"


def wrong_shape(case: Case) -> None:
    """A trailing axis of another size is refused with a ValueError that says what came."""
    layer = _make(case)
    free = set(map(tuple, case.tags.get("free", ())))
    for i, trailing in enumerate(case.tags["inputs"]):
        for axis, size in enumerate(trailing):
            if (i, axis) in free:
                continue
            for other in (size + 1, size - 1):
                inputs = _draw(case)
                at = inputs[i].ndim - len(trailing) + axis
                inputs[i] = (
                    inputs[i].narrow(at, 0, other) if other < size else torch.cat([inputs[i], inputs[i].narrow(at, 0, 1)], at)
                )
                what = f"input {i} with {other} instead of {size} along trailing axis {axis}"
                _refused(lambda inputs=inputs: layer(*inputs), what, (str(other),))  # type: ignore[misc]


def wrong_dtype(case: Case) -> None:
    """Integer inputs where numbers are due are refused with a ValueError or TypeError that names the dtype."""
    layer = _make(case)
    for i, x in enumerate(_draw(case)):
        if x.is_floating_point():
            inputs = _draw(case)
            inputs[i] = torch.ones_like(x, dtype=torch.int64)
            _refused(lambda inputs=inputs: layer(*inputs), f"int64 as input {i}", ("int64",))  # type: ignore[misc]


def nan_input(case: Case) -> None:
    """A NaN is refused or shows in its sample's output; it never vanishes, nor leaks into other samples."""
    layer = _make(case)
    for i, x in enumerate(_draw(case)):
        if not x.is_floating_point():
            continue
        inputs = _draw(case)
        if not inputs[i].ndim:
            continue
        sample = inputs[i][0] if _leading(case)[0] else inputs[i]
        sample.view(-1)[-1] = torch.nan
        try:
            out = layer(*inputs)
        except ValueError:
            continue
        bad = out[0] if _leading(case)[0] else out
        assert bad.isnan().any(), f"a NaN in input {i} vanished"
        if _leading(case)[0] and case.tags.get("independent", True):
            assert out[1:].isfinite().all(), f"a NaN in one sample of input {i} leaked into others"


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        shape, leading_dims, empty_batch, dtype, determinism, train_eval, gradients, gradcheck,
        inputs_unchanged, state_dict, compiled, wrong_shape, wrong_dtype, nan_input,
    )
}  # fmt: skip


def check_layer(make: Callable[[], nn.Module], **tags: Any) -> None:
    """Run every check of this module on the layer that ``make()`` builds.

    Args:
        make: builds the layer, in float32 and in any mode; random initialization is seeded by the checks.
        **tags: what the layer takes, gives and promises; see the module's table. ``inputs`` and ``output`` are required.

    Raises:
        AssertionError: names the first check that fails and why.
        ValueError: ``inputs`` or ``output`` is missing.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         if x.shape[-1] != 3 or not x.is_floating_point():
        ...             raise ValueError(f"x must be floating of shape (..., 3), not {x.dtype} {tuple(x.shape)}")
        ...         return self.weight * x
        >>> check_layer(Scale, inputs=((3,),), output=(3,))
    """
    for name in ("inputs", "output"):
        if name not in tags:
            raise ValueError(f"check_layer needs the tag '{name}': the trailing shape{'s' if name == 'inputs' else ''}")
    run_checks("layer", Case(make, tags))
