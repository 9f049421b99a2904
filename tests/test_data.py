"""Data sets: what is in them, how they are split, and which message a broken folder gets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from qbench import data
from qbench.errors import DataError

sklearn_datasets = pytest.importorskip("sklearn.datasets")
image_module = pytest.importorskip("PIL.Image")


def write_image(path: Path, *, size: tuple[int, int] = (12, 9), level: int = 128) -> None:
    """A grey RGB image of (width, height) `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.new("RGB", size, (level, level, level)).save(path)


def write_folder(folder: Path, classes: dict[str, int]) -> Path:
    """One subfolder a class with that many images, each of its own grey level."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_image(folder / name / f"{index}.png", level=20 * number + index)
    return folder


def labels_of(dataset: torch.utils.data.Dataset[data.Sample]) -> list[int]:
    """Every label of a map-style dataset."""
    return [int(dataset[i][1]) for i in range(len(dataset))]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits")


def test_digits_are_scikit_learns_images_scaled_up(digits: data.ImageData) -> None:
    assert (len(digits.train), len(digits.held_out)) == (1347, 450)
    assert digits.example.shape == (1, 3, 32, 32)
    assert digits.example.dtype == torch.float32
    stacked = torch.stack([digits.held_out[i][0] for i in range(450)])
    assert (stacked.min().item(), stacked.max().item()) == (-1.0, 1.0)
    # At 8 px nothing is interpolated: the pixels are scikit-learn's own, 0..16 as -1..1.
    small = data.load("digits", image_size=8)
    originals = {image.astype(np.float32).tobytes() for image in sklearn_datasets.load_digits().images}
    assert all(((small.train[i][0][0] + 1) * 8).numpy().tobytes() in originals for i in range(50))


def test_digits_are_scaled_up_one_by_one_as_all_at_once() -> None:
    large = data.load("digits", image_size=224).held_out
    images, labels = large[3:9]
    assert images.shape == (6, 3, 224, 224) and images.is_contiguous() and large[3][0].is_contiguous()
    for index in range(6):
        assert torch.equal(large[3 + index][0], images[index]) and torch.equal(large[3 + index][1], labels[index])
    held = [value for value in vars(large).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) < 2**20, "the large images are not kept"


def test_digits_split_is_disjoint_complete_and_stratified(digits: data.ImageData) -> None:
    small = data.load("digits", image_size=8)
    train = [small.train[i][0].numpy().tobytes() for i in range(len(small.train))]
    held_out = [small.held_out[i][0].numpy().tobytes() for i in range(len(small.held_out))]
    assert not set(train) & set(held_out)
    assert len(set(train) | set(held_out)) == 1797
    counts = Counter(labels_of(digits.held_out))
    totals = Counter(sklearn_datasets.load_digits().target.tolist())
    assert counts == {label: round(0.25 * count) for label, count in totals.items()}


def test_digits_split_follows_its_seed_alone(digits: data.ImageData) -> None:
    torch.manual_seed(5)
    again, other = data.load("digits"), data.load("digits", split_seed=1)
    assert torch.equal(digits.held_out[:][0], again.held_out[:][0])
    assert torch.equal(digits.train[:][1], again.train[:][1])
    assert not torch.equal(digits.held_out[:][0], other.held_out[:][0])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_stratified_split_partitions_the_indices(share: float) -> None:
    labels = [0] * 10 + [1] * 3 + [2] * 2
    first, second = data.stratified_split(labels, share, seed=3)
    assert sorted(first + second) == list(range(15))
    assert all(1 <= sum(labels[i] == label for i in second) < labels.count(label) for label in range(3))


def test_batches_shuffle_by_seed_and_drop_the_incomplete_batch(digits: data.ImageData) -> None:
    def order(seed: int | None) -> list[list[int]]:
        return [labels.tolist() for _, labels in data.batches(digits.train, 100, seed=seed)]

    assert order(1) == order(1) != order(2)
    assert [len(batch) for batch in order(1)] == [100] * 13
    assert [len(batch) for batch in order(None)] == [100] * 13 + [47]
    loader = data.batches(digits.train, 100, seed=1)
    assert [b.tolist() for _, b in loader] != [b.tolist() for _, b in loader], "each pass has an order of its own"


def test_a_single_small_batch_is_kept(digits: data.ImageData) -> None:
    few = torch.utils.data.Subset(digits.train, range(5))
    assert [len(labels) for _, labels in data.batches(few, 64, seed=0)] == [5]


def test_folder_without_split_holds_out_a_fifth(tmp_path: Path) -> None:
    loaded = data.load(f"imagefolder:{write_folder(tmp_path / 'images', {'cat': 10, 'ant': 5})}", image_size=16)
    assert loaded.classes == ("ant", "cat")
    assert Counter(labels_of(loaded.train)) == {0: 4, 1: 8}
    assert Counter(labels_of(loaded.held_out)) == {0: 1, 1: 2}
    assert loaded.example.shape == (1, 3, 16, 16)


def test_folder_with_train_and_val_is_taken_as_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 3, "b": 1})
    write_folder(tmp_path / "val", {"a": 1, "b": 2})
    loaded = data.load(f"imagefolder:{tmp_path}", image_size=8)
    assert (labels_of(loaded.train), labels_of(loaded.held_out)) == ([0, 0, 0, 1], [0, 1, 1])


def test_held_out_images_are_normalised_and_never_augmented(tmp_path: Path) -> None:
    loaded = data.load(f"imagefolder:{write_folder(tmp_path, {'a': 2, 'b': 2})}", image_size=8)
    image, label = loaded.held_out[0]
    path, _ = loaded.held_out.files[0]  # type: ignore[attr-defined]
    level = image_module.open(path).getpixel((0, 0))[0] / 255
    expected = (torch.full((3,), level) - torch.tensor(data.IMAGENET_MEAN)) / torch.tensor(data.IMAGENET_STD)
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 8, 8))
    assert label == 0
    assert torch.equal(image, loaded.held_out[0][0])


def test_training_images_are_augmented_by_torchs_random_state(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image_module.fromarray(gradient).save(tmp_path / name)
    train = data.load(f"imagefolder:{tmp_path}", image_size=16).train
    torch.manual_seed(0)
    first, second = train[0][0], train[0][0]
    torch.manual_seed(0)
    assert torch.equal(train[0][0], first)
    assert not torch.equal(first, second)
    assert first.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digts", r"'digts' is unknown; expected one of: digits, imagefolder:DIR \(did you mean digits\?\)"),
        ("imagenet", "expected one of: digits, imagefolder:DIR"),
        ("imagefolder", "imagefolder:path/to/images"),
        ("imagefolder:", "imagefolder:path/to/images"),
        ("imagefolder:no/such/folder", "no/such/folder is not a folder"),
        ("digits:8", "is unknown"),
    ],
)
def test_unknown_spec(spec: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        data.load(spec)


def test_a_bare_folder_is_recognised_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"did you mean imagefolder:{tmp_path}\?"):
        data.load(str(tmp_path))


def test_image_size_below_one() -> None:
    with pytest.raises(DataError, match="image size 0"):
        data.load("digits", image_size=0)


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ({}, "is empty: expected one subfolder"),
        ({"only": 3}, "a single class, 'only'"),
        ({"a": 3, "b": 0}, "b holds no image"),
        ({"a": 3, "b": 1}, "class 1 has 1 image"),
    ],
)
def test_folder_that_cannot_be_used(tmp_path: Path, classes: dict[str, int], says: str) -> None:
    with pytest.raises(DataError, match=says):
        data.load(f"imagefolder:{write_folder(tmp_path, classes)}")


def test_train_and_val_of_different_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    write_folder(tmp_path / "val", {"a": 2, "b": 2})
    with pytest.raises(DataError, match="only one of them has: c"):
        data.load(f"imagefolder:{tmp_path}")


def test_a_file_that_is_no_image_is_named_before_training(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "notes.png").write_text("not an image")
    with pytest.raises(DataError, match=r"b/notes\.png cannot be read as an image"):
        data.load(f"imagefolder:{tmp_path}")


def test_a_truncated_file_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "val", {"a": 1, "b": 1})
    broken = tmp_path / "val" / "a" / "0.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image_module.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    loaded = data.load(f"imagefolder:{tmp_path}", image_size=8)
    with pytest.raises(DataError, match=r"val/a/0\.png cannot be decoded"):
        loaded.held_out[0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "val", {"a": 1, "b": 1})
    image_module.new(mode, (10, 10)).save(tmp_path / "val" / "a" / "0.png")
    assert data.load(f"imagefolder:{tmp_path}", image_size=8).example.shape == (1, 3, 8, 8)
