"""Your own files: image folders, CSV, text. What is wrong with one is said in one line that names file and line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from corollary.data._checks import need_choice, need_count
from corollary.data.images import read_image
from corollary.data.split import Split
from corollary.data.tables import split_indices, standardize

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# Formats that run code when they are read, or that may.
_PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill"})


class LoadError(ValueError):
    """A file of the user's cannot be read; the message names the file, the line where there is one, and what would be right."""


def check_path(path: str | Path, kind: str, suffixes: Sequence[str] = ()) -> Path:
    """The path of an existing file (``kind`` 'file'), folder, or either ('path'), which no pickle may be.

    Raises:
        LoadError: where it does not exist, is of the other kind, is pickled, or has another suffix than ``suffixes`` allow.
    """
    path = Path(path)
    if not path.exists():
        near = next((p for p in (path, *path.parents) if p.exists()), Path())
        raise LoadError(f"{path}: no such {'file or folder' if kind == 'path' else kind}; the path exists up to {near}")
    if kind == "file" and path.is_dir():
        raise LoadError(f"{path}: is a folder; give a file")
    if kind == "folder" and not path.is_dir():
        raise LoadError(f"{path}: is a file; give a folder")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(2)
        # A pickle of protocol 2 and up starts with 0x80 and its number; torch's zip archives hold one.
        pickled = len(start) == 2 and start[0] == 0x80 and start[1] <= 5
        if path.suffix.lower() in _PICKLES or pickled:
            raise LoadError(
                f"{path}: is or may hold a pickle, which runs code when it is read; convert it to safetensors or CSV"
            )
        if suffixes and path.suffix.lower() not in suffixes:
            raise LoadError(f"{path}: has suffix '{path.suffix}'; allowed: {', '.join(suffixes)}")
    return path


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise LoadError(f"{path}, line {line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8") from error


def load_text(path: str | Path) -> str:
    """A text file, or every ``.txt`` file below a folder in the order of their names, as one text.

    Args:
        path: a UTF-8 file of any suffix, or a folder.

    Returns:
        The text with ``\\n`` line ends; a folder's files are joined by an empty line.

    Raises:
        LoadError: on a wrong path, a pickle, a file that is not UTF-8, or where there is no text at all.

    Example:
        >>> import tempfile, pathlib
        >>> from corollary.data import load_text
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "a.txt").write_text("To be, or not to be.")
        ...     load_text(folder)
        'To be, or not to be.'
    """
    path = check_path(path, "path")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.txt") if p.is_file())
    if not files:
        raise LoadError(f"{path}: holds no .txt file")
    text = "\n\n".join(_decode(file).replace("\r\n", "\n") for file in files)
    if not text.strip():
        raise LoadError(f"{path}: is empty")
    return text


def load_csv(
    path: str | Path,
    *,
    target: str,
    task: str = "auto",
    seed: int = 0,
    test_size: float = 0.3,
    standardized: bool = True,
    delimiter: str = ",",
) -> Split:
    """A table of numbers with a header and one target column, split into training and test part.

    Args:
        path: a UTF-8 CSV file, its first line the names of the columns.
        target: the name of the column to predict.
        task: ``classification`` (labels are the target's different values, sorted), ``regression`` (float32 targets, in
            their own unit), or ``auto``: regression where every target is a number.
        seed: decides which rows go to which part, and their order.
        test_size: share of the test part, in (0, 1). Classifications are stratified.
        standardized: give each input column mean 0 and variance 1 over the training part.
        delimiter: what stands between cells.

    Returns:
        Inputs (n, columns) float32, in the order of the file's columns without the target.

    Raises:
        LoadError: on a wrong path, a pickle, an empty file, a ragged row, a missing or infinite number, a text among the
            inputs, or a target that is not in the header; the message names the file, the line and the column.

    Example:
        >>> import tempfile, pathlib
        >>> from corollary.data import load_csv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "plants.csv")
        ...     _ = file.write_text("height,width,kind\\n" + "1.0,2.0,fern\\n3.5,1.0,moss\\n" * 5)
        ...     split = load_csv(file, target="kind")
        >>> split.train_x.shape, split.classes
        (torch.Size([7, 2]), ('fern', 'moss'))
    """
    need_choice("task", task, ("auto", "classification", "regression"))
    path = check_path(path, "file")
    header, rows, lines = _read_rows(path, delimiter)
    if target not in header:
        raise LoadError(f"{path}, line 1: has no column '{target}'; it has: {', '.join(header)}")
    at = header.index(target)
    targets = [row.pop(at) for row in rows]
    inputs = header[:at] + header[at + 1 :]
    if not inputs:
        raise LoadError(f"{path}, line 1: has no column beside the target '{target}'")
    x = _numbers(path, rows, lines, inputs)
    if "" in targets:
        raise LoadError(f"{path}, line {lines[targets.index('')]}: column '{target}' is empty")
    classification = task == "classification" or (task == "auto" and not all(_is_number(value) for value in targets))
    classes = tuple(sorted(set(targets))) if classification else ()
    if classification:
        number = {name: i for i, name in enumerate(classes)}
        y = torch.tensor([number[value] for value in targets])
    else:
        y = _numbers(path, [[value] for value in targets], lines, [target]).squeeze(1).to(torch.float32)
    try:
        train, test = split_indices(
            len(x), seed=seed, test_size=test_size, labels=y if classification else None, where=str(path)
        )
    except ValueError as error:
        raise LoadError(str(error)) from error
    train_x, test_x = standardize(x[train], x[test]) if standardized else (x[train], x[test])
    return Split(train_x.to(torch.float32), y[train], test_x.to(torch.float32), y[test], classes)


def _read_rows(path: Path, delimiter: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the line that each row ends on; empty lines are passed over."""
    text = _decode(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if not row:
                continue
            cells = [cell.strip() for cell in row]
            if rows and len(cells) != len(rows[0]):
                raise LoadError(f"{path}, line {reader.line_num}: has {len(cells)} cells; the header has {len(rows[0])}")
            rows.append(cells)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise LoadError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    if len(rows) < 2:
        raise LoadError(f"{path}: {'is empty' if not rows else 'has a header but no row below it'}")
    header = rows[0]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise LoadError(f"{path}, line {lines[0]}: a column's name stands twice: {', '.join(twice)}")
    return header, rows[1:], lines[1:]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(path: Path, rows: list[list[str]], lines: list[int], columns: list[str]) -> Tensor:
    values: list[list[float]] = []
    for row, line in zip(rows, lines, strict=True):
        try:
            found = [float(cell) for cell in row]
        except ValueError:
            column, cell = next((c, cell) for c, cell in zip(columns, row, strict=True) if not _is_number(cell))
            raise LoadError(f"{path}, line {line}: column '{column}' is {cell!r}; it must be a number") from None
        if not all(map(math.isfinite, found)):
            column, cell = next((c, cell) for c, cell in zip(columns, row, strict=True) if not math.isfinite(float(cell)))
            raise LoadError(f"{path}, line {line}: column '{column}' is {cell!r}; it must be finite")
        values.append(found)
    return torch.tensor(values, dtype=torch.float64)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images on disk, one folder for each class (``root/<class>/<anything>.png``, .jpg or .jpeg), read when they are asked for.

    Args:
        root: the folder that holds the classes' folders. Hidden files and files of other kinds are passed over.
        size: scale the shorter side to this many pixels and cut the middle square; without it images keep their own shape.
        color: three channels; otherwise one, the luminance.

    Attributes:
        classes: the folders' names, sorted; a label is a place in it.
        samples: (path, label) of each image, in the order of classes and paths.

    Raises:
        LoadError: on a wrong path, a root without folders, a folder without images, and, when it is read, on a file that is
            no image or, in `split`, has another shape than the first.

    Example:
        >>> import tempfile, pathlib
        >>> import matplotlib.image, numpy
        >>> from corollary.data import ImageFolder
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         pathlib.Path(root, name).mkdir()
        ...         for i in range(4):
        ...             matplotlib.image.imsave(f"{root}/{name}/{i}.png", numpy.zeros((20, 30, 3)))
        ...     images = ImageFolder(root, size=16)
        ...     len(images), images[5][0].shape, images[5][1], images.split(test_size=0.5).train_x.shape
        (8, torch.Size([3, 16, 16]), 1, torch.Size([4, 3, 16, 16]))
    """

    def __init__(self, root: str | Path, *, size: int | None = None, color: bool = True) -> None:
        if size is not None:
            need_count("size", size)
        self.root = check_path(root, "folder")
        self.size = size
        self.color = color
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise LoadError(f"{self.root}: holds no folder; put the images of each class in a folder of its name")
        self.classes = tuple(folder.name for folder in folders)
        self.samples: list[tuple[Path, int]] = []
        for label, folder in enumerate(folders):
            found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
            if not found:
                raise LoadError(f"{folder}: holds no image; allowed: {', '.join(IMAGE_SUFFIXES)}")
            self.samples += [(path, label) for path in found]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self._read(path), label

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[i] for i in range(len(self)))

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            image = read_image(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise LoadError(f"{path}: cannot be read as an image: {error}") from error
        if not self.color:
            image = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True).clamp_(0, 1)
        if self.size is None:
            return image
        height, width = image.shape[-2:]
        scale = self.size / min(height, width)
        shape = max(self.size, round(height * scale)), max(self.size, round(width * scale))
        image = F.interpolate(image[None], shape, mode="bilinear", align_corners=False, antialias=True)[0].clamp_(0, 1)
        top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
        return image[:, top : top + self.size, left : left + self.size]

    def split(self, *, seed: int = 0, test_size: float = 0.3) -> Split:
        """Every image in memory, split and stratified: images (n, channels, height, width) float32 in [0, 1]."""
        labels = torch.tensor([label for _, label in self.samples])
        try:
            train, test = split_indices(len(self), seed=seed, test_size=test_size, labels=labels, where=str(self.root))
        except ValueError as error:
            raise LoadError(str(error)) from error
        images = []
        for path, _ in self.samples:
            images.append(self._read(path))
            if images[-1].shape != images[0].shape:
                raise LoadError(
                    f"{path}: has shape {tuple(images[-1].shape)}, {self.samples[0][0]} has {tuple(images[0].shape)}; "
                    f"give 'size' to bring them to one"
                )
        x = torch.stack(images)
        return Split(x[train], labels[train], x[test], labels[test], self.classes)
