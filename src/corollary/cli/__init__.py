"""The command line: ``corollary``."""

from corollary.cli.main import main

__all__ = ["main"]
