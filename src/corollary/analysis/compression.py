"""How a model's layers compress a set of texts: Matrix Nuclear-Norm and matrix entropy, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corollary.analysis.matrix_entropy import MatrixEntropy
from corollary.analysis.matrix_nuclear_norm import MatrixNuclearNorm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

States = Tensor | Sequence[Tensor] | Mapping[str, Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class CompressionReport:
    """What `evaluate_compression` found; each tuple has one entry for each layer.

    Args:
        layers: names of the layers, from input to output.
        widths: number of features d.
        matrix_nuclear_norm: mean over texts; lower is said to mean stronger compression.
        standard_error: of that mean; 0 for a single text.
        matrix_entropy: mean over texts, over log d; empty where it was not asked for.
        texts: texts that were scored.
        skipped: texts of fewer than two tokens, which have no score.
        tokens: tokens of the texts that were scored.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    matrix_nuclear_norm: tuple[float, ...]
    standard_error: tuple[float, ...]
    matrix_entropy: tuple[float, ...]
    texts: int
    skipped: int
    tokens: int

    @property
    def mean_length(self) -> float:
        """Tokens in a text, on average: scores of different models compare only at like lengths."""
        return self.tokens / self.texts

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that ``json`` takes."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw both measures over the layers, on ``ax`` or on new axes."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(layout="constrained").add_subplot()
        x = range(len(self.layers))
        ax.errorbar(x, self.matrix_nuclear_norm, yerr=self.standard_error, marker="o", label="Matrix Nuclear-Norm")
        if self.matrix_entropy:
            ax.plot(x, self.matrix_entropy, marker="s", label="matrix entropy")
        ax.set_xticks(list(x), self.layers, rotation=45 if len(self.layers) > 8 else 0)
        ax.set_xlabel("layer")
        ax.set_ylabel("score (lower: stronger compression)")
        ax.set_title(f"{self.texts} texts of {self.mean_length:.0f} tokens on average")
        ax.legend()
        return ax


def evaluate_compression(
    model: nn.Module | Callable[[list[Any]], States],
    texts: Iterable[Any],
    *,
    tokenizer: Callable[..., Mapping[str, Tensor]] | None = None,
    layers: Sequence[int | str] | None = None,
    entropy: bool = True,
    max_length: int = 512,
    batch_size: int = 16,
    progress: bool = False,
) -> CompressionReport:
    """Mean Matrix Nuclear-Norm, and matrix entropy, of each layer's hidden states over a stream of texts.

    Texts are read batch by batch and only sums are kept, so memory does not grow with their number: a generator will do. A
    module runs in evaluation mode without gradients; its modes, parameters, buffers and the random state stay as they were.

    Args:
        model: one of

            - a transformers model, with its ``tokenizer``: texts are strings, layers are its hidden states;
            - any other ``nn.Module``: texts are one-dimensional tensors of tokens, and texts of one length that follow each
              other are run together, without padding;
            - a function from a list of texts to their hidden states: (B, L, d), or a list of (L_i, d), or a mapping from a
              layer's name to one of these.
        texts: any iterable of texts.
        tokenizer: a transformers tokenizer; needed for strings.
        layers: which layers. For a transformers model indices of its hidden states (None: all, the embedding being 0). For
            any module also names of submodules, as ``named_modules`` gives them, whose output is read (None, without
            tokenizer: the module's own output). A function's mapping may be cut by name.
        entropy: measure matrix entropy as well, which takes far more time on wide models.
        max_length: longer texts are cut to this many tokens.
        batch_size: texts in a batch.
        progress: show a progress bar on the standard error.

    Returns:
        A `CompressionReport`.

    Raises:
        TypeError: texts of a kind that the model does not take.
        ValueError: no text of two or more tokens, an unknown layer, hidden states of a wrong shape, NaN or infinity.

    When not to use it: to order layers of one model by Matrix Nuclear-Norm alone; see `matrix_nuclear_norm`.

    Example:
        >>> import torch
        >>> from corollary.models import GPT
        >>> torch.manual_seed(0)
        <torch...>
        >>> report = evaluate_compression(GPT(256, dim=32), torch.randint(256, (8, 24)), layers=["embed", "blocks.1", "norm"])
        >>> report.layers, report.widths, report.texts, report.tokens
        (('embed', 'blocks.1', 'norm'), (32, 32, 32), 8, 192)

    Source: arXiv:2410.10672, Sections 5 and 6: the score of each text, averaged over a data set.
    """
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"'{name}' is {value}; allowed: at least 1")
    if isinstance(texts, str):
        raise TypeError("'texts' is one str; allowed: an iterable of texts")
    metrics: dict[str, tuple[int, MatrixNuclearNorm, MatrixEntropy]] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(_evaluation_mode(model))
            states_of = _reader(model, tokenizer, layers, max_length, stack)
        else:
            states_of = _function_reader(model, layers, max_length)
        grouped = isinstance(model, nn.Module) and tokenizer is None
        for batch in _batches(texts, batch_size, len if grouped else None, progress, stack):
            for name, (states, mask) in states_of(batch).items():
                width, norm, spectrum = metrics.setdefault(name, (states.shape[-1], MatrixNuclearNorm(), MatrixEntropy()))
                if states.shape[-1] != width:
                    raise ValueError(f"layer '{name}' gave {states.shape[-1]} features after {width}; allowed: one width")
                norm.update(states, mask)
                if entropy:
                    spectrum.update(states, mask)
    if not metrics:
        raise ValueError("'texts' is empty; allowed: at least one text of two or more tokens")
    norms = [norm for _, norm, _ in metrics.values()]
    return CompressionReport(
        layers=tuple(metrics),
        widths=tuple(width for width, _, _ in metrics.values()),
        matrix_nuclear_norm=tuple(float(norm.compute()) for norm in norms),
        standard_error=tuple(float(norm.standard_error()) if int(norm.texts) > 1 else 0.0 for norm in norms),
        matrix_entropy=tuple(float(spectrum.compute()) for _, _, spectrum in metrics.values()) if entropy else (),
        texts=int(norms[0].texts),
        skipped=int(norms[0].skipped),
        tokens=int(norms[0].tokens),
    )


_Read = Callable[[list[Any]], dict[str, tuple[Tensor, Tensor | None]]]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # one by one: a model may hold parts in either mode
            module.training = True


def _batches(
    texts: Iterable[Any], size: int, key: Callable[[Any], int] | None, progress: bool, stack: ExitStack
) -> Iterator[list[Any]]:
    """Lists of up to ``size`` texts; with ``key``, a list holds texts of one key only."""
    from rich.console import Console
    from rich.progress import Progress

    bar = stack.enter_context(Progress(console=Console(stderr=True), disable=not progress, transient=True))
    task = bar.add_task("texts", total=len(texts) if isinstance(texts, Sized) else None)
    iterator = iter(texts)
    held: list[Any] = []
    while True:
        held += islice(iterator, size - len(held))
        if not held:
            return
        if key is not None and not all(isinstance(text, Tensor) and text.ndim == 1 for text in held):
            raise TypeError("'texts' must hold one-dimensional tensors of tokens for a module without 'tokenizer'")
        count = next((i for i, text in enumerate(held) if key(text) != key(held[0])), len(held)) if key else len(held)
        yield held[:count]
        held = held[count:]
        bar.advance(task, count)


def _reader(
    model: nn.Module,
    tokenizer: Callable[..., Mapping[str, Tensor]] | None,
    layers: Sequence[int | str] | None,
    max_length: int,
    stack: ExitStack,
) -> _Read:
    """A reader of a module's layers: by the index of a transformers model's hidden states, by submodule, or the output."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    wanted: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for layer in layers or ():
        if isinstance(layer, str):
            if layer not in modules:
                raise ValueError(f"'layers' names '{layer}', which the model lacks; it has: {', '.join(filter(None, modules))}")

            def keep(_: nn.Module, __: Any, output: Any, name: str = layer) -> None:
                wanted[name] = output[0] if isinstance(output, tuple) else output

            stack.callback(modules[layer].register_forward_hook(keep).remove)
        elif tokenizer is None:
            raise TypeError("'layers' holds an index; allowed for a transformers model with its 'tokenizer', otherwise names")

    def read(batch: list[Any]) -> dict[str, tuple[Tensor, Tensor | None]]:
        wanted.clear()
        mask = None
        if tokenizer is not None and not all(isinstance(text, str) for text in batch):
            raise TypeError("'texts' must hold strings where 'tokenizer' is given")
        if tokenizer is None:
            output = model(torch.stack(batch)[:, :max_length].to(device))
            found = [] if layers else [output]
            indices: Sequence[int | str] = layers if layers else (0,)
        else:
            encoded = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
            inputs = {name: value.to(device) for name, value in encoded.items()}
            mask = inputs.get("attention_mask")
            found = model(**inputs, output_hidden_states=True).hidden_states
            indices = range(len(found)) if layers is None else layers
        states: dict[str, tuple[Tensor, Tensor | None]] = {}
        for layer in indices:
            if isinstance(layer, str):
                if layer not in wanted:
                    raise ValueError(f"'layers' names '{layer}', which the model's forward did not call")
                states[layer] = (_three_dimensional(wanted[layer], layer), mask)
            else:
                if not -len(found) <= layer < len(found):
                    raise ValueError(f"'layers' holds {layer}; allowed: {-len(found)} to {len(found) - 1}")
                name = "output" if tokenizer is None else str(layer % len(found))
                states[name] = (_three_dimensional(found[layer], name), mask)
        return states

    return read


def _three_dimensional(states: Any, name: str) -> Tensor:
    if not isinstance(states, Tensor) or states.ndim != 3:
        kind = f"shape {tuple(states.shape)}" if isinstance(states, Tensor) else type(states).__name__
        raise ValueError(f"layer '{name}' gave {kind}; allowed: hidden states (batch, tokens, features)")
    return states


def _function_reader(model: Callable[[list[Any]], States], layers: Sequence[int | str] | None, max_length: int) -> _Read:
    def read(batch: list[Any]) -> dict[str, tuple[Tensor, Tensor | None]]:
        found = model(batch)
        named = dict(found) if isinstance(found, Mapping) else {"output": found}
        for layer in layers or ():
            if layer not in named:
                raise ValueError(f"'layers' names {layer!r}, which the function did not give; it gave: {', '.join(named)}")
        states: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name in layers or named:
            given = named[str(name)]
            if isinstance(given, Tensor):
                states[str(name)] = (_three_dimensional(given, str(name))[:, :max_length], None)
                continue
            parts = [part[:max_length] for part in given]
            if any(part.ndim != 2 for part in parts):
                raise ValueError(f"layer '{name}' gave shapes {[tuple(p.shape) for p in parts]}; allowed: (tokens, features)")
            padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
            lengths = torch.tensor([len(part) for part in parts], device=padded.device)
            states[str(name)] = (padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None])
        return states

    return read
