"""The page of one paper: what it is, how to use it, and every claim with all that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from corollary.claims.record import Component
from corollary.claims.stats import ALPHA
from corollary.report.html import Child, Html, h, inline, join, link, prose
from corollary.report.numbers import count, duration, moment, number, p_value, plain
from corollary.report.plots import effect_plot, raw_plot, trial_figure
from corollary.report.scoreboard import arxiv_link
from corollary.report.shell import badge, flags, icon, page
from corollary.report.signatures import read_signature
from corollary.report.views import FAILING, PASSING, Board, ClaimView, PaperView


def _code(text: str) -> Html:
    """A block that the page's script gives a copy button."""
    return h("pre", h("code", text), class_="copy", tabindex="0")


def _terms(pairs: list[tuple[str, Child]], class_: str = "terms") -> Html:
    return h("dl", [h("div", h("dt", name), h("dd", value)) for name, value in pairs if value], class_=class_)


def plain_value(value: Any) -> str:
    """Plain data in a cell: numbers short, the rest as JSON."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**7 else str(value)
    if isinstance(value, float):
        return plain(float(f"{value:.5g}"))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} = {plain_value(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain_value, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _component(component: Component) -> Html:
    found = read_signature(component.object)
    package, _, name = component.object.rpartition(".")
    return h(
        "article",
        h("h3", h("code", h("span", package + ".", class_="soft"), name), h("span", component.kind, class_="tag")),
        h("p", inline(found.doc)) if found.doc else None,
        h("pre", h("code", found.call), tabindex="0") if found.call else None,
        _terms([("Source", component.source), ("Measured against", h("code", component.peer) if component.peer else None)]),
        class_="component",
    )


def _usage(view: PaperView) -> Html:
    by_package: dict[str, list[str]] = {}
    for component in view.paper.components:
        package, _, name = component.object.rpartition(".")
        by_package.setdefault(package, []).append(name)
    imports = "\n".join(f"from {package} import {', '.join(names)}" for package, names in by_package.items())
    command = f"corollary verify {view.paper.slug} --controls"
    return h(
        "section",
        h("h2", "Use it"),
        h(
            "div",
            h("div", h("p", "In Python"), _code(imports)),
            h("div", h("p", "Measure it here"), _code(command)),
            class_="two",
        ),
    )


def _tuned(view: ClaimView) -> Html | None:
    tuned = view.get("tuned") or {}
    if not view.claim.tuning and not tuned:
        return None
    table = None
    if tuned:
        rows = [h("tr", h("th", h("code", k), scope="row"), h("td", plain_value(v))) for k, v in tuned.items()]
        table = h("table", h("caption", "Chosen by the tuning"), h("tbody", rows), class_="data small")
    return h("div", h("h4", "Tuning"), prose(view.claim.tuning), table)


def _control(view: ClaimView) -> Html:
    state = view.control_state
    tone, shape = "soft", "ring"
    if view.defect:
        tone, shape = "bad", "alert"
    elif state is not None and state.key in FAILING:
        tone, shape = "good", "check"
    says = view.control_says
    words = says[:1].upper() + says[1:] + "."
    if view.defect and state is not None and state.key in PASSING:
        words += " The measurement cannot tell the method from its broken form, so the verdict above says nothing."
    return h(
        "div",
        h("h4", "Control"),
        h("p", h("span", "Broken on purpose: ", class_="soft"), inline(view.claim.control)),
        h("p", icon(shape), h("span", words), class_=f"control {tone}"),
        h("p", "Its own verdict: ", badge(state)) if state is not None else None,
        h("p", "Reason: ", inline(str(view.get("control_reason"))), class_="note") if view.get("control_reason") else None,
        class_="control-box" + (" defect" if view.defect else ""),
    )


def _raw_table(view: ClaimView) -> Html | None:
    if not view.trials:
        return None
    names = {"paired": ("ours", "baseline"), "ratio": ("ours", "baseline"), "exact": ("error",), "slope": ()}[view.claim.kind]
    value = {"paired": "ours − baseline", "ratio": "ours / baseline", "exact": "", "slope": "exponent"}[view.claim.kind]
    logged = list(dict.fromkeys(k for t in (*view.trials, *view.control_trials) for k in t.logged))
    heads = ["run", "trial", "seed", *names, *([value] if value else []), *logged, "seconds"]
    rows = []
    for label, trials in (("method", view.trials), ("control", view.control_trials)):
        for t in trials:
            cells: list[Child] = [label, t.index, str(t.seed)]
            cells += [number(float(t.evidence[n]), 4) for n in names]
            cells += [number(t.value, 4)] * bool(value)
            cells += [plain_value(t.logged[k]) if k in t.logged else "" for k in logged]
            cells.append(number(t.seconds) if t.seconds is not None else "")
            rows.append(h("tr", [h("td", c, class_="num" if i > 2 else None) for i, c in enumerate(cells)]))
    columns = [h("th", name, scope="col", class_="num" if i > 2 else None) for i, name in enumerate(heads)]
    head = h("tr", columns)
    table = h("table", h("thead", head), h("tbody", rows), class_="data")
    name = f"Raw values of {view.claim.id}"
    return h(
        "details",
        h("summary", f"Raw values of {count(len(view.trials), 'trial')}"),
        h("div", table, class_="scroll", tabindex="0", role="region", aria_label=name),
    )


def _traceback(view: ClaimView) -> Html | None:
    text = view.get("traceback")
    return h("details", h("summary", "Traceback"), h("pre", h("code", str(text)), tabindex="0")) if text else None


def _origin(view: ClaimView) -> Html | None:
    if view.row is None:
        return None

    def listed(data: Any) -> str:
        return ", ".join(f"{k} {plain_value(v)}" for k, v in data.items()) if isinstance(data, Mapping) else ""

    when = str(view.get("time") or "")
    seed = view.get("seed")
    flag = f" --seed {seed}" if seed is not None else ""
    scale = f" --scale {view.get('scale')}" if view.get("scale") else ""
    facts: list[tuple[str, Child]] = [
        ("When", h("time", moment(when), datetime=when) if when else None),
        ("Took", duration(view.number("seconds")) if view.number("seconds") is not None else None),
        ("Scale", str(view.get("scale") or "")),
        ("Commit", h("code", str(view.get("commit"))[:12]) if view.get("commit") else None),
        ("Source hash", h("code", str(view.get("source_hash"))) if view.get("source_hash") else None),
        ("Machine", listed(view.get("machine"))),
        ("Packages", listed(view.get("packages"))),
    ]
    command = f"corollary verify {view.paper.slug} --controls{scale}{flag}"
    return h(
        "details",
        h("summary", "Where and when it was measured"),
        _terms(facts),
        h("p", "Run it again with the same seeds:"),
        _code(command),
    )


def _numbers(view: ClaimView) -> Html | None:
    if view.effect is None:
        return None
    words, bracket = view.measured
    parts: list[tuple[str, Child]] = [(view.quantity[:1].upper() + view.quantity[1:], h("b", words))]
    if bracket:
        parts.append(("95% interval", bracket))
    if view.number("p_value") is not None:
        parts.append(("Sign-flip p", p_value(view.number("p_value"))))
    if view.adjusted is not None:
        fate = "" if view.adjusted < ALPHA else f" (not below {ALPHA})"
        parts.append(
            ("Adjusted p (Holm)", join(p_value(view.adjusted), fate, " ", h("a", "family", href="../statistics.html#family")))
        )
    if view.number("pairs"):
        parts.append(("Trials", str(int(view.number("pairs") or 0))))
    return _terms(parts, "numbers")


def _claim(view: ClaimView) -> Html:
    claim = view.claim
    plots: list[Html | None] = []
    if view.trials:
        note = h("p", view.rule, class_="note")
        title = "Largest error of each trial" if claim.kind == "exact" else "The effect against its threshold"
        plots.append(h("figure", h("figcaption", h("strong", title), note), effect_plot(view), class_="figure"))
        plots.append(raw_plot(view))
        plots += [trial_figure(name, data) for name, data in (view.get("figures") or {}).items()]
    stale = None
    if view.stale:
        stale = h(
            "p", icon("clock"), h("strong", "Stale. "),
            "The code that this verdict rests on has changed since it was measured.", class_="callout open",
        )  # fmt: skip
    reason = view.get("reason")
    why = h("p", icon("alert"), h("strong", "Reason: "), inline(str(reason)), class_="callout bad") if reason else None
    waiting = None
    if view.row is None:
        waiting = h("p", view.rule, class_="note")
    facts: list[tuple[str, Child]] = [
        ("Kind", claim.kind),
        ("Source", claim.source),
        ("Baseline", inline(claim.baseline) if claim.baseline else None),
        ("Metric", f"{claim.metric} ({claim.better} is better)" if claim.metric and claim.better else claim.metric),
    ]
    anchor = h("a", "#", href=f"#{claim.id}", class_="anchor", aria_label=f"Link to {claim.id}")
    return h(
        "article",
        h(
            "header",
            h(
                "p",
                badge(view.state, large=True),
                flags(view),
                h("span", "on the tour", class_="flag soft") if claim.tour else None,
            ),
            h("h3", inline(claim.statement), " ", anchor, id=f"{claim.id}-name"),
        ),
        stale,
        why,
        _numbers(view),
        _terms(facts),
        waiting,
        h("div", plots, class_="plots") if plots else None,
        h("div", _control(view), _tuned(view), class_="two"),
        h("div", h("h4", "Note"), prose(claim.note), class_="note-box") if claim.note else None,
        _raw_table(view),
        _traceback(view),
        _origin(view),
        id=claim.id,
        class_="claim-box",
        aria_labelledby=f"{claim.id}-name",
    )


def _head(view: PaperView) -> Html:
    paper = view.paper
    facts: list[Child] = [paper.venue or str(paper.year)]
    if paper.venue and str(paper.year) not in paper.venue:
        facts.append(str(paper.year))
    if paper.arxiv:
        facts.append(arxiv_link(paper.arxiv))
    if paper.url:
        facts.append(link("paper", paper.url))
    if paper.code:
        facts.append(link("authors' code", paper.code))
    if len(view.claims) > 1:
        items = [
            h("li", h("a", icon(c.state.icon), inline(c.claim.statement), href=f"#{c.claim.id}", class_=c.state.tone))
            for c in view.claims
        ]
        contents = h("nav", h("ul", items), aria_label="Claims on this page", class_="contents")
    else:
        contents = None
    return h(
        "section",
        h("p", h("a", "Scoreboard", href="../index.html"), " / ",
          h("a", paper.package, href=f"../index.html#package={paper.package}"), class_="crumbs"),
        h("h1", paper.title),
        h("p", ", ".join(paper.authors), class_="authors"),
        h("ul", [h("li", fact) for fact in facts], class_="links"),
        h("div", prose(paper.summary), class_="lede"),
        contents,
        class_="hero",
    )  # fmt: skip


def paper_page(board: Board, index: int) -> Html:
    """The page of the paper at this place of the board."""
    view = board.papers[index]
    paper = view.paper
    deviations = None
    if paper.deviations:
        deviations = h(
            "section", h("h2", "Where we deviate from the paper"), h("ul", [h("li", inline(d)) for d in paper.deviations])
        )
    around = []
    for step, words, rel in ((-1, "Previous", "prev"), (1, "Next", "next")):
        if 0 <= index + step < len(board.papers):
            other = board.papers[index + step].paper
            around.append(h("a", h("span", words), other.title, href=f"{other.slug}.html", rel=rel))
    body = join(
        _head(view),
        _usage(view),
        h("section", h("h2", "Claims"), [_claim(c) for c in view.claims], class_="claims"),
        h("section", h("h2", "Components"), [_component(c) for c in paper.components], class_="components"),
        deviations,
        h("nav", around, aria_label="Other papers", class_="around") if around else None,
    )
    return page(paper.title, body, up="../", description=" ".join(paper.summary.split())[:200])
