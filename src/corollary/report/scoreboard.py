"""The first page: how the claims stand, all papers with their claims, and the filter."""

from __future__ import annotations

from corollary.report.html import Html, h, inline, join, link
from corollary.report.numbers import count, duration, moment
from corollary.report.plots import spark, verdict_bar
from corollary.report.shell import badge, flags, icon, page
from corollary.report.views import FAILING, PASSING, STATES, Board, ClaimView, PaperView

_COLUMNS = ("Claim", "Measured", "Verdict", "Control")


def arxiv_link(arxiv: str) -> Html:
    """A paper's preprint."""
    return link(f"arXiv:{arxiv}", f"https://arxiv.org/abs/{arxiv}")


def short_authors(authors: tuple[str, ...], most: int = 3) -> str:
    """The first few names."""
    return ", ".join(authors) if len(authors) <= most else f"{', '.join(authors[:most])} et al."


def measured_cell(view: ClaimView) -> Html:
    """The effect, its interval, and what it is."""
    words, bracket = view.measured
    if view.effect is None:
        return h("span", "–", h("span", "nothing measured", class_="unseen"), class_="soft")
    return join(h("span", words, class_="effect"), " ", h("span", bracket, class_="ci"), spark(view))


def control_cell(view: ClaimView) -> Html:
    """What the control did."""
    state = view.control_state
    if view.defect:
        return h("span", icon("alert"), view.control_says, class_="control bad")
    if state is None:
        return h("span", view.control_says, class_="control soft")
    shape = "check" if state.key in FAILING else state.icon
    return h("span", icon(shape), view.control_says.removeprefix("control "), class_="control soft", title=state.label)


def _claim_row(view: ClaimView, href: str) -> Html:
    claim = view.claim
    kind = h("span", claim.kind, h("span", f" · {claim.metric}" if claim.metric else None), class_="kind")
    cells = (
        join(h("a", inline(claim.statement), href=f"{href}#{claim.id}", class_="statement"), kind),
        measured_cell(view),
        h("span", badge(view.state), flags(view), class_="badges"),
        control_cell(view),
    )
    return h(
        "tr",
        h("th", cells[0], scope="row", role="rowheader"),
        [h("td", cell, role="cell", data_label=name) for cell, name in zip(cells[1:], _COLUMNS[1:], strict=True)],
        role="row",
        class_="claim",
        data_state=view.state.key,
        data_stale="1" if view.stale else None,
        data_defect="1" if view.defect else None,
    )


def _paper_rows(view: PaperView) -> Html:
    paper = view.paper
    facts = [short_authors(paper.authors), str(paper.year)]
    head = h(
        "tr",
        h(
            "th",
            h("a", paper.title, href=view.href, class_="title"),
            h(
                "span",
                h("span", " · ".join(f for f in facts if f)),
                h("span", paper.package, class_="tag"),
                class_="meta",
            ),
            scope="rowgroup",
            colspan=len(_COLUMNS),
            role="rowheader",
        ),
        role="row",
        class_="paper",
    )
    words = " ".join((paper.slug, paper.summary, *paper.authors, *(c.object for c in paper.components)))
    rows = [_claim_row(claim, view.href) for claim in view.claims]
    return h("tbody", head, rows, role="rowgroup", data_package=paper.package, data_words=words)


def _tally(board: Board) -> Html:
    entries = []
    for state in STATES:
        n = board.counts[state.key]
        if n:
            text = join(icon(state.icon), h("b", n), " ", state.label)
            entries.append(h("li", h("a", text, href=f"#verdict={state.key}", class_=state.tone)))
    bar = verdict_bar([(f"bar-{s.key}", s.label, board.counts[s.key]) for s in STATES])
    return join(bar, h("ul", entries, class_="tally"))


def _headline(board: Board) -> Html:
    claims = board.claims
    measured = [c for c in claims if c.row is not None]
    controls = [c for c in measured if c.control_state is not None]
    sound = [c for c in controls if not c.defect]
    defects, stale = sum(c.defect for c in claims), sum(c.stale for c in claims)
    seconds = sum(c.number("seconds") or 0.0 for c in measured)
    holding = sum(c.state.key in PASSING and not c.defect for c in claims)
    facts = [
        (str(len(board.papers)), "papers" if len(board.papers) != 1 else "paper", None),
        (f"{len(measured)} / {len(claims)}", "claims measured", None),
        (str(holding), "hold at this scale", None),
        (f"{len(sound)} / {len(controls)}", "controls that did not pass", None),
        (duration(seconds) if measured else "–", "of measuring", None),
    ]
    warnings = []
    if defects:
        warnings.append(
            h("li", h("a", icon("alert"), count(defects, "defect"), href="#verdict=defect", class_="flag bad"),
              " whose control passed or could not run: do not trust the verdict")
        )  # fmt: skip
    if stale:
        warnings.append(
            h("li", h("a", icon("clock"), f"{stale} stale", href="#verdict=stale", class_="flag open"),
              " measured before the code changed: run ", h("code", "corollary verify --stale"))
        )  # fmt: skip
    numbers = h("dl", [h("div", h("dt", words), h("dd", value)) for value, words, _ in facts], class_="facts")
    return join(numbers, _tally(board), h("ul", warnings, class_="warnings") if warnings else None)


def _filter(board: Board) -> Html:
    packages = sorted({p.paper.package for p in board.papers})
    verdicts = [(s.key, s.label) for s in STATES if board.counts[s.key]]
    verdicts += [("defect", "defect")] * any(c.defect for c in board.claims)
    verdicts += [("stale", "stale")] * any(c.stale for c in board.claims)

    def choice(name: str, words: str, options: list[tuple[str, str]]) -> Html:
        all_ = h("option", "all", value="")
        select = h("select", all_, [h("option", text, value=value) for value, text in options], name=name, id=f"by-{name}")
        return h("p", h("label", words, for_=f"by-{name}"), select)

    return h(
        "form",
        h(
            "p",
            h("label", "Search", for_="by-q"),
            h("input", type="search", name="q", id="by-q", placeholder="title, author, claim", autocomplete="off"),
            class_="grow",
        ),
        choice("package", "Package", [(p, p) for p in packages]),
        choice("verdict", "Verdict", verdicts),
        h("p", h("button", "Clear", type="reset"), class_="end"),
        h("output", for_="by-q by-package by-verdict", id="shown", aria_live="polite"),
        id="filter",
        role="search",
        aria_label="Filter the claims",
        hidden=True,
    )


def scoreboard_page(board: Board) -> Html:
    """The scoreboard."""
    times = [t for c in board.claims if (t := str(c.get("time") or "")) and moment(t) != t]
    latest = max(times, default="")
    intro = h(
        "p",
        "Each claim was written down before its published run, with its margin, its tuned baseline and "
        "a control that must fail. "
        "A verdict speaks of this scale alone. ",
        h("a", "How verdicts are reached", href="statistics.html"),
        ".",
        class_="lede",
    )
    when = h("p", "Latest measurement ", h("time", moment(latest), datetime=latest), ".", class_="soft") if latest else None
    heads = h("tr", [h("th", c, scope="col", role="columnheader") for c in _COLUMNS], role="row")
    table = h(
        "table",
        h("caption", "All papers and their claims", class_="unseen"),
        h("colgroup", [h("col", class_=f"c-{name.lower()}") for name in _COLUMNS]),
        h("thead", heads, role="rowgroup"),
        [_paper_rows(p) for p in board.papers],
        id="board",
        class_="board",
        role="table",
    )
    empty = None
    if not board.papers:
        empty = h("p", "The catalogue is empty: there is no record to report on.", class_="empty")
    body = join(
        h("section", h("h1", "Scoreboard"), intro, _headline(board), when, class_="hero"),
        h("section", h("h2", "Papers and claims", class_="unseen"), _filter(board), table if board.papers else empty),
        h("p", "No claim matches the filter.", id="none", class_="empty", hidden=True),
    )
    description = f"{count(len(board.papers), 'paper')}, {count(len(board.claims), 'claim')}, and how each of them stands."
    return page("Scoreboard", body, current="scoreboard", description=description, kind="wide")
