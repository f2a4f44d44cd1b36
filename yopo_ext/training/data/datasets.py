"""Data sets by name; `DATASETS` is the one list of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yopo_ext.training.data.image_files import ImageFiles
from yopo_ext.training.data.splits import Dataset, Split, stratified_split
from yopo_ext.training.nearest import unknown
from yopo_ext.training.torchvision_import import import_torchvision


@dataclass(frozen=True)
class Request:
    """Where to look for a data set, and how."""

    name: str
    folder: Path
    download: bool
    image_size: int | None
    workers: int | None
    image_channels: int | None


@dataclass(frozen=True)
class Entry:
    """How to load a data set's (training, test) splits, and how many training samples validation gets by default."""

    load: Callable[[Request], tuple[Split, Split]]
    classes: int | None  # None: counted
    validation: int


def load_dataset(
    name: str,
    folder: Path | str = "data",
    *,
    download: bool = False,
    validation: int | None = None,
    image_size: int | None = None,
    workers: int | None = None,
    image_channels: int | None = None,
) -> Dataset:
    """The data set called `name`, its validation split (`validation` samples) held out of the training data.

    The splits are the same for every call, seed and method.

    Args:
        name: one of `DATASETS`.
        folder: where torchvision keeps it; "imagefolder": train/CLASS/IMAGE and test/ (or val/) CLASS/IMAGE.
        download: fetch it if it is not there.
        validation: samples to hold out of the training data, at least one per class.
        image_size: "imagefolder" only: images are resized and cropped to this many pixels (None: 224).
        workers: "imagefolder" only: images stay in their files, and so many processes decode them while a run goes on
            (0: the run's own). None: all are decoded once and held in memory.
        image_channels: "imagefolder" only: 3, or 1 for grey values (None: 3).

    Raises:
        ValueError: unknown name, or not in the folder, `validation` out of range, or images that do not fit into memory.
        OSError: an image file that cannot be read, by name.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if image_channels not in (None, 1, 3):
        raise ValueError(f"image_channels must be 1 or 3; got {image_channels}")
    entry = DATASETS[name]
    rest, test = entry.load(Request(name, Path(folder), download, image_size, workers, image_channels))
    classes = entry.classes or int(rest.labels.max()) + 1
    held_out = entry.validation if validation is None else validation
    if not classes <= held_out <= len(rest) - classes:
        raise ValueError(f"validation_size must be between {classes} and {len(rest) - classes}; got {held_out}")
    train, chosen = stratified_split(rest.labels, held_out)
    return Dataset(name, classes, rest.subset(train), rest.subset(chosen), test)


def _digits(request: Request) -> tuple[Split, Split]:
    """scikit-learn's 1,797 scanned digits, 8x8; a quarter of them for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8)
    split = Split(pixels, torch.from_numpy(labels).to(torch.int64), 16)
    rest, test = stratified_split(split.labels, 450)
    return split.subset(rest), split.subset(test)


def _torchvision(class_name: str, **arguments: Any) -> Callable[[Request], tuple[Split, Split]]:
    """A data set of torchvision that says `train=True` or `train=False`."""

    def load(request: Request) -> tuple[Split, Split]:
        parts = (_fetch(request, class_name, train=train, **arguments) for train in (True, False))
        train, test = (_split(part.data, part.targets) for part in parts)
        return train, test

    return load


def _svhn(request: Request) -> tuple[Split, Split]:
    parts = (_fetch(request, "SVHN", split=split) for split in ("train", "test"))
    train, test = (Split(torch.from_numpy(p.data), torch.as_tensor(p.labels).long(), 255) for p in parts)
    return train, test


def _image_folder(request: Request) -> tuple[Split, Split]:
    vision = import_torchvision()
    assert vision is not None
    size = request.image_size or 224
    splits, classes = [], []
    for names in (("train",), ("test", "val")):
        found = next((request.folder / name for name in names if (request.folder / name).is_dir()), None)
        if found is None:
            raise ValueError(f"data_dir must hold a folder {' or '.join(names)} of class folders; got {request.folder}")
        listed = vision.datasets.ImageFolder(str(found))
        files = ImageFiles(
            [path for path, _ in listed.samples], size, request.workers or 0, request.image_channels or 3
        )
        needed, available = 2 * files.shape.numel(), available_memory()  # two copies while validation is split off
        if request.workers is None and needed > available:
            raise ValueError(
                f"workers must be given for images that do not fit into memory: the {len(files)} of {found} take "
                f"{needed / 2**30:.1f} GiB at image_size {size}, and {available / 2**30:.1f} GiB are free"
            )
        images = files if request.workers is not None else files.whole()
        splits.append(Split(images, torch.tensor(listed.targets), 255))
        classes.append(listed.classes)  # a class's label is its place in this list
    if classes[0] != classes[1]:
        only = ", ".join(sorted(set(classes[0]) ^ set(classes[1])))
        raise ValueError(f"data_dir must hold the same class folders for training and testing; only in one: {only}")
    train, test = splits
    return train, test


def available_memory() -> int:
    """Bytes that can be allocated without swapping, as far as the system says."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return sys.maxsize


def _fetch(request: Request, class_name: str, **arguments: Any) -> Any:
    vision = import_torchvision()
    assert vision is not None
    dataset = getattr(vision.datasets, class_name)
    try:
        return dataset(str(request.folder), download=request.download, **arguments)
    except RuntimeError as error:  # torchvision's "not found or corrupted"
        raise ValueError(
            f"data_dir must hold {request.name}, or give download; got {str(request.folder)!r} ({error})"
        ) from error


def _split(images: Any, labels: Any) -> Split:
    """From torchvision's [N, H, W] or [N, H, W, C] bytes."""
    pixels = torch.as_tensor(images)
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return Split(pixels.contiguous(), torch.as_tensor(labels).long(), 255)


DATASETS: dict[str, Entry] = {
    "digits": Entry(_digits, 10, 180),
    "mnist": Entry(_torchvision("MNIST"), 10, 2000),
    "fashion-mnist": Entry(_torchvision("FashionMNIST"), 10, 2000),
    "cifar10": Entry(_torchvision("CIFAR10"), 10, 2000),
    "cifar100": Entry(_torchvision("CIFAR100"), 100, 2000),
    "svhn": Entry(_svhn, 10, 2000),
    "imagefolder": Entry(_image_folder, None, 2000),
}
