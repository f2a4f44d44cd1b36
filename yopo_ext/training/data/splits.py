"""Data sets of byte images and their fixed splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yopo_ext.training.data.image_files import ImageFiles


@dataclass(frozen=True)
class Split:
    """Labelled images kept as bytes, in memory or in their files; `x = images / white` lies in [0, 1]."""

    images: Tensor | ImageFiles  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    white: int  # the byte of pixel value 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Labels, and images that are in memory, on that device; files are decoded on the CPU and their pixels sent."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return Split(images, self.labels.to(device), self.white)

    def x(self, index: Tensor | slice = slice(None)) -> Tensor:
        """float32 pixels [B, C, H, W] in [0, 1]."""
        whole = torch.arange(len(self), device=self.labels.device)
        return next(self.stream([whole[index]]))

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """`x` of one index after the other; files are decoded ahead of time."""
        if isinstance(self.images, Tensor):
            parts = (self.images[index] for index in batches)
        else:
            device = self.labels.device
            ahead = self.images.batches(batches, pinned=device.type == "cuda")
            parts = (part.to(device, non_blocking=True) for part in ahead)
        # On a GPU a tensor divided by a Python number is multiplied by its rounded reciprocal; one divided by a tensor is divided.
        white = torch.tensor(float(self.white), device=self.labels.device)
        for part in parts:
            yield part.to(torch.float32) / white

    def subset(self, index: Tensor) -> Split:
        images = self.images[index] if isinstance(self.images, Tensor) else self.images.subset(index)
        return Split(images, self.labels[index], self.white)

    def first(self, count: int | None) -> Split:
        """The first `count` samples; None: all."""
        return self if count is None else self.subset(torch.arange(min(count, len(self)), device=self.labels.device))

    def identity(self) -> bytes:
        """Changes with the images (the names of their files, if they are not in memory) and the labels."""
        images = bytes_of(self.images) if isinstance(self.images, Tensor) else self.images.identity()
        return images + bytes_of(self.labels)


def bytes_of(values: Tensor) -> bytes:
    """The values' bytes in logical order, of any dtype and on any device."""
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits: weights come from `train`, choices from `validation`, reported numbers from `test`."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split

    def to(self, device: torch.device) -> Dataset:
        splits = (split.to(device) for split in (self.train, self.validation, self.test))
        return Dataset(self.name, self.classes, *splits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w


def stratified_split(labels: Tensor, held_out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rest, held out) sample indices, sorted; the classes keep their shares. The same split for every run."""
    from sklearn.model_selection import train_test_split

    rest, out = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=held_out, stratify=labels.numpy(), random_state=seed
    )
    return torch.from_numpy(rest).sort().values, torch.from_numpy(out).sort().values
