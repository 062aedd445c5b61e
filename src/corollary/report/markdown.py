"""The scoreboard as a Markdown table, for a README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from corollary.claims.record import Paper
from corollary.report.views import ClaimView, build_board


def _cell(text: str) -> str:
    """Text in a table's cell: one line, and nothing in it is markup."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|<>~#&])", r"\\\1", flat)


def _address(paper: Paper) -> str:
    address = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url or paper.code
    return address if re.fullmatch(r"https?://[^\s()<>|]+", address) else ""


def _control(view: ClaimView) -> str:
    state = view.control_state
    if view.defect:
        return f"**{view.control_says}**"
    return "" if view.row is None else view.control_says if state is None else view.control_says.removeprefix("control ")


def scoreboard_markdown(papers: Mapping[str, Paper], rows: Sequence[Mapping[str, Any]]) -> str:
    """One table of all claims: paper, package, claim, measured effect with its 95% interval, verdict, control.

    Args:
        papers: records by slug, in the order in which they are to be shown.
        rows: verdict rows; where several stand for one claim, the last one counts.

    Returns:
        Markdown that ends in a newline. A paper's name stands on its first row only.

    Example:
        >>> print(scoreboard_markdown({}, []), end="")
        | Paper | Package | Claim | Measured | Verdict | Control |
        |---|---|---|---|---|---|
    """
    lines = ["| Paper | Package | Claim | Measured | Verdict | Control |", "|---|---|---|---|---|---|"]
    for view in build_board(papers, rows).papers:
        paper = view.paper
        address = _address(paper)
        title = f"[{_cell(paper.title)}]({address})" if address else _cell(paper.title)
        for i, claim in enumerate(view.claims):
            words, bracket = claim.measured
            measured = f"{words} {_cell(bracket)}".strip() if claim.effect is not None else ""
            verdict = f"{claim.state.mark} {claim.state.label}" + (" (stale)" if claim.stale else "")
            names = (title, f"`{paper.package}`") if i == 0 else ("", "")
            cells = (*names, _cell(claim.claim.statement), measured, _cell(verdict), _control(claim))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
