"""The report: static pages that show how every claim stands, from records and stored rows alone.

Nothing here imports torch or a paper's module; signatures are read from the components' source.
"""

from __future__ import annotations

from corollary.report.markdown import scoreboard_markdown
from corollary.report.write import ReportError, check_folder, write_report

__all__ = ["ReportError", "check_folder", "scoreboard_markdown", "write_report"]
