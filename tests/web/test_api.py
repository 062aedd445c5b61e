"""The JSON API: Hugging Face's own client works with it, and our fields say what was measured."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from datetime import UTC, datetime

import pytest
import uvicorn
from pydantic import TypeAdapter
from sqlalchemy import select
from tests.web import samples
from tests.web.filled import HERE, filled, page

from corollary.web.api import schemas
from corollary.web.app import create_app
from corollary.web.importers import Importer
from corollary.web.settings import Settings
from corollary.web.store import Paper, Reader, Vote, get_paper, open_store, vote


@pytest.fixture
def full(issue_store, tmp_path):
    store = issue_store
    (tmp_path / "day.json").write_text(json.dumps(samples.HF_DAY))
    Importer(store).run(str(tmp_path / "day.json"))
    return store


@pytest.fixture
def get(full):
    with page(full) as client:
        yield lambda path, status=200, **kw: _checked(client.get(path, **kw), status)


def _checked(answer, status):
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_day_in_their_words(get):
    entries = get("/api/daily_papers?date=2026-05-08")
    entry = next(e for e in entries if e["paper"]["id"] == "2605.00001")
    paper, told = entry["paper"], samples.HF_DAY[0]["paper"]
    assert paper["authors"] == told["authors"]  # users, ids and hidden names as they came
    assert paper["upvotes"] == 41
    assert paper["githubRepo"] == told["githubRepo"]
    assert paper["ai_keywords"] == told["ai_keywords"]
    assert paper["ai_summary"] == told["ai_summary"]
    assert paper["githubStars"] == 7
    assert paper["organization"] == told["organization"]
    assert paper["publishedAt"] == "2026-05-06T17:59:59Z"
    assert paper["submittedOnDailyAt"] == "2026-05-08T00:00:00Z"
    assert (entry["title"], entry["numComments"], entry["isAuthorParticipating"]) == ("Sparse Gardens: Pruning That Grows Back", 3, True)  # fmt: skip
    assert entry["thumbnail"] == samples.HF_DAY[0]["thumbnail"]
    assert [e["paper"]["upvotes"] for e in entries] == sorted((e["paper"]["upvotes"] for e in entries), reverse=True)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/daily_papers?date=2026-05-08", list[schemas.DailyPaper]),
        ("/api/daily_papers?sort=trending", list[schemas.DailyPaper]),
        ("/api/papers/search?q=low-rank+optimizer", list[schemas.DailyPaper]),
        ("/api/corollary/search?q=low-rank+optimizer", schemas.SearchResults),
        ("/api/corollary/similar/fira", list[schemas.Near]),
        ("/api/corollary/nearest/fira", list[schemas.Near]),
        ("/api/papers/fira", schemas.Paper),
    ],
)
def test_answers_are_what_the_description_says(get, path, kind):
    """They are written without the models that describe them."""
    told = get(path)
    assert told
    kind = TypeAdapter(kind)
    assert kind.dump_python(kind.validate_python(told), mode="json", exclude_unset=True) == told


def test_a_paper_says_what_was_measured(get):
    paper = get("/api/papers/arXiv:2410.01623v2")
    ours = paper["corollary"]
    assert ours["method"]["slug"] == "fira"
    assert ours["method"]["hold"] <= ours["method"]["measured"] <= ours["method"]["claims"]
    assert ours["url"] == f"{HERE}/papers/2410.01623"
    assert {near["method"]["slug"] for near in ours["nearest"]}.isdisjoint({"fira"})
    method = get("/api/corollary/methods/fira")
    claim = next(c for c in method["verdicts"] if c["verdict"] == "supported at this scale")
    assert claim["ci_low"] <= claim["effect"] <= claim["ci_high"]
    assert claim["control_verdict"]
    assert claim["p_adjusted"] >= claim["p_value"]
    assert method["imports"].startswith("from corollary.")
    assert get("/api/corollary/methods?q=fira")[0] == method


def test_votes_are_counted_together_and_told_apart(full, get):
    with full.writing() as session:
        session.add(Reader(id=7, name="r"))
    vote(full, 7, get_paper(full, "2605.00001").id)
    paper = get("/api/papers/2605.00001")
    assert paper["upvotes"] == 42
    assert (paper["corollary"]["imported_votes"], paper["corollary"]["own_votes"]) == (41, 1)


def test_lists_and_their_limits(get):
    assert len(get("/api/daily_papers?month=2024-10&limit=2")) == 2
    pages = [e["paper"]["id"] for p in range(4) for e in get(f"/api/daily_papers?month=2024-10&limit=1&p={p}")]
    assert pages == [e["paper"]["id"] for e in get("/api/daily_papers?month=2024-10&limit=4")]
    assert get("/api/daily_papers?week=2024-W40")
    scores = [e["paper"]["corollary"]["score"] for e in get("/api/daily_papers?sort=trending&limit=9")]
    assert scores == sorted(scores, reverse=True)
    assert get("/api/daily_papers?date=1999-01-01") == []
    for path in ("?week=2024-W60", "?month=2024-13", "?month=0000-01"):
        assert " is no " in get(f"/api/daily_papers{path}", 404)["error"]
    for path in ("?date=yesterday", "?limit=0", "?limit=101", "?p=-1", "?sort=x", "?week=24"):
        assert get(f"/api/daily_papers{path}", 422)["details"]
    assert get("/api/papers/9999.99999", 404)["error"] == "there is no paper of this name"


def test_search(get):
    assert "2410.01623" in [e["paper"]["id"] for e in get("/api/papers/search?q=low-rank optimizer that saves memory")]
    found = get("/api/corollary/search?q=optimizer&package=optim&limit=3")
    assert {hit["paper"]["corollary"]["method"]["package"] for hit in found["hits"]} == {"optim"}
    more = get(f"/api/corollary/search?q=optimizer&package=optim&limit=3&after={found['next']}")
    assert not {h["paper"]["id"] for h in found["hits"]} & {h["paper"]["id"] for h in more["hits"]}
    assert get("/api/corollary/search?q=gradeint")["corrected"]
    get("/api/corollary/search?q=x&after=nonsense", 400)
    get("/api/papers/search", 422)


def test_likeness(get):
    near = get("/api/corollary/similar/fira?limit=4")
    assert [n["likeness"] for n in near] == sorted((n["likeness"] for n in near), reverse=True)
    assert len(near) == 4
    assert all(n["method"] for n in get("/api/corollary/nearest/2605.00001?limit=5"))
    days = get("/api/corollary/days?first=2024-10-01&last=2024-10-31")
    assert sum(d["papers"] for d in days) == len(get("/api/daily_papers?month=2024-10&limit=100"))


def test_runs(full):
    with page(full) as client:
        asked = {"slug": "fira", "scale": "smoke"}
        run = client.post("/api/corollary/runs", json=asked)
        assert run.status_code == 201
        assert run.json()["state"] == "queued"
        assert client.post("/api/corollary/runs", json=asked).json()["id"] == run.json()["id"]
        assert client.get(f"/api/corollary/runs/{run.json()['id']}").json()["slug"] == "fira"
        assert client.post(f"/api/corollary/runs/{run.json()['id']}/cancel").json()["state"] == "cancelled"
        assert client.post("/api/corollary/runs", json={"slug": "no-such"}).status_code == 404
        # Another site's page may not start one with the reader's own browser.
        for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            for path in ("/api/corollary/runs", "/api/corollary/import"):
                assert client.post(path, json=asked, headers=headers).status_code == 403
            assert client.get("/api/corollary/export", headers=headers).status_code == 403


def test_export_and_back(full, tmp_path):
    with full.writing() as session:
        session.add(Reader(id=1, name="Zoë"))
        session.flush()
        session.add(Vote(reader_id=1, paper_id=2))
    with page(full, settings=Settings(jobs=False, max_body=50_000_000)) as client:
        whole = client.get("/api/corollary/export")
    other = open_store(f"sqlite:///{tmp_path / 'other' / 'daily.sqlite'}")
    with page(other, settings=Settings(jobs=False, max_body=50_000_000)) as client:
        with other.writing() as session:  # the laptop's own reader has been made already
            session.delete(session.get_one(Reader, 1))
        counts = client.post("/api/corollary/import", content=whole.content)
        assert counts.json()["added"] == len(whole.text.split('{"table":"papers"')) - 1 > 100
        assert client.get("/api/corollary/export").text.splitlines()[1:] == whole.text.splitlines()[1:]
        assert client.post("/api/corollary/import", content=whole.content).json()["added"] == 0
        for body in (b"", b"{}", b"\xff\xfe", whole.content[:-40]):
            assert client.post("/api/corollary/import", content=body).status_code == 400
    other.close()


@pytest.fixture
def lab(full):
    with full.writing() as session:
        for number, (name, more) in enumerate({"keeper": {"admin": True}, "reader": {}}.items(), 11):
            told = {"api_hash": hashlib.sha256(f"{name}-token".encode()).hexdigest(), **more}
            session.add(Reader(id=number, name=name, settings=told))

    def make(**kw):
        return page(full, settings=Settings(address="https://papers.example.org", lab=True, jobs=False, **kw))

    return make


def _as(name):
    return {"authorization": f"Bearer {name}-token"}


def test_a_lab_asks_who_is_there(lab):
    with lab() as client:
        assert client.get("/api/daily_papers").status_code == 200
        assert client.get("/api/corollary/export").status_code == 401
        assert client.get("/api/corollary/export", headers=_as("reader")).status_code == 403
        assert client.get("/api/corollary/export", headers=_as("keeper")).status_code == 200
        assert client.post("/api/corollary/runs", json={"slug": "fira"}).status_code == 401
        assert client.post("/api/corollary/runs", json={"slug": "fira"}, headers=_as("reader")).status_code == 403
    with lab(open_reading=False) as client:
        refused = client.get("/api/daily_papers")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/feeds/papers.atom", headers=_as("reader")).status_code == 200
        assert client.get("/api/daily_papers", headers=_as("reader")).status_code == 200


def test_tokens_cannot_be_guessed_at(lab):
    with lab() as client:
        told = [client.get("/api/corollary/export", headers=_as(str(i))).status_code for i in range(25)]
        assert told == [401] * 20 + [429] * 5
        # A token that someone has for Hugging Face is no guess.
        assert {client.get("/api/daily_papers?limit=1", headers=_as("hf_x")).status_code for _ in range(30)} == {200}


def test_their_own_client_works(full, tmp_path, monkeypatch):
    """`huggingface_hub`, given this server as its endpoint."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(create_app(full, Settings(jobs=False)), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        api = hub.HfApi(endpoint=f"http://127.0.0.1:{port}", token="hf_of_theirs")
        found = next(p for p in api.list_daily_papers(date="2026-05-08") if p.id == "2605.00001")
        assert found.title == "Sparse Gardens: Pruning That Grows Back"
        assert found.published_at == datetime(2026, 5, 6, 17, 59, 59, tzinfo=UTC)
        assert found.submitted_at.date().isoformat() == "2026-05-08"
        assert (found.upvotes, found.comments, found.authors[0].user.fullname) == (41, 3, "Ada Example")
        paper = api.paper_info("2605.00001")
        assert paper.ai_keywords == ["pruning", "regrowth"]
        assert paper.github_repo == "https://github.com/example/gardens"
        assert paper.organization.fullname == "Example Lab"
        assert len(list(api.list_papers(query="pruning", limit=3))) == 3
        assert len(list(api.list_daily_papers(sort="trending", limit=5, p=1))) == 5
        assert list(api.list_daily_papers(date="2026-05-08", submitter="nobody")) == []
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def test_the_page_of_the_api_names_every_address(full):
    with page(full) as client:
        text = client.get("/api").text
        for path in client.get("/api/openapi.json").json()["paths"]:
            assert path in text


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    store = filled(tmp_path / "full")
    with store.writing() as session:
        paper = session.scalar(select(Paper).where(Paper.slug == "fira"))
        paper.extra = {"huggingface": {"paper": {"heat": float("nan")}}}
    with page(store) as client:
        text = client.get("/api/papers/fira").text
    store.close()
    assert "NaN" not in text
    assert json.loads(text)["heat"] is None
