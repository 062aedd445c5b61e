"""How verdicts are reached, and the correction over the whole family of tests."""

from __future__ import annotations

from corollary.claims.stats import ALPHA
from corollary.report.html import Html, h, inline, join
from corollary.report.numbers import count, p_value, plain
from corollary.report.plots import holm_plot
from corollary.report.shell import badge, page
from corollary.report.views import STATES, Board

_KINDS = {
    "paired": "Ours against a tuned baseline on the same seed, split and start. Supported when the BCa bootstrap interval of "
    "the mean difference lies beyond the margin and the one-sided sign-flip test gives p < 0.05.",
    "exact": "An identity or a bound over random instances. Passes when the largest error of all trials is within the "
    "tolerance.",
    "slope": "Growth of a cost or an error with size, fitted between logarithms. Supported when the interval of the exponent "
    "lies within the tolerance of the predicted one, and p < 0.05; a one-sided claim binds one side only.",
    "ratio": "Time or bytes against the peer, runs interleaved so that a busy machine slows both. Supported when the interval "
    "of the geometric mean lies beyond the bound, and p < 0.05.",
}


def _family(board: Board) -> Html:
    family = board.family
    if not family:
        return h("p", "No claim with a p value has been measured yet.")
    m = len(family)
    raw = [c.number("p_value") or 0.0 for c in family]
    below = sum(p < ALPHA for p in raw)
    surviving = sum((c.adjusted or 0.0) < ALPHA for c in family)
    fewest = min((int(c.number("pairs") or 0) for c in family), default=0)
    text = join(
        h(
            "p",
            f"The family is every claim of the catalogue whose latest run gave a p value: {m} of ",
            f"{count(len(board.claims), 'claim')}. ",
            f"{below} have p < {ALPHA} by themselves; ",
            h("strong", f"{surviving} after Holm's correction"),
            " over the family. A verdict rests on the claim's own p, as its record announced; the adjusted one is for whoever "
            "picks claims out of the whole catalogue.",
        ),
    )
    limit = None
    least = 0.5 ** min(fewest, 14)  # beyond 14 pairs the test samples that many flips
    if fewest and least * m >= ALPHA:
        limit = h(
            "p",
            f"With {fewest} trials a sign-flip test cannot give less than {p_value(least)}, and {m} times that is not below {ALPHA}: ",
            "in a family of this size claims with so few trials cannot all survive the correction, however large their effects.",
            class_="callout",
        )
    rows = []
    for rank, view in enumerate(family, start=1):
        href = f"papers/{view.paper.slug}.html#{view.claim.id}"
        adjusted = view.adjusted or 0.0
        rows.append(
            h(
                "tr",
                h("td", rank, class_="num"),
                h(
                    "th",
                    h("a", inline(view.claim.statement), href=href),
                    h("span", view.paper.slug, class_="kind"),
                    scope="row",
                ),
                h("td", int(view.number("pairs") or 0), class_="num"),
                h("td", p_value(view.number("p_value")), class_="num"),
                h("td", p_value(adjusted), class_="num"),
                h("td", "yes" if adjusted < ALPHA else "no"),
                h("td", badge(view.state)),
            )
        )
    names = ("Rank", "Claim", "Trials", "p", "Adjusted p", f"Below {ALPHA}", "Verdict")
    heads = [h("th", name, scope="col", class_="num" if i in (0, 2, 3, 4) else None) for i, name in enumerate(names)]
    table = h("table", h("thead", h("tr", heads)), h("tbody", rows), class_="data family")
    scroll = h("div", table, class_="scroll", tabindex="0", role="region", aria_label="p values with Holm's correction")
    return join(text, limit, h("div", holm_plot(raw, ALPHA), class_="plots"), scroll)


def statistics_page(board: Board) -> Html:
    """The page that a verdict's reader needs once."""
    states = [h("div", h("dt", badge(s)), h("dd", s.meaning[:1].upper() + s.meaning[1:] + ".")) for s in STATES[:-1]]
    kinds = [h("div", h("dt", h("code", name)), h("dd", inline(text))) for name, text in _KINDS.items()]
    defects = [c for c in board.claims if c.defect]
    broken = None
    if defects:
        items = [
            h("li", h("a", inline(c.claim.statement), href=f"papers/{c.paper.slug}.html#{c.claim.id}"), f": {c.control_says}")
            for c in defects
        ]
        broken = join(h("p", "These claims are defects now:"), h("ul", items))
    orphans = None
    if board.orphans:
        orphans = h(
            "p",
            f"{count(len(board.orphans), 'stored row')} of claims that no record has any more, shown nowhere else: ",
            join(*[join(", " if i else "", h("code", f"{r['slug']}:{r['claim']}")) for i, r in enumerate(board.orphans)]),
            ".",
        )
    body = join(
        h(
            "section",
            h("h1", "Statistics"),
            h(
                "p",
                "What is asked of a claim stands in its record before it is measured: statement, metric, direction, margin, "
                "baseline, number of pairs, tuning. The baseline gets the same tuning budget as the method.",
                class_="lede",
            ),
            class_="hero",
        ),
        h("section", h("h2", "What a verdict means"), h("dl", states, class_="meanings"), aria_label="What a verdict means"),
        h("section", h("h2", "Four kinds of evidence"), h("dl", kinds, class_="meanings")),
        h(
            "section",
            h("h2", "Controls"),
            h(
                "p",
                "Every claim is measured a second time with the method's key idea broken, and that control must fail. "
                "Where it passes too, or cannot run, the claim's own verdict means nothing, and the claim is shown as a "
                "defect.",
            ),
            broken,
        ),
        h("section", h("h2", "Correction over the catalogue"), _family(board), id="family"),
        h("section", h("h2", "Rows without a record"), orphans) if orphans else None,
    )
    words = f"How verdicts are reached, and Holm's correction at level {plain(ALPHA)}."
    return page("Statistics", body, current="statistics", description=words)
