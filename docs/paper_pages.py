"""One page for each paper, out of its record and its latest published verdicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from corollary.claims.record import Component, Paper
from corollary.report.numbers import duration, moment, number, p_value
from corollary.report.views import FAILING, PASSING, Board, ClaimView, PaperView


def text(words: str) -> str:
    """Words of a record on one line, in which backticks and dollars keep their meaning and nothing else is markup."""
    flat = " ".join(words.split()).replace("``", "`")
    # Character references, because Markdown lets only some characters be escaped by a backslash.
    pieces = re.split(r"(`[^`]+`|\$[^$]+\$)", flat)
    return "".join(p if i % 2 else re.sub(r"[\\*_\[\]|<>&~#]", lambda m: f"&#{ord(m[0])};", p) for i, p in enumerate(pieces))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def link(words: str, address: str) -> str:
    """A link to a web address; anything else stays words, so that a record cannot plant a script."""
    return f"[{text(words)}]({address})" if re.fullmatch(r"https?://[^\s()<>|\"]+", address) else text(words)


def _badge(view: ClaimView) -> str:
    tone = "holds" if view.state.key in PASSING else "fails" if view.state.key in FAILING else "open"
    stale = ' <span class="open">(stale)</span>' if view.stale else ""
    return f'<span class="verdict {tone}">{view.state.mark} {view.state.label}</span>{stale}'


def _measured(view: ClaimView) -> str:
    effect, interval = view.measured
    return "" if view.number("effect") is None else f"{effect} {text(interval)}".strip()


def _component_rows(components: tuple[Component, ...]) -> list[list[str]]:
    rows = []
    for c in components:
        peer = f"`{c.peer}`" if re.fullmatch(r"[\w.]+", c.peer) else text(c.peer)
        rows.append([f"[`{c.object}`][{c.object}]", c.kind, text(c.source), peer])
    return rows


def _claim(view: ClaimView, family: int) -> str:
    claim, row = view.claim, view.row
    lines = [f"### {text(claim.statement)} {{ #{claim.id} }}\n", f"`{claim.id}` · {text(claim.source)} · {_badge(view)}\n"]
    if view.stale:
        lines.append("The code that this verdict rests on has changed since it was measured.\n")
    if view.get("reason"):
        lines.append(f"It could not run: {text(str(view.get('reason')))}\n")
    facts = [("How it is judged", view.rule)]
    if view.adjusted is not None:
        adjusted = p_value(view.adjusted)
        facts.append(("p value", f"{p_value(view.number('p_value'))}; {adjusted} after Holm's correction over {family} claims"))
    facts += [("Baseline", text(claim.baseline))] if claim.baseline else []
    facts += [("Tuning", text(claim.tuning))] if claim.tuning else []
    control = text(claim.control)
    if row is not None:
        effect = view.number("control_effect")
        shown = f" ({view.quantity}: {number(effect)}{view.unit})" if effect is not None else ""
        control += f" — **{view.control_says}**{shown}"
    facts.append(("Control, broken on purpose", control))
    facts += [("Note", text(claim.note))] if claim.note else []
    if row is not None:
        machine = view.get("machine") or {}
        facts.append((
            "Run",
            f"{moment(str(view.get('time')))}, scale {view.get('scale')}, seed {view.get('seed')}, commit `{view.get('commit')}`, "
            f"{machine.get('processor', 'unknown processor')}, {machine.get('cores', '?')} cores, "
            f"{duration(view.number('seconds'))} with the control",
        ))  # fmt: skip
    lines += [f"{term}\n:   {words}\n" for term, words in facts]
    lines.append(_raw(view))
    return "\n".join(lines)


def _raw(view: ClaimView) -> str:
    if not view.trials:
        return ""
    names = {"paired": ["ours", "baseline"], "ratio": ["ours", "baseline"], "exact": [], "slope": []}[view.claim.kind]
    rows = [
        [arm, str(t.seed), *(number(float(t.evidence[name]), 4) for name in names), number(t.value, 4)]
        for arm, trials in (("method", view.trials), ("control", view.control_trials))
        for t in trials
    ]
    body = table(["arm", "seed", *names, text(view.quantity)], rows)
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return f'??? note "Raw values of {len(view.trials)} trials"\n\n{indented}\n'


def _page(view: PaperView, family: int) -> str:
    paper = view.paper
    facts = [text(", ".join(paper.authors)), text(paper.venue) if paper.venue else str(paper.year)]
    facts += [link(f"arXiv {paper.arxiv}", f"https://arxiv.org/abs/{paper.arxiv}")] if paper.arxiv else []
    facts += [link("paper", paper.url)] if paper.url else []
    facts += [link("authors' code", paper.code)] if paper.code else []
    by_package: dict[str, list[str]] = {}
    for component in paper.components:
        package, _, name = component.object.rpartition(".")
        by_package.setdefault(package, []).append(name)
    imports = "\n".join(f"from {package} import {', '.join(names)}" for package, names in by_package.items())
    claims = [
        [
            f"[{text(c.claim.statement)}](#{c.claim.id})<br><small>{text(c.claim.source)}</small>",
            _measured(c),
            p_value(c.number("p_value")) if c.number("p_value") is not None else "",
            str(int(c.number("pairs") or 0)) if c.row is not None else "",
            text(c.control_says),
            _badge(c),
        ]
        for c in view.claims
    ]
    module, package = paper.slug.replace("-", "_"), paper.package
    deviations = "\n".join(f"- {text(d)}" for d in paper.deviations) or "None on record."
    return f"""# {text(paper.title)}

{" · ".join(facts)}

{text(paper.summary)}

```python
{imports}
```

## Claims and verdicts

{table(["Claim and its source", "Measured [95% interval]", "p", "Trials", "Control", "Verdict"], claims)}
What a verdict says, and what it does not: [How verdicts are made](../verdicts.md).

## Components

{table(["Component", "Kind", "Source in the paper", "Measured against"], _component_rows(paper.components))}
## Each claim

{chr(10).join(_claim(c, family) for c in view.claims)}
## Where we deviate from the paper

{deviations}

## Run it

```sh
corollary verify {paper.slug} --controls                 # every claim of this paper and its control
corollary verify {paper.slug}:{paper.claims[0].id} --seed 1    # one claim, on seeds of your choice
corollary verify {paper.slug} --scale smoke               # seconds; proves that it runs, gives no verdict
pytest tests/{package}/test_{module}.py          # the oracle tests of its components
python -m benchmarks {module}                    # its speed and memory against its peers
```

??? note "How it is measured: `{paper.module}`"

    ```python
{_source(paper)}
    ```
"""


def _source(paper: Paper) -> str:
    code = paper.path.with_suffix(".py").read_text(encoding="utf-8").rstrip()
    return "\n".join(f"    {line}".rstrip() for line in code.splitlines())


def _index(board: Board) -> str:
    rows = []
    for view in board.papers:
        paper = view.paper
        marks = " ".join(f'<span title="{text(c.claim.statement)}">{c.state.mark}</span>' for c in view.claims)
        rows.append([f"[{text(paper.title)}]({paper.slug}.md)", paper.package, str(paper.year), marks])
    legend = {c.state.mark: c.state.label for c in board.claims}
    key = ", ".join(f"{mark} {label}" for mark, label in legend.items())
    return f"# Papers\n\n{table(['Paper', 'Package', 'Year', 'Claims'], rows)}\n{key}\n"


def paper_pages(board: Board) -> dict[str, str]:
    """Every page below ``papers/``, by its name."""
    pages = {f"papers/{view.paper.slug}.md": _page(view, len(board.family)) for view in board.papers}
    pages["papers/index.md"] = _index(board)
    entries = ["- [Catalogue](index.md)"]
    for package in dict.fromkeys(view.paper.package for view in board.papers):
        entries.append(f"- {package}")
        entries += [f"    - [{v.paper.slug}]({v.paper.slug}.md)" for v in board.papers if v.paper.package == package]
    pages["papers/SUMMARY.md"] = "\n".join(entries) + "\n"
    return pages


def component_table(papers: Mapping[str, Paper], package: str) -> str:
    """The components of one package that papers have registered."""
    rows: list[list[Any]] = []
    for paper in papers.values():
        for c in paper.components:
            if c.object.startswith(f"corollary.{package}."):
                name = c.object.rpartition(".")[2]
                rows.append([f"[`{name}`][{c.object}]", c.kind, f"[{text(paper.title)}](../papers/{paper.slug}.md)"])
    return table(["Component", "Kind", "Paper"], rows) if rows else ""
