"""Search: the parts against plain oracles, and the whole against queries that must find their paper."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text
from tests.web.crash import killed

from corollary.web import store as s
from corollary.web.importers import first_issue
from corollary.web.search import (
    Filters,
    catch_up,
    excerpt,
    highlight,
    like_text,
    nearest_implemented,
    parse,
    rank_for,
    search,
    similar,
)  # fmt: skip
from corollary.web.search import vectors as vectors_module
from corollary.web.search.encoders import Lsa, to_bytes, unit
from corollary.web.search.text import fold, stem, tokens
from corollary.web.search.vectors import VectorIndex
from corollary.web.search.vocabulary import Vocabulary, distance
from corollary.web.search.words import rerank

QUERIES = [json.loads(line) for line in (Path(__file__).parent / "known_items.jsonl").read_text().splitlines()]
ABC = st.text("abcd", max_size=7)


@pytest.fixture(scope="module")
def issue(tmp_path_factory):
    """The first issue, searchable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COROLLARY_EMBEDDING", "lsa")
        opened = s.open_store(f"sqlite:///{tmp_path_factory.mktemp('issue') / 'daily.sqlite'}")
        first_issue(opened)
        catch_up(opened)
        yield opened
        opened.close()


def put(store: s.Store, papers: list[dict]) -> None:
    with store.writing() as session:
        for i, paper in enumerate(papers):
            session.add(s.Paper(**{"key": f"k{i}", "title": "t", "day": date(2024, 1, 1), "source": "t", **paper}))


# --- parts


def edits(a: str, b: str) -> int:
    """Optimal string alignment by its definition, recursively."""

    @cache
    def go(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        best = min(go(i - 1, j) + 1, go(i, j - 1) + 1, go(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            best = min(best, go(i - 2, j - 2) + 1)
        return best

    return go(len(a), len(b))


@settings(max_examples=150, deadline=None)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_distance_is_its_definition(a, b):
    assert distance(a, b, 2) == min(edits(a, b), 3)


@settings(deadline=None)
@given(st.dictionaries(st.text("abcdef", min_size=4, max_size=9), st.integers(1, 9), min_size=1, max_size=20), st.text("abcdef", min_size=4, max_size=9))  # fmt: skip
def test_spelling_takes_the_nearest_and_most_frequent(counts, word):
    found = Vocabulary(counts).correct(word)
    near = {
        known: edits(word, known)
        for known in counts
        if abs(len(known) - len(word)) <= 2 and known[0] == word[0] and len(known) >= 5
    }
    one = [known for known in counts if abs(len(known) - len(word)) <= 1 and edits(word, known) <= 1]
    if one:
        assert counts[found] == max(counts[known] for known in one)
    elif len(word) >= 6 and any(value == 2 for value in near.values()):
        assert near[found] == 2
        assert counts[found] == max(counts[known] for known, value in near.items() if value == 2)
    else:
        assert found is None


def test_completion():
    words = Vocabulary({"optimal": 3, "optimizer": 9, "option": 1, "oz": 4})
    assert words.complete("opti", 2) == ["optimizer", "optimal"]
    assert words.complete("x") == []


@given(st.text(max_size=200))
@example('a"b -"x y" author:"Z')
@example("NEAR(a b) AND OR NOT * ^ : {title}")
def test_any_text_is_a_query(query):
    parsed = parse(query)
    assert all(word == word.lower() for word in parsed.words)
    assert len(parsed.words) <= 400


@pytest.mark.parametrize(
    ("query", "name"),
    [("arxiv:2410.01623", "2410.01623"), ("2410.01623v2", "2410.01623"), ("https://arxiv.org/pdf/hep-ex/0307015v1.pdf", "hep-ex/0307015"), ("doi:10.1000/X", "doi:10.1000/x"), ("https://doi.org/10.1000/x", "doi:10.1000/x"), ("https://a.org/b", "url:https://a.org/b"), ("adam 2410.01623", None)],
)  # fmt: skip
def test_names_of_papers(query, name):
    assert parse(query).name == name


@given(st.text(max_size=120), st.text(max_size=40))
def test_highlighting_loses_nothing(text_, query):
    parsed = parse(query)
    assert "".join(piece for piece, _ in highlight(text_, parsed)) == text_
    wanted = {stem(w) for w in (*parsed.words, *(p for phrase in (*parsed.phrases, *parsed.authors) for p in phrase.split()))}
    for piece, hit in highlight(text_, parsed):
        if hit:
            assert stem(tokens(piece)[0]) in wanted


WORDS = st.sampled_from(
    ["rank", "Ranks", "ranking", "low", "slow", "optimizers", "Optim", "optimizing", "é", "naïve", "a_rank", "x2", "2x"]
)


@given(
    st.lists(st.tuples(WORDS, st.sampled_from([" ", "-", "_", ". ", ""]))),
    st.lists(WORDS, min_size=1, max_size=3).map(" ".join),
)
def test_highlighting_marks_every_word_that_is_asked_for(parts, query):
    """Word by word, as the definition says: those whose stem is that of a word asked for, and no others."""
    text_, parsed = "".join(word + gap for word, gap in parts), parse(query)
    marked, at = set(), 0
    for piece, hit in highlight(text_, parsed):
        if hit:
            marked.add((at, piece))
        at += len(piece)
    asked = {stem(word) for word in parsed.words}
    found = {(m.start(), m[0]) for m in re.finditer(r"[^\W_]+", text_) if stem(fold(m[0])) in asked}
    assert marked == found


def test_the_excerpt_is_where_the_words_are():
    body = "nothing here. " * 60 + "A low-rank optimizer saves memory. " + "and nothing there. " * 60
    pieces = excerpt(body, parse("low-rank optimizer memory"))
    shown = "".join(piece for piece, _ in pieces)
    assert "low-rank optimizer saves memory" in shown
    assert shown.startswith("… ")
    assert len(shown) < 260
    assert [piece for piece, hit in pieces if hit] == ["low", "rank", "optimizer", "memory"]


def test_lsa_is_the_singular_value_decomposition_of_tf_idf():
    rng = random.Random(0)
    words = [f"word{c}" for c in "abcdefghij"]
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(14)]
    model = Lsa.fit(texts, dims=4)
    counts = np.array([[Counter(text_.split())[word] for word in words] for text_ in texts], dtype=float)
    idf = np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    rows = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    _, _, right = np.linalg.svd(rows, full_matrices=False)
    expected = rows @ right[:4].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = model.encode(texts)
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=1e-3)
    np.testing.assert_allclose(np.vstack([model.encode([text_]) for text_ in texts]), got, atol=1e-5)
    assert not model.encode(["nothing known"]).any()


def test_lsa_comes_back_from_its_file(tmp_path):
    model = Lsa.fit(["alpha beta", "beta gamma", "gamma delta alpha"], dims=8)
    model.save(tmp_path / "m.npz")
    again = Lsa.load(tmp_path / "m.npz")
    assert again.name == model.name
    np.testing.assert_array_equal(again.encode(["alpha gamma"]), model.encode(["alpha gamma"]))


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_bytes_keep_cosines(seed):
    rows = np.random.default_rng(seed).normal(size=(20, 64)).astype(np.float32)
    exact = unit(rows) @ unit(rows).T
    stored = unit(to_bytes(rows)) @ unit(to_bytes(rows)).T
    assert np.abs(exact - stored).max() < 0.01
    assert not to_bytes(np.zeros((1, 4), np.float32)).any()


# --- the index of vectors


def test_nearest_is_exact_before_there_is_a_file_and_nearly_with_one(store, monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 32))
    rows = (centres[rng.integers(30, size=1500)] + 0.6 * rng.normal(size=(1500, 32))).astype(np.float32)

    class Fixed:
        name, dims = "fixed", 32

        def encode(self, texts):
            return unit(rows[[int(t.split(".")[0]) for t in texts]])

    put(store, [{"title": str(i)} for i in range(1500)])
    exact = unit(to_bytes(rows)) @ unit(to_bytes(rows[:40])).T
    assert catch_up(store, encoder=Fixed()) == 1500
    assert not list(store.folder.glob("*.usearch"))
    index = VectorIndex(store)
    for q in range(40):
        wanted = np.argsort(-exact[:, q], kind="stable")[:10] + 1
        got = index.nearest(to_bytes(rows[q : q + 1])[0], 10)
        np.testing.assert_allclose([cosine for _, cosine in got], exact[wanted - 1, q], atol=1e-5)
    monkeypatch.setattr(vectors_module, "SMALLEST", 1000)
    with store.writing() as session:  # 200 papers change: their new vectors are in the file, or beside an older one
        session.execute(text("INSERT INTO pending SELECT id FROM papers WHERE id <= 200"))
    assert catch_up(store, encoder=Fixed()) == 200
    (file,) = store.folder.glob("*.usearch")
    rows[100] = rows[900]  # one paper more changes after the file was written
    with store.writing() as session:
        session.execute(text("INSERT INTO pending VALUES (101)"))
    monkeypatch.setattr(vectors_module, "SMALLEST", 4096)
    catch_up(store, encoder=Fixed())
    assert list(store.folder.glob("*.usearch")) == [file]
    index = VectorIndex(store)
    exact = unit(to_bytes(rows)) @ unit(to_bytes(rows[:40])).T
    hits = 0
    for q in range(40):
        wanted = set(np.argsort(-exact[:, q], kind="stable")[:10] + 1)
        got = index.nearest(to_bytes(rows[q : q + 1])[0], 10)
        assert len({paper for paper, _ in got}) == 10
        hits += len(wanted & {paper for paper, _ in got})
        for paper, cosine in got:
            assert cosine == pytest.approx(exact[paper - 1, q], abs=0.01)
    assert hits >= 0.95 * 400
    assert {paper for paper, _ in index.nearest(to_bytes(rows[900:901])[0], 2)} == {101, 901}


def test_a_damaged_index_file_is_passed_over(store, monkeypatch):
    monkeypatch.setattr(vectors_module, "SMALLEST", 10)
    put(store, [{"title": f"paper on topic{i % 7} number{i}"} for i in range(60)])
    catch_up(store)
    (file,) = store.folder.glob("*.usearch")
    before = similar(store, 5, size=5)
    file.write_bytes(b"damaged")
    other = s.open_store(str(store.engine.url))
    assert [paper.id for paper, _ in similar(other, 5, size=5)] == [paper.id for paper, _ in before]
    other.close()


def test_catching_up_killed_anywhere_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("corollary.web.search.engine.MiniLM", type("None_", (), {"name": "x"}))
    wanted = None
    for n in (10_000, 4, 8, 11, 13, 15, 17, 19, 21, 23):
        url = f"sqlite:///{tmp_path / f's{n}' / 'daily.sqlite'}"
        opened = s.open_store(url)
        put(opened, [{"title": f"word{i % 9} thing{i % 5} part{i}"} for i in range(80)])
        opened.close()
        killed(n, lambda url=url: catch_up(s.open_store(url)))
        opened = s.open_store(url)
        catch_up(opened)
        with opened.reading() as connection:
            rows = connection.execute(
                select(s.Vector.paper_id, s.Vector.model, s.Vector.vector).order_by(s.Vector.paper_id)
            ).all()
            terms = connection.execute(select(s.Term.term, s.Term.papers).order_by(s.Term.term)).all()
            assert connection.scalar(select(s.Pending.paper_id)) is None
        assert (rows, terms) == (wanted := wanted or (rows, terms)), n
        assert len(rows) == 80
        opened.close()


def pieces_of_words(store):
    """How many pieces the index of words is in, out of the record of its structure as SQLite's fts5_index.c describes it."""
    with store.reading() as connection:
        record = connection.exec_driver_sql("SELECT block FROM words_data WHERE id = 10").scalar_one()
    numbers, value = [], 0
    for byte in record[4:]:  # after the cookie: integers of 7 bits a byte, the last byte of each below 128
        value = value << 7 | byte & 127
        if byte < 128:
            numbers.append(value)
            value = 0
    return numbers[1]


def test_the_index_of_words_comes_into_one_piece(store, monkeypatch):
    monkeypatch.setattr("corollary.web.search.engine._MERGED_AT_ONCE", 1)
    for i in range(6):
        put(store, [{"key": f"b{i}-{j}", "title": f"alpha word{i} thing{j}"} for j in range(50)])
    assert pieces_of_words(store) > 1
    catch_up(store)
    assert pieces_of_words(store) == 1
    put(store, [{"key": "one more", "title": "alpha omega"}])
    catch_up(store)
    assert pieces_of_words(store) == 2, "one paper of 301 is no reason to write everything anew"
    assert [hit.paper.key for hit in search(store, "omega").hits] == ["one more"]
    put(store, [{"key": f"c{j}", "title": f"alpha omega{j}"} for j in range(40)])
    catch_up(store)
    assert pieces_of_words(store) == 1
    assert len(search(store, "alpha", size=100).hits) > 50


def test_vectors_follow_a_change_of_model_and_of_text(store):
    put(store, [{"title": "alpha beta"}, {"title": "gamma delta"}, {"title": "alpha gamma"}])
    assert catch_up(store) == 3
    assert catch_up(store) == 0
    with store.writing() as session:
        session.get_one(s.Paper, 2).title = "alpha beta epsilon"
        session.get_one(s.Paper, 3).own_votes = 4
    assert catch_up(store) == 1
    put_more = [{"key": f"m{i}", "title": f"zeta{i} alpha theta{i % 3}"} for i in range(20)]
    put(store, put_more)
    assert catch_up(store) == 23, "it has grown more than fourfold: fitted again"
    assert len(list(store.folder.glob("lsa-*.npz"))) == 1


# --- the whole


def test_known_items_are_found(issue, record_property):
    recall = {}
    for mode in ("words", "meaning", "fusion"):
        hits = [any(h.paper.slug == q["slug"] for h in search(issue, q["query"], size=5, mode=mode).hits) for q in QUERIES]
        recall[mode] = sum(hits) / len(hits)
        record_property(f"recall@5 {mode}", round(recall[mode], 3))
    assert len(QUERIES) >= 200
    print("recall@5", {mode: round(value, 3) for mode, value in recall.items()})
    assert recall["fusion"] >= 0.95, recall
    assert recall["fusion"] >= max(recall["words"], recall["meaning"]) - 0.005, "fusion costs nothing"


def test_papers_are_found_as_people_ask_for_them(issue):
    def first(query: str, **more) -> str | None:
        hits = search(issue, query, **more).hits
        return hits[0].paper.slug if hits else None

    assert first("arxiv:2410.01623") == "fira"
    assert first("https://arxiv.org/abs/2410.01623v2") == "fira"
    asked = [h.paper.slug for h in search(issue, "low-rank optimizer that saves memory", size=5).hits]
    assert "fira" in asked
    assert first("Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?") == "fira"
    assert first("Rosenfeld Risteski") == "opposing-signals"
    assert first("author:vechev") == "ibp-tightness"
    assert first('author:"Zhewei Yao"') == "adahessian"
    assert first('"neural collapse" imbalanced') == "neural-collapse-linear"
    assert first("grokking") == "grokking"
    result = search(issue, "gradeint codng stragler")
    assert result.hits[0].paper.slug == "gradient-coding"
    assert result.parsed.corrected["codng"] == "coding"
    assert all("low" in (h.paper.title + h.paper.summary).lower() for h in search(issue, '"low rank"').hits)
    assert "spd-batchnorm" not in [h.paper.slug for h in search(issue, "riemannian metric -covariance").hits]
    for paper in s.papers_of_slugs(issue, ["volsdf", "croma", "lion-k"]):
        assert search(issue, paper.summary + " " + paper.title).hits[0].paper.id == paper.id, "a pasted text"


def test_filters_hold_for_every_hit(issue):
    filters = Filters(first=date(2023, 1, 1), last=date(2024, 6, 30))
    found = search(issue, "learning networks gradient", filters, size=100).hits
    assert found
    assert all(date(2023, 1, 1) <= h.paper.day <= date(2024, 6, 30) for h in found)
    only = search(issue, "gradient", Filters(slugs=frozenset({"fira", "adamp", "nothing"})), size=100).hits
    assert {h.paper.slug for h in only} <= {"fira", "adamp"}
    assert search(issue, "gradient", Filters(slugs=frozenset())).hits == []
    assert all(h.paper.code for h in search(issue, "gradient", Filters(has_code=True)).hits)
    assert search(issue, "arxiv:2410.01623", Filters(last=date(2000, 1, 1))).hits == []


def test_categories_are_whole_words(store):
    put(store, [{"title": "a word", "categories": ("cs.LG", "stat.ML")}, {"title": "a word", "categories": ("cs.LGX",)}])
    assert [h.paper.id for h in search(store, "word", Filters(category="cs.LG")).hits] == [1]
    assert [h.paper.id for h in search(store, "word", Filters(category="stat.ML")).hits] == [1]
    assert search(store, "word", Filters(category="%")).hits == []


def test_hits_are_paged_without_gap_or_repeat(issue):
    whole = [h.paper.id for h in search(issue, "learning with gradients", size=100).hits]
    found, after = [], None
    while True:
        page = search(issue, "learning with gradients", size=7, after=after)
        found += [h.paper.id for h in page.hits]
        after = page.next
        if after is None:
            break
    assert found[: len(whole)] == whole
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    "bad", [{"after": "x"}, {"after": "-1"}, {"after": "1000"}, {"size": 0}, {"size": 101}, {"mode": "magic"}]
)
def test_wrong_arguments_are_named(issue, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        search(issue, "x", **bad)


@pytest.mark.parametrize(
    "query",
    ["", " ", '"', '""', "*", "a*", "-", "--", "NOT", "AND OR", "title:", "{title}:x", "NEAR(a b, 3)", "x'; DROP TABLE papers; --", '") OR 1=1', "^a", "a:b:c", "\0", "\ud800", "💥", "字" * 50, "(" * 500, "a " * 5000, "author:", 'author:"', "-everything", "' OR rowid > 0 --", "words MATCH 'x'"],
)  # fmt: skip
def test_syntax_in_a_query_is_only_text(issue, query):
    search(issue, query)
    search(issue, query, Filters(first=date(2000, 1, 1), category=query[:20], slugs=frozenset([query[:20]])))
    assert s.count_papers(issue) >= 135


def test_an_empty_store_finds_nothing(store):
    assert search(store, "anything").hits == []
    assert similar(store, 1) == []
    assert nearest_implemented(store, 1) == []
    assert like_text(store, "x") == []
    assert catch_up(store) == 0


def test_a_new_paper_is_found_by_its_words_at_once(issue, store):
    first_issue(store)
    catch_up(store)
    put(store, [{"key": "new", "title": "Quokka embeddings for everyone"}])
    assert [h.paper.key for h in search(store, "quokka").hits] == ["new"]
    assert search(store, "quoka").parsed.corrected == {}, "not counted yet"
    catch_up(store)
    assert search(store, "quoka").parsed.corrected == {"quoka": "quokka"}
    with store.writing() as session:
        session.delete(session.get_one(s.Paper, search(store, "quokka").hits[0].paper.id))
    assert [h.paper.key for h in search(store, "quokka").hits if h.words_rank] == []


def test_likeness(issue):
    fira = s.get_paper(issue, "fira")
    alike = similar(issue, fira.id, size=8)
    assert fira.id not in {paper.id for paper, _ in alike}
    assert {"frugal", "q-galore"} <= {paper.slug for paper, _ in alike}
    scores = [score for _, score in alike]
    assert scores == sorted(scores, reverse=True)
    near = nearest_implemented(issue, s.get_paper(issue, "opposing-signals").id, size=3)
    from corollary.claims.record import catalogue

    assert len(near) == 3
    assert all(paper.slug in catalogue() for paper, _ in near)
    assert similar(issue, 10**9) == []
    ranked = rank_for(issue, [fira.id], [p.id for p in s.papers_of_slugs(issue, ["croma", "frugal", "volsdf"])])
    assert s.papers_by_id(issue, [ranked[0][0]])[0].slug == "frugal"
    assert rank_for(issue, [], [3, 1, 2]) == [(3, 0.0), (1, 0.0), (2, 0.0)]
    assert like_text(issue, "memory-efficient optimizer with low-rank gradients", size=3)


def test_ranked_again_all_words_come_first_and_only_whole_beginnings_count(store):
    put(store, [
        {"title": "Rank rank", "abstract": "of nothing else"},
        {"title": "A note", "abstract": "An optimizer for a low-rank memory budget"},
        {"title": "Frankly, slow crankshafts", "abstract": "frank optimizers memory"},
        {"title": "Low rank optimizer memory", "abstract": ""},
    ])  # fmt: skip
    parsed = parse("low rank optimizer memory")
    counts = {"rank": 2, "low": 40, "optimizer": 50, "memory": 60}
    with store.reading() as connection:
        assert rerank(connection, [1, 2, 3, 4], parsed, counts) == [4, 2, 1, 3]
        assert rerank(connection, [1, 3], parse("rank"), {"rank": 2}) == [1, 3]
        assert rerank(connection, [3, 2], parse("frank"), {"frank": 1}) == [3, 2]


def test_common_words_are_answered_from_the_newest(store):
    put(store, [{"title": f"common words{i}", "abstract": "common every paper", "day": date(2024, 1, 1) + timedelta(days=i)} for i in range(1500)])  # fmt: skip
    catch_up(store)
    found = search(store, "common every", mode="words", size=100)
    assert len(found.hits) >= 40
    assert min(h.paper.id for h in found.hits) > 1000
    assert search(store, "common words77", mode="words").hits[0].paper.title == "common words77"


def test_searching_from_many_threads_while_papers_come(store):
    put(store, [{"title": f"topic{i % 10} paper{i}"} for i in range(300)])
    catch_up(store)
    errors: list[Exception] = []

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(25):
                assert search(store, f"topic{rng.randrange(10)}").hits
                similar(store, rng.randrange(1, 300))
        except Exception as error:  # noqa: BLE001 - told of in the main thread
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for i in range(5):
        put(store, [{"key": f"n{i}-{j}", "title": f"topic{j} late"} for j in range(10)])
        catch_up(store)
    for thread in threads:
        thread.join()
    assert not errors
    assert any(h.paper.title == "topic3 late" for h in search(store, "topic3 late").hits)


_WORDS = st.sampled_from(["alpha", "beta", "gamma", "delta", "epsilon"])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(_WORDS, min_size=1, max_size=5), min_size=1, max_size=8),
    st.lists(_WORDS, min_size=1, max_size=2, unique=True),
)
def test_words_find_what_a_plain_reading_finds(tmp_path_factory, texts, asked):
    opened = s.open_store(f"sqlite:///{tmp_path_factory.mktemp('w') / 'daily.sqlite'}")
    put(opened, [{"title": " ".join(words)} for words in texts])
    catch_up(opened)
    found = {h.paper.id for h in search(opened, " ".join(asked), mode="words", size=100).hits}
    assert found == {i for i, words in enumerate(texts, 1) if set(words) & set(asked)}
    phrase = {h.paper.id for h in search(opened, f'"{" ".join(asked)}"', mode="words", size=100).hits}
    assert phrase == {i for i, words in enumerate(texts, 1) if f" {' '.join(asked)} " in f" {' '.join(words)} "}
    opened.close()
