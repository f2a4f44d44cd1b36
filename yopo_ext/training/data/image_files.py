"""Images that stay in their files until they are needed: sets that no memory holds, such as ImageNet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from yopo_ext.training.torchvision_import import import_torchvision


class ImageFiles(torch.utils.data.Dataset[Tensor]):
    """Image files as uint8 [3, size, size]: resized so that the shorter side fits, cropped at the centre.

    Args:
        paths: the files.
        size: pixels per side.
        workers: processes that decode ahead of a loop over `batches`.
    """

    def __init__(self, paths: Sequence[str], size: int, workers: int) -> None:
        vision = import_torchvision()
        assert vision is not None
        self.paths, self.size, self.workers = list(paths), size, workers
        self.load = vision.datasets.folder.default_loader
        self.prepare = vision.transforms.Compose(
            [vision.transforms.Resize(size), vision.transforms.CenterCrop(size), vision.transforms.PILToTensor()]
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.paths), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        return self.prepare(self.load(self.paths[number]))

    def subset(self, index: Tensor) -> ImageFiles:
        return ImageFiles([self.paths[i] for i in index.tolist()], self.size, self.workers)

    def batches(self, index: Iterable[Tensor], *, pinned: bool = False) -> Iterator[Tensor]:
        """uint8 [B, 3, size, size] for each index [B], decoded ahead of time by the workers."""
        batches = [part.tolist() for part in index]
        return iter(
            DataLoader(
                self,
                batch_sampler=batches,
                num_workers=min(self.workers, len(batches)),
                pin_memory=pinned,
                generator=torch.Generator(),  # else it draws from the global one
            )
        )

    def whole(self) -> Tensor:
        """All of them, decoded once."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        start = 0
        for part in self.batches(torch.arange(len(self)).split(256)):
            images[start : start + len(part)] = part
            start += len(part)
        return images

    def identity(self) -> bytes:
        """Changes with the list of files and their size in pixels."""
        return hashlib.sha256(repr((self.paths, self.size)).encode()).digest()
