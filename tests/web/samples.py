"""Answers in the documented shapes of the sources, made up for the tests."""

from __future__ import annotations

import json
from typing import Any

HF_DAY: list[dict[str, Any]] = [
    {
        "paper": {
            "id": "2605.00001",
            "authors": [
                {"_id": "a1", "name": "Ada Example", "hidden": False, "user": {"user": "ada", "fullname": "Ada Example"}},
                {"_id": "a2", "name": "Bo Sample", "hidden": False},
                {"_id": "a3", "name": "Withdrawn Name", "hidden": True},
            ],
            "publishedAt": "2026-05-06T17:59:59.000Z",
            "submittedOnDailyAt": "2026-05-08T00:30:00.000Z",
            "title": "Sparse\n  Gardens: Pruning That Grows Back",
            "summary": "We prune weights and\nlet them regrow.",
            "upvotes": 41,
            "githubRepo": "https://github.com/example/gardens",
            "githubRepoAddedBy": "auto",
            "ai_keywords": ["pruning", "regrowth"],
            "ai_summary": "Pruning with regrowth.",
            "githubStars": 7,
            "organization": {
                "_id": "o1",
                "name": "example-lab",
                "fullname": "Example Lab",
                "avatar": "https://cdn.example.org/a.png",
            },
        },
        "publishedAt": "2026-05-08T04:00:00.000Z",
        "title": "Sparse Gardens: Pruning That Grows Back",
        "thumbnail": "https://cdn.example.org/t.png",
        "numComments": 3,
        "isAuthorParticipating": True,
    },
    {"paper": {"id": "2605.00002", "title": "The Least That Is Given"}},
    {"paper": {"id": "2605.00003", "title": "", "summary": "no title"}},
    {"paper": {"id": "2605.00004", "title": "Votes as text", "upvotes": "many"}},
    {"paper": {"id": "2605.00005", "title": "A link that bites", "githubRepo": "javascript:alert(1)"}},
    {"paper": "not an object"},
]
HF_BAD = 4

_ENTRY = """
  <entry>
    <id>http://arxiv.org/abs/{id}</id>
    <updated>{updated}</updated>
    <published>{published}</published>
    <title>{title}</title>
    <summary>  {summary}
    </summary>
    <author><name>Ada Example</name><arxiv:affiliation xmlns:arxiv="http://arxiv.org/schemas/atom">Example Lab</arxiv:affiliation></author>
    <author><name>Émile Étude</name></author>
    <arxiv:doi xmlns:arxiv="http://arxiv.org/schemas/atom">10.1000/Example.7</arxiv:doi>
    <link title="doi" href="http://dx.doi.org/10.1000/Example.7" rel="related"/>
    <arxiv:comment xmlns:arxiv="http://arxiv.org/schemas/atom">12 pages; code at https://github.com/example/flow.</arxiv:comment>
    <arxiv:journal_ref xmlns:arxiv="http://arxiv.org/schemas/atom">Eur.Phys.J. C31 (2003) 17-29</arxiv:journal_ref>
    <link href="http://arxiv.org/abs/{id}" rel="alternate" type="text/html"/>
    <link title="pdf" href="http://arxiv.org/pdf/{id}" rel="related" type="application/pdf"/>
    <arxiv:primary_category xmlns:arxiv="http://arxiv.org/schemas/atom" term="cs.LG" scheme="http://arxiv.org/schemas/atom"/>
    <category term="cs.LG" scheme="http://arxiv.org/schemas/atom"/>
    <category term="stat.ML" scheme="http://arxiv.org/schemas/atom"/>
  </entry>"""

ERROR_ENTRY = """
  <entry>
    <id>http://arxiv.org/api/errors#incorrect_id_format_for_1234.12345</id>
    <title>Error</title>
    <summary>incorrect id format for 1234.12345</summary>
    <updated>2007-10-12T00:00:00-04:00</updated>
    <link href="http://arxiv.org/api/errors#incorrect_id_format_for_1234.12345" rel="alternate" type="text/html"/>
    <author><name>arXiv api core</name></author>
  </entry>"""


def entry(name: str, title: str = "Flows on Graphs", summary: str = "We study flows.", published: str = "2003-07-07T13:46:39-04:00", updated: str = "2003-07-08T13:46:39-04:00") -> str:  # fmt: skip
    """One entry of the arXiv API."""
    return _ENTRY.format(id=name, title=title, summary=summary, published=published, updated=updated)


def atom(entries: list[str], total: int | None = None, start: int = 0) -> bytes:
    """One answer of the arXiv API."""
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom">
  <link href="http://arxiv.org/api/query?search_query%3Dcat:cs.LG" rel="self" type="application/atom+xml"/>
  <title type="html">ArXiv Query: search_query=cat:cs.LG</title>
  <id>http://arxiv.org/api/cHxbiOdZaP56ODnBPIenZhzg5f8</id>
  <updated>2026-05-08T00:00:00-04:00</updated>
  <opensearch:totalResults xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">{len(entries) if total is None else total}</opensearch:totalResults>
  <opensearch:startIndex xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">{start}</opensearch:startIndex>
  <opensearch:itemsPerPage xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">{len(entries)}</opensearch:itemsPerPage>
  {"".join(entries)}
</feed>""".encode()


RSS = b"""<?xml version="1.0"?>
<rss version="2.0" xmlns:dc="http://purl.org/dc/elements/1.1/"><channel><title>cs.LG updates</title><link>http://rss.arxiv.org/rss/cs.LG</link>
<item><title>Rivers of Tokens</title><link>https://arxiv.org/abs/2605.01234</link>
<description>arXiv:2605.01234v2 Announce Type: new
Abstract: Tokens &lt;b&gt;flow&lt;/b&gt; &amp;amp; merge.</description>
<guid isPermaLink="false">oai:arXiv.org:2605.01234v2</guid><category>cs.LG</category><category>cs.CL</category>
<pubDate>Fri, 08 May 2026 00:00:00 -0400</pubDate><dc:creator>Ada Example, Bo Sample</dc:creator></item>
<item><title>A note from a blog</title><link>https://blog.example.org/notes/1</link><description>Hello &lt;script&gt;alert(1)&lt;/script&gt;</description>
<pubDate>Thu, 07 May 2026 10:00:00 GMT</pubDate></item>
<item><link>https://blog.example.org/notes/2</link><description>no title</description></item>
</channel></rss>"""

ATOM_FEED = b"""<?xml version="1.0"?><feed xmlns="http://www.w3.org/2005/Atom"><title>Blog</title><id>urn:x</id><updated>2026-05-08T00:00:00Z</updated>
<entry><title>Letters from a Lab</title><id>urn:x:1</id><link href="https://lab.example.org/letters"/><updated>2026-05-01T00:00:00Z</updated>
<author><name>Cy Person</name></author><content type="html">&lt;p&gt;A long letter.&lt;/p&gt;</content></entry></feed>"""

BIBTEX = r"""
@string{icml = "International Conference on Machine Learning"}
@article{fermat,
  title = {On the {E}quation of {\'E}tude and $x^n$},
  author = {Fermat, Pierre de and Example, Ada and others},
  year = 1994, month = may, journal = "arXiv preprint arXiv:hep-th/9405001",
}
@inproceedings{gardens, title={Gardens}, author={Bo Sample}, booktitle=icml, year={2025}, doi={10.1000/XYZ},
  url={https://example.org/gardens}, keywords={pruning, growth}}
@misc{eprinted, title={Eprinted}, author={Dee, D.}, eprint={2401.00001v2}, archivePrefix={arXiv}, primaryClass={cs.LG}}
@article{broken, title = {No end
@article{yearless, title={Yearless}, author={A B}}
"""

JSONL = "\n".join(
    [
        json.dumps({"title": "Plain", "arxiv": "2604.00001v1", "authors": ["A B"], "abstract": "x", "date": "2026-04-01", "mine": {"k": [1]}}),
        json.dumps({"id": "local-7", "title": "Local", "year": 2025, "authors": "A B; C D", "votes": 3}),
        json.dumps({"paper": {"id": "2604.00002", "title": "Wrapped", "upvotes": 1}}),
        "{broken",
        json.dumps(["a", "list"]),
        json.dumps({"title": "x" * 3000}),
        json.dumps({"title": "No such day", "date": "2026-13-45"}),
        "",
    ]
)  # fmt: skip
JSONL_BAD = 4
