"""Images to train and to evaluate on, as two map-style datasets of `(image, label)`.

`image` is float32 of shape (3, size, size), normalised per channel to `(pixel - mean) / std` with `pixel` in [0, 1];
`label` is int64, 0-d, in [0, classes). Held-out images are never seen by training and never augmented, and their order
never changes.

| spec | what it is |
| --- | --- |
| `digits` | 1797 real 8x8 images of handwritten digits that scikit-learn ships, scaled up, grey in three channels |
| `imagefolder:DIR` | `DIR/train/CLASS/*` and `DIR/val/CLASS/*`, or `DIR/CLASS/*` split here; formats: `SUFFIXES` |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qbench.errors import DataError, require

Sample = tuple[Tensor, ...]  # (image, label)

SPECS = ("digits", "imagefolder:DIR")
DIGITS_SIZE = 32
FOLDER_SIZE = 224
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageData:
    """A data set split in two.

    Attributes:
        name: The spec it was loaded from.
        train: What training sees.
        held_out: What every accuracy and every verification is measured on.
        classes: Name of each label.
        image_size: Height and width of every image, in pixels.
    """

    name: str
    train: Dataset[Sample]
    held_out: Dataset[Sample]
    classes: tuple[str, ...]
    image_size: int

    @property
    def example(self) -> Tensor:
        """The first held-out image as a batch of one, (1, 3, size, size)."""
        return self.held_out[0][0].unsqueeze(0)


def load(spec: str, image_size: int | None = None, *, split_seed: int = 0) -> ImageData:
    """Load a data set by its spec.

    Args:
        spec: `"digits"` or `"imagefolder:DIR"`.
        image_size: Height and width in pixels; None takes 32 for digits and 224 for folders.
        split_seed: Which images are held out, where the data does not say so itself. It is apart from the seed of a
            run, so that runs with different seeds are measured on the same images.

    Raises:
        DataError: an unknown spec; a folder that is missing, empty, of a single class, or holds an unreadable image;
            a size below 1.
        MissingDependencyError: scikit-learn (digits) or Pillow (folders) is not installed.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image size {image_size}: expected at least 1 pixel")
    kind, separator, argument = spec.partition(":")
    if kind == "digits" and not separator:
        return digits(image_size or DIGITS_SIZE, split_seed)
    if kind == "imagefolder" and argument:
        return image_folder(Path(argument), image_size or FOLDER_SIZE, split_seed)
    raise DataError(f"data {spec!r} is unknown; expected one of: {', '.join(SPECS)}{_nearest_spec(spec)}")


def samples_in(dataset: Dataset[Sample]) -> int:
    """Samples of a map-style dataset; PyTorch declares no `len` of the base."""
    return len(dataset)  # type: ignore[arg-type]


def batches(
    dataset: Dataset[Sample], batch_size: int, *, seed: int | None = None, workers: int = 0
) -> DataLoader[Sample]:
    """Iterate over a dataset in batches of `(images, labels)`: (batch, 3, size, size) float32 and (batch,) int64.

    Args:
        dataset: Map-style dataset.
        batch_size: Images in a batch.
        seed: Shuffle with this seed, a new order each time it is iterated, and drop the incomplete last batch (BN
            cannot normalise a batch of one). None keeps the order and every image.
        workers: Processes that read images; 0 reads in this one.
    """
    size = samples_in(dataset)
    shuffle = seed is not None
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        generator=generator,
        drop_last=shuffle and size >= batch_size,
        num_workers=workers,
    )


def digits(image_size: int = DIGITS_SIZE, split_seed: int = 0) -> ImageData:
    """scikit-learn's digits, a quarter of every class held out; pixels 0..16 become [-1, 1]."""
    sklearn_datasets = require("sklearn.datasets", extra="data", purpose="load the digits images")
    bunch = sklearn_datasets.load_digits()
    labels = torch.from_numpy(bunch.target).long()
    grey = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8), 0..16 -> -1..1
    train, held_out = stratified_split(bunch.target.tolist(), 0.25, split_seed)
    return ImageData(
        name="digits",
        train=GreyImages(grey[train], labels[train], image_size),
        held_out=GreyImages(grey[held_out], labels[held_out], image_size),
        classes=tuple(str(name) for name in bunch.target_names),
        image_size=image_size,
    )


class GreyImages(Dataset[Sample]):
    """Small grey images, scaled up when asked for: all of them at 224 pixels would be a gigabyte.

    Args:
        grey: (n, 1, height, width) float32.
        labels: (n,) int64.
        image_size: Height and width of what is handed out, in pixels.
    """

    def __init__(self, grey: Tensor, labels: Tensor, image_size: int) -> None:
        self.grey, self.labels, self.image_size = grey, labels, image_size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice) -> Sample:
        """Image (3, size, size) and label; of a slice (n, 3, size, size) and (n,)."""
        grey, size = self.grey[index], (self.image_size, self.image_size)
        batch = grey.reshape(-1, *self.grey.shape[1:])  # (1, height, width) -> (1, 1, height, width)
        scaled = torch.nn.functional.interpolate(batch, size=size, mode="bilinear", align_corners=False)
        images = scaled.repeat(1, 3, 1, 1)
        return images.reshape(*grey.shape[:-3], 3, *size), self.labels[index]


def image_folder(folder: Path, image_size: int = FOLDER_SIZE, split_seed: int = 0) -> ImageData:
    """A folder of images, one subfolder a class; `train` and `val` subfolders are honoured, else a fifth is held out.

    The header of every file is read here, so that a broken file is named before training starts.
    """
    require("PIL.Image", extra="data", purpose="read images")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected {folder}/CLASS/*.png or {folder}/train/CLASS/*.png")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        classes, train = scan(folder / "train")
        held_classes, held_out = scan(folder / "val")
        if classes != held_classes:
            odd = sorted(set(classes) ^ set(held_classes))
            raise DataError(f"{folder}: train and val hold different classes; only one of them has: {', '.join(odd)}")
    else:
        classes, files = scan(folder)
        train_index, held_index = stratified_split([label for _, label in files], 0.2, split_seed)
        train, held_out = [files[i] for i in train_index], [files[i] for i in held_index]
    for path, _ in (*train, *held_out):
        check_header(path)
    return ImageData(
        name=f"imagefolder:{folder}",
        train=ImageFiles(tuple(train), image_size, augment=True),
        held_out=ImageFiles(tuple(held_out), image_size, augment=False),
        classes=classes,
        image_size=image_size,
    )


def stratified_split(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices into two sorted, disjoint lists; of every label `share` (rounded, at least one) goes to the second.

    Raises:
        DataError: a label with a single sample, which cannot be on both sides.
    """
    generator = np.random.default_rng(seed)
    second: list[int] = []
    all_labels = np.asarray(labels)
    for label, count in sorted(Counter(labels).items()):
        if count < 2:
            raise DataError(f"class {label} has {count} image; a split needs at least 2, or train/ and val/ subfolders")
        indices = np.flatnonzero(all_labels == label)
        second.extend(generator.permutation(indices)[: max(1, round(share * count))].tolist())
    chosen = set(second)
    return [i for i in range(len(labels)) if i not in chosen], sorted(second)


def scan(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names (sorted subfolders) and every image file below them with its label.

    Raises:
        DataError: no subfolder, fewer than two, or one without images.
    """
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if not found:
        raise DataError(f"{folder} is empty: expected one subfolder of images per class, {folder}/CLASS/*.png")
    files = [(path, label) for label, name in enumerate(found) for path in _images(name)]
    missing = sorted(set(range(len(found))) - {label for _, label in files})
    if missing:
        kinds = " ".join(sorted(SUFFIXES))
        raise DataError(f"{found[missing[0]]} holds no image (looked for {kinds})")
    if len(found) == 1:
        raise DataError(f"{folder} has a single class, {found[0].name!r}: a classifier needs at least two subfolders")
    return tuple(path.name for path in found), files


def check_header(path: Path) -> None:
    """Read an image's header, not its pixels.

    Raises:
        DataError: Pillow does not know it; the message names the file.
    """
    image_module = require("PIL.Image", extra="data", purpose="read images")
    try:
        with image_module.open(path):
            pass
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({type(error).__name__}); remove it or write it again"
        ) from error


class ImageFiles(Dataset[Sample]):
    """Image files, decoded when asked for.

    Held out: the short side becomes 8/7 of `image_size`, and the centre is taken. Training: a random crop of 35 to
    100 % of the area, mirrored half the time, with torch's random state.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], image_size: int, *, augment: bool) -> None:
        self.files = tuple(files)
        self.image_size = image_size
        self.augment = augment
        self.mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Image (3, size, size) and label.

        Raises:
            DataError: the file's pixels cannot be decoded.
        """
        path, label = self.files[index]
        image = self._decode(path)
        box = _random_box(image.size) if self.augment else _centre_box(image.size)
        image = image.resize((self.image_size, self.image_size), resample=2, box=box)  # 2: bilinear, antialiased
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (size, size, 3) -> (3, size, size)
        if self.augment and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return (pixels - self.mean) / self.std, torch.tensor(label)

    def _decode(self, path: Path) -> Any:
        image_module = require("PIL.Image", extra="data", purpose="read images")
        try:
            with image_module.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} cannot be decoded ({error}); remove it or write it again") from error


def _images(folder: Path) -> Iterator[Path]:
    """Image files of a folder and of the folders below it, in a fixed order."""
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())


def _centre_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The centred square of 7/8 of the short side, as (left, top, right, bottom) in pixels."""
    width, height = size
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A random box of 35 to 100 % of the area and aspect 3/4 to 4/3, cut to the image."""
    width, height = size
    area, aspect, x, y = torch.rand(4).tolist()
    ratio = (3 / 4) ** (1 - 2 * aspect)
    side = (width * height * (0.35 + 0.65 * area)) ** 0.5
    box_width, box_height = min(width, side * ratio**0.5), min(height, side / ratio**0.5)
    left, top = x * (width - box_width), y * (height - box_height)
    return left, top, left + box_width, top + box_height


def _nearest_spec(spec: str) -> str:
    """A hint at what was probably meant."""
    if spec.startswith("imagefolder"):
        return " (imagefolder needs a folder: imagefolder:path/to/images)"
    if Path(spec).is_dir():
        return f" (did you mean imagefolder:{spec}?)"
    near = get_close_matches(spec, ("digits", "imagefolder"), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
