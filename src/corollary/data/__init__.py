"""Data that ships with installed packages, generators with a known truth, loaders for your own files.

Nothing here opens a connection: every set is in a package that is installed, or on your disk.
"""

from corollary.data.checkpoint_layout import TensorSpec, WriteError
from corollary.data.checkpoint_writer import CheckpointWriter
from corollary.data.checkpoints import SafetensorsFile, load_safetensors
from corollary.data.clicks import ClickLog, click_log
from corollary.data.docstrings import stdlib_docstrings
from corollary.data.generators import low_rank_matrix, spectrum_matrix
from corollary.data.images import image_patches, photographs
from corollary.data.loaders import ImageFolder, LoadError, load_csv, load_text
from corollary.data.pretrained import hidden_states, minilm
from corollary.data.split import Split
from corollary.data.tables import digits, tabular
from corollary.data.tensor_stream import Checkpoint, open_checkpoint
from corollary.data.text import TokenStream, stdlib_text

__all__ = [
    "Split",
    "digits",
    "tabular",
    "image_patches",
    "photographs",
    "stdlib_text",
    "TokenStream",
    "stdlib_docstrings",
    "minilm",
    "hidden_states",
    "click_log",
    "ClickLog",
    "low_rank_matrix",
    "spectrum_matrix",
    "ImageFolder",
    "load_csv",
    "load_text",
    "load_safetensors",
    "SafetensorsFile",
    "open_checkpoint",
    "Checkpoint",
    "CheckpointWriter",
    "TensorSpec",
    "WriteError",
    "LoadError",
]
