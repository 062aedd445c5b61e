"""MkDocs hook: brings our Markdown extension into the pages and into the docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

HERE = Path(__file__).resolve().parent


@event_priority(100)  # before mkdocstrings takes the list of extensions over
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the scripts of this folder find each other and the tree that they stand in, and add the Markdown extension.

    The paths are set here and not above, because MkDocs puts ``sys.path`` back once it has loaded a hook.
    """
    sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
    from mathml import MathExtension

    config.markdown_extensions.append(MathExtension())  # type: ignore[arg-type]
    return config
