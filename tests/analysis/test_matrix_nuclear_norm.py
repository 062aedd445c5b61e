"""The measures of hidden states against naive loops, closed forms, float64 decompositions and the theorems about them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from corollary.analysis import (
    CompressionReport,
    MatrixEntropy,
    MatrixNuclearNorm,
    MatrixNuclearNormStream,
    evaluate_compression,
    matrix_entropy,
    matrix_nuclear_norm,
    nuclear_norm,
)
from corollary.models import GPT


def naive_rows(x: np.ndarray) -> list[list[float]]:
    """Algorithm 1, line 2, one number at a time."""
    tokens, features = x.shape
    mean = [math.fsum(x[:, j]) / tokens for j in range(features)]
    rows = []
    for i in range(tokens):
        row = [float(x[i, j]) - mean[j] for j in range(features)]
        length = math.sqrt(math.fsum(v * v for v in row))
        rows.append([v / length for v in row])
    return rows


def naive_norm(x: np.ndarray, top: int | None = None) -> float:
    """Algorithm 1, one number at a time."""
    z = naive_rows(x)
    columns = sorted((math.sqrt(math.fsum(row[j] ** 2 for row in z)) for j in range(x.shape[1])), reverse=True)
    return math.fsum(columns[: top or min(x.shape)]) / len(z)


def dense_entropy(x: np.ndarray) -> float:
    """Equation 14 in float64, from the singular values of the d-by-d covariance."""
    z = np.array(naive_rows(x))
    spectrum = np.linalg.svd(z.T @ z / len(z), compute_uv=False)
    spectrum = spectrum / spectrum.sum()
    return float(-sum(v * math.log(v) for v in spectrum if v > 1e-300) / math.log(x.shape[1]))


def matrix(seed: int, tokens: int, features: int) -> Tensor:
    """Hidden states with a mean that is not zero and features of very different size."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, features, dtype=torch.float64)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) * scale + torch.randn(
        features, generator=generator, dtype=torch.float64
    )


SHAPES = [(2, 5), (7, 3), (6, 6), (12, 40), (50, 8), (5, 1)]


@pytest.mark.parametrize(("tokens", "features"), SHAPES)
def test_agrees_with_the_naive_loop(tokens: int, features: int) -> None:
    x = matrix(0, tokens, features)
    assert float(matrix_nuclear_norm(x)) == pytest.approx(naive_norm(x.numpy()), rel=1e-12)
    for top in {1, min(2, features), features}:
        assert float(matrix_nuclear_norm(x, top=top)) == pytest.approx(naive_norm(x.numpy(), top), rel=1e-12)


@pytest.mark.parametrize(("tokens", "features"), [shape for shape in SHAPES if shape[1] > 1])
def test_entropy_agrees_with_the_dense_covariance(tokens: int, features: int) -> None:
    x = matrix(1, tokens, features)
    assert float(matrix_entropy(x)) == pytest.approx(dense_entropy(x.numpy()), abs=1e-10)
    assert float(matrix_entropy(x, normalized=False)) == pytest.approx(dense_entropy(x.numpy()) * math.log(features), abs=1e-10)


@pytest.mark.parametrize(("tokens", "features"), SHAPES)
def test_nuclear_norm_agrees_with_the_dense_decomposition(tokens: int, features: int) -> None:
    x = matrix(2, tokens, features)
    z = np.array(naive_rows(x.numpy()))
    assert float(nuclear_norm(x)) == pytest.approx(float(np.linalg.svd(z, compute_uv=False).sum()) / tokens, rel=1e-12)


def test_closed_forms() -> None:
    d = 6
    corners = torch.cat([torch.eye(d), -torch.eye(d)]).double()  # mean 0, unit rows, orthogonal columns of norm sqrt 2
    expected = d * math.sqrt(2) / (2 * d)
    assert float(matrix_nuclear_norm(corners)) == pytest.approx(expected)
    assert float(nuclear_norm(corners)) == pytest.approx(expected)
    assert float(matrix_entropy(corners)) == pytest.approx(1.0)
    line = torch.tensor([[1.0, 2.0, -2.0]]).double() * torch.tensor([[1.0], [-3.0], [2.0], [0.5]]).double()
    line = line - line.mean(0)  # every row on one line: rank one
    assert float(matrix_entropy(line)) == pytest.approx(0.0, abs=1e-12)
    assert float(nuclear_norm(line)) == pytest.approx(1 / math.sqrt(4))
    assert float(matrix_nuclear_norm(line)) == pytest.approx(2 * (1 / 3 + 2 / 3 + 2 / 3) / 4)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**20), tokens=st.integers(2, 24), features=st.integers(2, 24))
def test_bounds(seed: int, tokens: int, features: int) -> None:
    x = matrix(seed, tokens, features)
    norm, exact = float(matrix_nuclear_norm(x)), float(nuclear_norm(x))
    rank = min(tokens, features)
    frobenius = math.sqrt(tokens)  # of the normalized rows
    assert rank / features * exact <= norm * (1 + 1e-9)  # triangle inequality, then the mean of the largest D columns
    assert norm <= math.sqrt(rank * tokens) / tokens * (1 + 1e-9)  # Cauchy and Schwarz
    assert frobenius / tokens <= exact * (1 + 1e-9)  # Equation 7
    assert exact <= math.sqrt(rank) * frobenius / tokens * (1 + 1e-9)  # Equations 7 and 8
    assert exact <= float(matrix_nuclear_norm(x, top=features)) * (1 + 1e-9)
    entropy = float(matrix_entropy(x, normalized=False))
    assert -1e-9 <= entropy <= math.log(max(1, min(tokens - 1, features))) + 1e-9


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**20), tokens=st.integers(3, 20), features=st.integers(2, 20))
def test_invariances(seed: int, tokens: int, features: int) -> None:
    x = matrix(seed, tokens, features)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q
    shift = torch.randn(features, generator=generator, dtype=torch.float64)
    for measure in (matrix_nuclear_norm, matrix_entropy, nuclear_norm):
        value = float(measure(x))
        assert float(measure(3.7 * x + shift)) == pytest.approx(value, rel=1e-8)
        assert float(measure(x[torch.randperm(tokens, generator=generator)])) == pytest.approx(value, rel=1e-9)
        assert float(measure(x[:, torch.randperm(features, generator=generator)])) == pytest.approx(value, rel=1e-9)
    for measure in (matrix_entropy, nuclear_norm):  # spectral measures do not see the basis; the column norms do
        assert float(measure(x @ rotation)) == pytest.approx(float(measure(x)), rel=1e-7)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), features=st.integers(2, 12))
def test_equals_the_nuclear_norm_where_columns_are_orthogonal(seed: int, features: int) -> None:
    # Theorem 3 with its condition met exactly: pairs of rows +-e_j, each pair repeated any number of times.
    generator = torch.Generator().manual_seed(seed)
    repeats = torch.randint(1, 5, (features,), generator=generator)
    rows = torch.eye(features, dtype=torch.float64).repeat_interleave(repeats, dim=0)
    x = torch.cat([rows, -rows])
    assert float(matrix_nuclear_norm(x)) == pytest.approx(float(nuclear_norm(x)), rel=1e-10)


MEASURES = [matrix_nuclear_norm, matrix_entropy, nuclear_norm]


@pytest.mark.parametrize("measure", MEASURES)
def test_padding_changes_nothing(measure: Callable[..., Tensor]) -> None:
    texts = [matrix(seed, tokens, 10) for seed, tokens in enumerate((2, 5, 10, 17))]
    padded = torch.full((4, 17, 10), math.nan, dtype=torch.float64)
    mask = torch.zeros(4, 17, dtype=torch.int64)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text
        mask[i, : len(text)] = 1
    expected = torch.stack([measure(text) for text in texts])
    torch.testing.assert_close(measure(padded, mask), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(measure(padded[2], mask[2].bool()), expected[2], rtol=1e-9, atol=1e-12)
    if measure is matrix_nuclear_norm:
        both = measure(padded, mask, top=3)
        torch.testing.assert_close(both, torch.stack([measure(text, top=3) for text in texts]))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
def test_lower_precisions(measure: Callable[..., Tensor], dtype: torch.dtype, tolerance: float) -> None:
    x = 30 * torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = measure(x.to(dtype))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), measure(x), rtol=tolerance, atol=tolerance)
    assert measure(x).dtype == torch.float64


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_tokens_carry_no_content(measure: Callable[..., Tensor]) -> None:
    for tokens in (1, 3, 7):  # 1/3 and 1/7 are rounded, so the mean differs from the rows by rounding
        same = torch.full((tokens, 4), 0.1) * torch.tensor([1.0, 3.0, -7.0, 0.3])
        assert float(measure(same)) == 0.0
    x = matrix(5, 9, 4)
    assert float(measure(x.float() * 1e-4)) == pytest.approx(float(measure(x)), rel=1e-2)  # small, but content


def test_gradient() -> None:
    x = matrix(3, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(matrix_nuclear_norm, (x,))
    assert torch.autograd.gradcheck(lambda v: matrix_nuclear_norm(v, top=2), (x,))
    dead = torch.cat([matrix(4, 5, 3), torch.zeros(5, 1)], dim=1).requires_grad_()
    matrix_nuclear_norm(dead).backward()  # type: ignore[no-untyped-call]
    assert dead.grad is not None
    assert bool(dead.grad.isfinite().all())


@pytest.mark.parametrize("measure", MEASURES)
def test_bad_input(measure: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 5, 4)
    for bad, kind, message in [
        ((x.numpy(),), TypeError, "'hidden_states' is ndarray"),
        ((x.long(),), TypeError, "torch.int64"),
        ((x[0, 0],), ValueError, r"shape \(4,\)"),
        ((x[:, :0],), ValueError, r"shape \(2, 0, 4\)"),
        ((x[:, :, :0],), ValueError, r"shape \(2, 5, 0\)"),
        ((x, torch.ones(2, 4).bool()), ValueError, r"'mask' has shape \(2, 4\)"),
        ((x, torch.ones(2, 5)), TypeError, "'mask' is torch.float32"),
        ((x, torch.tensor([[True] * 5, [False] * 5])), ValueError, "without tokens"),
        ((x * math.nan,), ValueError, "NaN"),
        ((x / 0.0,), ValueError, "infinity"),
    ]:
        with pytest.raises(kind, match=message):
            measure(*bad)
    one = x.clone()
    one[1, 2, 3] = math.nan  # a single number must not pass unseen
    with pytest.raises(ValueError, match="NaN"):
        measure(one)


def test_bad_options() -> None:
    x = torch.randn(5, 4)
    for top in (0, 5, -1):
        with pytest.raises(ValueError, match=f"'top' is {top}; allowed: 1 to"):
            matrix_nuclear_norm(x, top=top)
    with pytest.raises(ValueError, match="one feature"):
        matrix_entropy(x[:, :1])


@pytest.mark.parametrize(("metric", "measure"), [(MatrixNuclearNorm, matrix_nuclear_norm), (MatrixEntropy, matrix_entropy)])
def test_metric_is_the_mean_over_texts(metric: Callable[[], Any], measure: Callable[..., Tensor]) -> None:
    texts = [matrix(seed, 2 + seed % 7, 6) for seed in range(23)]
    scores = np.array([float(measure(text)) for text in texts])
    whole, left, right = metric(), metric(), metric()
    for i, text in enumerate(texts):
        whole.update(text)
        (left if i < 9 else right).update(text)
    whole.update(torch.zeros(1, 6))  # one token: no score, counted apart
    left.merge(right)
    for one in (whole, left):
        assert float(one.compute()) == pytest.approx(scores.mean(), rel=1e-12)
        assert float(one.standard_error()) == pytest.approx(scores.std(ddof=1) / math.sqrt(len(scores)), rel=1e-9)
        assert (int(one.texts), int(one.tokens)) == (23, sum(map(len, texts)))
    assert int(whole.skipped) == 1
    copy = metric()
    copy.load_state_dict(whole.state_dict())
    assert float(copy.compute()) == float(whole.compute())
    batch = metric()
    padded = nn.utils.rnn.pad_sequence([*texts, torch.zeros(1, 6).double()], batch_first=True)
    lengths = torch.tensor([*map(len, texts), 1])
    batch.update(padded, torch.arange(padded.shape[1]) < lengths[:, None])
    assert float(batch.compute()) == pytest.approx(scores.mean(), rel=1e-12)
    assert int(batch.skipped) == 1
    whole.reset()
    with pytest.raises(ValueError, match="no text"):
        whole.compute()
    with pytest.raises(TypeError, match="allowed"):
        whole.merge(nn.Identity())
    empty = metric()
    empty.merge(metric())
    empty.update(torch.zeros(0, 3, 6))
    assert int(empty.texts) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_stream_equals_the_whole_matrix(dtype: torch.dtype) -> None:
    rows = matrix(0, 301, 12).to(dtype)
    expected = float(matrix_nuclear_norm(rows.double()))
    stream = MatrixNuclearNormStream(12)
    for step in (stream.observe, stream.update):
        for chunk in rows.split([100, 1, 0, 200]):
            step(chunk)
    assert float(stream.compute()) == pytest.approx(expected, rel=1e-12)
    assert float(stream.compute(top=3)) == pytest.approx(float(matrix_nuclear_norm(rows.double(), top=3)), rel=1e-12)
    known = MatrixNuclearNormStream(12, mean=rows.double().mean(0))
    known.update(rows)
    assert float(known.compute()) == pytest.approx(expected, rel=1e-12)
    centered = MatrixNuclearNormStream(12)
    centered.update(rows.double() - rows.double().mean(0))
    assert float(centered.compute()) == pytest.approx(expected, rel=1e-12)


def test_stream_merges_shards() -> None:
    rows = matrix(1, 90, 7)
    shards = [MatrixNuclearNormStream(7) for _ in range(3)]
    parts = rows.split([20, 40, 30])
    for shard, part in zip(shards, parts, strict=True):
        shard.observe(part)
    whole = MatrixNuclearNormStream(7)
    for shard in shards:
        whole.merge(shard)
    for shard, part in zip(shards, parts, strict=True):
        shard.load_state_dict(whole.state_dict())
        shard.update(part)
    for shard in shards:
        whole.merge(shard)
    assert float(whole.compute()) == pytest.approx(float(matrix_nuclear_norm(rows)), rel=1e-12)


def test_stream_refuses_what_it_cannot_do() -> None:
    stream = MatrixNuclearNormStream(4)
    with pytest.raises(ValueError, match="no rows"):
        stream.compute()
    with pytest.raises(ValueError, match=r"'rows' has shape \(3, 5\); allowed: \(n, 4\)"):
        stream.update(torch.randn(3, 5))
    stream.observe(torch.randn(3, 4))
    stream.update(torch.randn(2, 4))
    with pytest.raises(ValueError, match="observe saw 3 rows and update 2"):
        stream.compute()
    with pytest.raises(ValueError, match="observe came after update"):
        stream.observe(torch.randn(3, 4))
    other = MatrixNuclearNormStream(4)
    other.update(torch.randn(2, 4))
    with pytest.raises(ValueError, match="means differ"):
        stream.merge(other)
    with pytest.raises(ValueError, match="'mean' has shape"):
        MatrixNuclearNormStream(4, mean=torch.zeros(3))
    bad = MatrixNuclearNormStream(4)
    bad.update(torch.full((2, 4), math.nan))
    with pytest.raises(ValueError, match="NaN"):
        bad.compute()


class Tokens:
    """A tokenizer of bytes that pads as transformers' do."""

    def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
        rows = [torch.tensor(list(text.encode())[:max_length]) for text in texts]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True), "attention_mask": mask}


class Encoder(nn.Module):
    """Gives hidden states as transformers' models do; each token by itself, so that padding cannot leak."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.mix = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.5))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool) -> Any:
        first = self.embed(input_ids)

        class Output:
            hidden_states = (first, self.mix(first))

        return Output


TEXTS = ["a short text", "another, somewhat longer text", "x", "the third of these texts is longer than both", "end of it"]


def test_evaluate_compression_reads_a_transformers_model() -> None:
    torch.manual_seed(0)
    model = Encoder()
    report = evaluate_compression(model, iter(TEXTS), tokenizer=Tokens(), batch_size=2, max_length=40)
    assert (report.layers, report.widths, report.texts, report.skipped) == (("0", "1"), (8, 12), 4, 1)
    assert report.tokens == sum(min(len(text), 40) for text in TEXTS if len(text) > 1)
    model.eval()
    for i in range(2):
        states = [model(torch.tensor([list(t.encode())[:40]]), None, True).hidden_states[i][0] for t in TEXTS if len(t) > 1]
        scores = [float(matrix_nuclear_norm(s.detach())) for s in states]
        assert report.matrix_nuclear_norm[i] == pytest.approx(np.mean(scores), rel=1e-5)
        assert report.standard_error[i] == pytest.approx(np.std(scores, ddof=1) / 2, rel=1e-4)
        assert report.matrix_entropy[i] == pytest.approx(np.mean([float(matrix_entropy(s.detach())) for s in states]), rel=1e-4)
    last = evaluate_compression(model, TEXTS, tokenizer=Tokens(), layers=[-1, "mix.0"], entropy=False, max_length=40)
    assert last.layers == ("1", "mix.0")
    assert last.matrix_nuclear_norm[0] == pytest.approx(report.matrix_nuclear_norm[1], rel=1e-5)
    assert last.matrix_entropy == ()


def test_evaluate_compression_reads_any_module_and_function() -> None:
    torch.manual_seed(0)
    model = GPT(64, dim=16, depth=2, heads=2, context=16)
    texts = [torch.randint(64, (n,)) for n in (9, 9, 12, 9, 16, 16, 20)]
    report = evaluate_compression(model, texts, layers=["embed", "blocks.0", "norm"], max_length=16)
    with torch.no_grad():
        expected = [float(matrix_nuclear_norm(model.features(text[None, :16])[0])) for text in texts]
        assert report.matrix_nuclear_norm[-1] == pytest.approx(np.mean(expected), rel=1e-5)
        one = evaluate_compression(lambda batch: [model.features(t[None, :16])[0] for t in batch], texts)
        assert one.matrix_nuclear_norm[0] == pytest.approx(report.matrix_nuclear_norm[-1], rel=1e-5)
        two = evaluate_compression(
            lambda b: {"a": torch.randn(len(b), 4, 3), "b": torch.randn(len(b), 4, 5)}, texts, layers=["b"]
        )
    assert (two.layers, two.widths) == (("b",), (5,))
    assert evaluate_compression(model, texts, max_length=16).layers == ("output",)


def test_evaluate_compression_refuses_what_it_cannot_read() -> None:
    model, tokens = GPT(64, dim=16, depth=1, heads=2, context=16), torch.randint(64, (4, 8))
    for texts, options, kind, message in [
        ([], {}, ValueError, "'texts' is empty"),
        (tokens[:, :1], {}, ValueError, "no text of two or more tokens"),
        ("a text", {}, TypeError, "one str"),
        (["a text"], {}, TypeError, "one-dimensional tensors"),
        (tokens[None], {}, TypeError, "one-dimensional tensors"),
        (tokens, {"layers": ["blocks.7"]}, ValueError, "names 'blocks.7', which the model lacks; it has: embed"),
        (tokens, {"layers": [0]}, TypeError, "index"),
        (tokens, {"batch_size": 0}, ValueError, "'batch_size' is 0"),
        (tokens, {"tokenizer": Tokens()}, TypeError, "must hold strings"),
    ]:
        with pytest.raises(kind, match=message):
            evaluate_compression(model, texts, **options)
    with pytest.raises(ValueError, match=r"gave shape \(4, 3\); allowed: hidden states"):
        evaluate_compression(lambda batch: torch.randn(4, 3), tokens)
    with pytest.raises(ValueError, match="did not give"):
        evaluate_compression(lambda batch: {"a": torch.randn(4, 3, 2)}, tokens, layers=["b"])
    with pytest.raises(ValueError, match="allowed: -2 to 1"):
        evaluate_compression(Encoder(), ["some text"], tokenizer=Tokens(), layers=[2])


def test_report_is_plain_data_and_draws() -> None:
    report = CompressionReport(("0", "1"), (8, 8), (0.5, 0.25), (0.1, 0.0), (0.75, 0.5), texts=3, skipped=0, tokens=30)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["matrix_nuclear_norm"] == [0.5, 0.25]
    assert (again["texts"], report.mean_length) == (3, 10.0)
    ax = report.plot()
    assert report.plot(ax) is ax
    assert [list(line.get_ydata()) for line in ax.get_lines()][:2] == [[0.5, 0.25], [0.75, 0.5]]


def test_reads_the_layers_of_a_pretrained_transformer() -> None:
    data = pytest.importorskip("corollary.data")
    tokenizer, model = data.minilm()
    texts = ["Corollary measures what a paper claims.", "The nuclear norm is the sum of the singular values of a matrix."]
    report = evaluate_compression(model, texts, tokenizer=tokenizer)
    assert (report.layers, set(report.widths), report.texts) == (tuple("0123456"), {384}, 2)
    states = [data.hidden_states([text], layer=3)[0] for text in texts]
    assert report.matrix_nuclear_norm[3] == pytest.approx(np.mean([float(matrix_nuclear_norm(s)) for s in states]), rel=1e-4)
    assert report.matrix_entropy[3] == pytest.approx(np.mean([float(matrix_entropy(s)) for s in states]), rel=1e-3)


# Printed in the paper: Tables 9 and 10, Cerebras-GPT from 111M to 13B, matrix entropy and Matrix Nuclear-Norm.
PRINTED = {
    "OpenBookQA": (
        [0.3575, 0.3416, 0.3237, 0.3140, 0.2991, 0.2848, 0.2767],
        [0.4447, 0.4057, 0.3941, 0.3644, 0.4606, 0.3672, 0.4423],
        0.11,
    ),
    "Winogrande": (
        [0.4073, 0.3915, 0.3706, 0.3605, 0.3419, 0.3272, 0.3149],
        [0.4802, 0.4479, 0.4440, 0.4133, 0.5232, 0.4220, 0.4964],
        -0.11,
    ),
    "OpenWebText2": (
        [0.6527, 0.6479, 0.6206, 0.6142, 0.5855, 0.5683, 0.5463],
        [0.7147, 0.7066, 0.6823, 0.6363, 0.6017, 0.5133, 0.4991],
        1.0,
    ),
}


@pytest.mark.parametrize("dataset", PRINTED)
def test_what_the_record_says_of_the_papers_tables(dataset: str) -> None:
    entropy, norm, correlation = PRINTED[dataset]
    assert spearmanr(entropy, norm).statistic == pytest.approx(correlation, abs=0.005)
    assert max(norm) <= 1  # the ceiling sqrt(D / L) is at most 1: the tables are divided by the length, as Equation 11


def test_agrees_with_the_authors_steps() -> None:
    """The order of operations of the authors' evaluation script, with its division by the number of tokens."""
    for tokens, features in ((10, 40), (40, 10)):
        x = matrix(7, tokens, features)
        rows = x - x.mean(dim=0)
        rows = rows / torch.norm(rows, p=2, dim=1, keepdim=True)
        largest = torch.sqrt(torch.sum(rows**2, dim=0)).sort(descending=True).values[: min(tokens, features)]
        assert float(matrix_nuclear_norm(x)) == pytest.approx(float(largest.sum()) / tokens, rel=1e-12)
