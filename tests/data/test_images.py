"""Photographs and patches: real, in range, and train and test regions that share no pixel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corollary.data import image_patches, images, photographs


def test_photographs_are_what_scikit_learn_loads() -> None:
    from sklearn.datasets import load_sample_image

    china = photographs()["china"]
    theirs = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(china, theirs, atol=2 / 255, rtol=0)


def test_photographs() -> None:
    colour, all_ = photographs(), photographs(grey=True)
    assert set(colour) < set(all_)
    assert list(all_) == sorted(all_)
    for name, photo in all_.items():
        assert photo.dim() == 3
        assert photo.shape[0] == 3
        assert photo.dtype == torch.float32
        assert 0 <= float(photo.min()) < float(photo.max()) <= 1
        assert torch.equal(photo[0], photo[1]) == (name not in colour)
    colour["china"].zero_()
    assert float(photographs()["china"].max()) > 0.5  # the caller's tensor was a copy


@pytest.mark.parametrize("color", [True, False])
def test_patches(color: bool) -> None:
    split = image_patches(size=12, per_image=20, seed=7, color=color)
    n = len(split.classes)
    assert split.train_x.shape == (14 * n, 3 if color else 1, 12, 12)
    assert split.test_x.shape[0] == 6 * n
    assert split.train_y.bincount().tolist() == [14] * n
    assert split.test_y.bincount().tolist() == [6] * n
    again, other = image_patches(size=12, per_image=20, seed=7, color=color), image_patches(size=12, per_image=20, color=color)
    assert torch.equal(split.train_x, again.train_x)
    assert not torch.equal(split.train_x, other.train_x)


@pytest.mark.parametrize(("size", "seed"), [(5, 0), (16, 1), (32, 2)])
def test_train_and_test_pixels_are_disjoint_and_labels_true(size: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs whose pixels carry their own address: a patch then says where it was cut, and from what."""

    def numbered(*, grey: bool) -> dict[str, Tensor]:
        shapes = {"a": (301, 400), "b": (427, 640), "c": (1411, 1411)}
        return {
            name: torch.stack([torch.full((h, w), float(i)), *torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")])
            for i, (name, (h, w)) in enumerate(shapes.items())
        }

    monkeypatch.setattr(images, "photographs", numbered)
    split = image_patches(size=size, per_image=300, seed=seed)
    seen: dict[str, set[tuple[float, ...]]] = {}
    for part in ("train", "test"):
        x, y = getattr(split, f"{part}_x"), getattr(split, f"{part}_y")
        assert torch.equal(x[:, 0, 0, 0], y.float())
        assert torch.equal(x[:, 1] - x[:, 1, :1, :1], torch.arange(size).float()[:, None].expand(len(x), size, size))
        assert torch.equal(x[:, 2] - x[:, 2, :1, :1], torch.arange(size).float()[None, :].expand(len(x), size, size))
        seen[part] = set(map(tuple, x.transpose(0, 1).flatten(1).T.tolist()))
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) > len(seen["test"]) > 1000


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"'size' is 400, but photograph 'astronaut' of 512 × 512 pixels"):
        image_patches(size=400)
    with pytest.raises(ValueError, match="leaves a part without patches"):
        image_patches(per_image=2, test_size=0.1)
    with pytest.raises(TypeError, match="'size' must be an int, not float"):
        image_patches(size=8.0)  # type: ignore[arg-type]


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    images._read.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'corollary\[images\]'"):
        images._read("skimage", "data", "astronaut.png")
