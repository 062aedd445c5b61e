"""Data that ships with installed packages, generators with a known truth, loaders for your own files.

Nothing here opens a connection: every set is in a package that is installed, or on your disk.
"""

from corollary.data.digits import digits, tabular
from corollary.data.split import Split
from corollary.data.text import TokenStream, stdlib_text

__all__ = ["Split", "digits", "tabular", "stdlib_text", "TokenStream"]
