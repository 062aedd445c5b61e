"""Photographs that ship with scikit-learn and scikit-image, and patches cut from them."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from corollary.data._checks import need_count, need_extra, need_fraction
from corollary.data.split import Split

_COLOUR = MappingProxyType(
    {
        "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
        "skimage": (
            "data",
            ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
             "retina.jpg", "rocket.jpg"),
        ),
    }
)  # fmt: skip
_GREY = ("brick.png", "camera.png", "cell.png", "coins.png", "grass.png", "gravel.png", "moon.png")


def read_image(path: Path) -> Tensor:
    """An image file as (3, height, width) float32 in [0, 1], turned upright by its EXIF; grey gives three equal channels."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255.0)


def _package_folder(package: str, inside: str) -> Path:
    # The files are read where they lie: scikit-image's own loaders may go to the network for what they do not find.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        need_extra(package, "images")
        raise ModuleNotFoundError(f"'{package}' has no folder to read images from", name=package)
    return Path(spec.origin).parent / inside


@cache
def _read(package: str, inside: str, file: str) -> Tensor:
    path = _package_folder(package, inside) / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; this build of {package} ships without it")
    return read_image(path)


def photographs(*, grey: bool = False) -> dict[str, Tensor]:
    """Real photographs and micrographs by name: 10 in colour, between 300 and 1,411 pixels a side.

    Args:
        grey: add 7 grey ones (textures, coins, the moon, ...), as three equal channels.

    Returns:
        Name to (3, height, width) float32 in [0, 1], sorted by name. The tensors are the caller's own.

    Raises:
        ModuleNotFoundError: without scikit-image (extra ``images``).

    Example:
        >>> from corollary.data import photographs
        >>> photos = photographs()
        >>> photos["china"].shape, len(photos)
        (torch.Size([3, 427, 640]), 10)
    """
    wanted = [(package, inside, file) for package, (inside, files) in _COLOUR.items() for file in files]
    if grey:
        wanted += [("skimage", "data", file) for file in _GREY]
    found = {file.rpartition(".")[0]: _read(package, inside, file).clone() for package, inside, file in wanted}
    return dict(sorted(found.items()))


def image_patches(*, size: int = 16, per_image: int = 200, seed: int = 0, test_size: float = 0.3, color: bool = True) -> Split:
    """Patches of photographs; the label says which photograph a patch comes from.

    Each photograph is cut into blocks of ``4 * size`` pixels (less where it is small), the blocks are dealt out to training
    and test part, and a patch lies wholly within one block: no test pixel is ever seen in training. Patches of one part
    may overlap. Some patches are plain sky or black background, so no method gets all of them right.

    Args:
        size: height and width of a patch.
        per_image: patches from each photograph, both parts together.
        seed: deals out the blocks and places the patches.
        test_size: share of the test part, in (0, 1); of the blocks as well as of the patches.
        color: use the 10 colour photographs, with 3 channels; otherwise those and 7 grey ones, all as luminance.

    Returns:
        Patches (n, 3, size, size), or (n, 1, size, size) without ``color``, float32 in [0, 1]; as many from each photograph.

    Raises:
        ModuleNotFoundError: without scikit-image (extra ``images``).
        ValueError: where ``size`` is so large that a photograph has no two blocks, or a part would get no patch.

    Example:
        >>> from corollary.data import image_patches
        >>> split = image_patches(size=8, per_image=10)
        >>> split.train_x.shape, split.test_x.shape, split.classes[:3]
        (torch.Size([70, 3, 8, 8]), torch.Size([30, 3, 8, 8]), ('astronaut', 'chelsea', 'china'))
    """
    need_count("size", size)
    need_count("per_image", per_image, 2)
    need_fraction("test_size", test_size)
    n_test = round(per_image * test_size)
    if not 0 < n_test < per_image:
        raise ValueError(f"'per_image' = {per_image} with test_size={test_size} leaves a part without patches")
    generator = torch.Generator().manual_seed(seed)
    photos = photographs(grey=not color)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for name, photo in photos.items():
        image = photo if color else _luminance(photo)
        blocks = _blocks(name, image.shape[-2], image.shape[-1], size)
        blocks = blocks[torch.randperm(len(blocks), generator=generator)]
        cut = min(max(1, round(len(blocks) * test_size)), len(blocks) - 1)
        for part, own, count in (("test", blocks[:cut], n_test), ("train", blocks[cut:], per_image - n_test)):
            chosen = own[torch.randint(len(own), (count,), generator=generator)]
            room = chosen[:, 2:] - size + 1  # how many places a patch has in its block, down and across
            offset = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * room).long()
            corner = chosen[:, :2] + offset
            step = torch.arange(size)
            rows, columns = corner[:, :1] + step, corner[:, 1:] + step
            parts[part].append(image[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1))
    x = {part: torch.cat(patches) for part, patches in parts.items()}
    y = {part: torch.arange(len(photos)).repeat_interleave(len(patches[0])) for part, patches in parts.items()}
    order = {part: torch.randperm(len(labels), generator=generator) for part, labels in y.items()}
    train, test = order["train"], order["test"]
    return Split(x["train"][train], y["train"][train], x["test"][test], y["test"][test], tuple(photos))


def _luminance(photo: Tensor) -> Tensor:
    """ITU-R 601 luma, (1, height, width); grey stays as it is."""
    return (photo * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True).clamp_(0, 1)


def _blocks(name: str, height: int, width: int, size: int) -> Tensor:
    """Disjoint blocks that cover the image: rows of (top, left, height, width), each at least ``size`` high and wide."""
    side = max(size, min(4 * size, min(height, width) // 4))
    counts = height // side, width // side
    if min(counts) < 1 or counts[0] * counts[1] < 2:
        raise ValueError(
            f"'size' is {size}, but photograph '{name}' of {height} × {width} pixels has no two blocks of that size"
        )
    tops, lefts = (torch.arange(count + 1) * whole // count for count, whole in zip(counts, (height, width), strict=True))
    corners = torch.cartesian_prod(tops[:-1], lefts[:-1])
    extents = torch.cartesian_prod(tops.diff(), lefts.diff())
    return torch.cat([corners, extents], 1)
