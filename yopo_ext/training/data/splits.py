"""Data sets of byte images, their fixed splits, and the batches a training epoch is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from yopo_ext.training.data.augment import Augmentation, Placement
from yopo_ext.training.data.image_files import ImageFiles

Frame = Literal["image", "input"]


@dataclass(frozen=True)
class Split:
    """Labelled images kept as bytes, in memory or in their files; `x = images * scale` lies in [0, 1]."""

    images: Tensor | ImageFiles  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    scale: float

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Labels, and images that are in memory, on that device; files are decoded on the CPU and their pixels sent."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return Split(images, self.labels.to(device), self.scale)

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
        for part in parts:
            yield part.to(torch.float32) * self.scale

    def subset(self, index: Tensor) -> Split:
        images = self.images[index] if isinstance(self.images, Tensor) else self.images.subset(index)
        return Split(images, self.labels[index], self.scale)

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


@dataclass(frozen=True)
class Batch:
    """One training batch on the run's device."""

    x: Tensor  # float32 [B, C, H, W] in [0, 1], augmented
    y: Tensor  # int64 [B]
    index: Tensor  # int64 [B], position in the training split
    placement: Placement | None  # how each image was augmented; None: not at all
    epoch: int = 0  # which the batch belongs to
    number: int = 0  # of the batch in its epoch


class PerSample:
    """One image-shaped tensor per training sample, kept across epochs.

    In the frame of the unaugmented image (`frame="image"`) it moves with the image when that is cropped and mirrored. In
    the frame of the network's input ("input") it lies where it lay, whatever part of the image is there now.
    """

    def __init__(self, values: Tensor, frame: Frame = "image") -> None:
        self.values, self.frame = values, frame  # [N, C, H, W]

    def get(self, batch: Batch) -> Tensor:
        """The batch's tensors [B, C, H, W], moved as its images were; zero where an image was padded."""
        kept, placement = self.values[batch.index], self._placement(batch)
        return kept if placement is None else placement.apply(kept)

    def put(self, batch: Batch, values: Tensor) -> None:
        """Keep these; what an augmentation moved out of sight stays as it was."""
        placement = self._placement(batch)
        if placement is not None:
            values = placement.undo(values, self.values[batch.index])
        self.values[batch.index] = values

    def _placement(self, batch: Batch) -> Placement | None:
        return batch.placement if self.frame == "image" else None


class SplitSource:
    """Batches gathered from a split.

    Each process owns every `world`-th sample and shuffles its own share, so that kept perturbations need no exchange.
    The last, smaller batch of an epoch is left out: every update averages over the same number of samples.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        augmentation: Augmentation | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        share = len(split) // world
        if not 1 <= batch_size <= share:
            raise ValueError(
                f"batch_size must be between 1 and the {share} training samples per process; got {batch_size}"
            )
        self.split, self.batch_size, self.seed, self.augmentation = split, batch_size, seed, augmentation
        self.share = torch.arange(rank, share * world, world)
        self.rank = rank
        self.batches = share // batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        device = self.split.labels.device
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.rank, epoch))
        order = self.share[torch.randperm(len(self.share), generator=generator)].to(device)
        rest = order[: self.batches * self.batch_size].split(self.batch_size)[start:]
        for b, (index, x) in enumerate(zip(rest, self.split.stream(rest), strict=True), start):
            placement = None
            if self.augmentation is not None:
                generator.manual_seed(mix_seed(self.seed, self.rank, epoch, b))
                placement = self.augmentation.draw(len(index), generator, device)
                x = placement.apply(x)
            yield Batch(x, self.split.labels[index], index, placement, epoch, b)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; nearby inputs give unrelated seeds (splitmix64)."""
    mask = (1 << 64) - 1
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def stratified_split(labels: Tensor, held_out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rest, held out) sample indices, sorted; the classes keep their shares. The same split for every run."""
    from sklearn.model_selection import train_test_split

    rest, out = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=held_out, stratify=labels.numpy(), random_state=seed
    )
    return torch.from_numpy(rest).sort().values, torch.from_numpy(out).sort().values
