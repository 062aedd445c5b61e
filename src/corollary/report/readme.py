"""The scoreboard of the published results, put into a README: ``python -m corollary.report.readme README.md [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from corollary.claims.record import catalogue
from corollary.claims.store import Store, latest_verdicts, published_results
from corollary.report.markdown import scoreboard_markdown

BEGIN, END = "<!-- scoreboard -->", "<!-- /scoreboard -->"


def put_between(text: str, table: str) -> str:
    """The text with the table between the two markers, instead of what stood there.

    Raises:
        ValueError: the markers do not stand there once each, in order.

    Example:
        >>> print(put_between("a\\n<!-- scoreboard -->\\nold\\n<!-- /scoreboard -->\\nb", "new\\n"))
        a
        <!-- scoreboard -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- /scoreboard -->
        b
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head + tail:
        raise ValueError(f"needs one '{BEGIN}' and after it one '{END}'")
    return f"{head}{BEGIN}\n\n{table}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the file, or with ``--check`` say whether it is up to date; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m corollary.report.readme", description=__doc__)
    parser.add_argument("file", type=Path, help="the README")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file is out of date")
    options = parser.parse_args(arguments)
    papers = catalogue()
    table = scoreboard_markdown(papers, latest_verdicts(list(papers.values()), [Store(published_results())]))
    try:
        before = options.file.read_text(encoding="utf-8")
        after = put_between(before, table)
        if after != before and not options.check:
            temporary = options.file.with_name(f".{options.file.name}.tmp")
            temporary.write_text(after, encoding="utf-8")
            temporary.replace(options.file)
    except (OSError, ValueError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)  # noqa: T201 - a command speaks here
        return 2
    if options.check and after != before:
        print(f"{options.file}: the scoreboard is out of date; run 'make scoreboard'", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
