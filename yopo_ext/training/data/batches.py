"""The batches a training epoch is made of, and what is kept of every sample from epoch to epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from yopo_ext.training.data.augment import Augmentation, Placement
from yopo_ext.training.data.splits import Split
from yopo_ext.training.run.seeds import mix_seed

Frame = Literal["image", "input"]


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
