"""Images that stay in their files until they are needed: sets that no memory holds, such as ImageNet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from yopo_ext.training.run.progress import Progress
from yopo_ext.training.torchvision_import import import_torchvision

MODES = {1: "L", 3: "RGB"}  # Pillow's names of eight-bit images, by number of channels


@dataclass(frozen=True)
class Unreadable:
    """What a worker hands over instead of pixels: an exception would arrive with the worker's traceback as its text."""

    why: str


class ImageFiles(torch.utils.data.Dataset[Tensor]):
    """Image files as uint8 [channels, size, size]: resized so that the shorter side fits, cropped at the centre.

    Args:
        paths: the files. Sixteen-bit grey values are scaled to eight bits; pixels of unknown range (floats, 32-bit integers)
            are refused.
        size: pixels per side.
        workers: processes that decode ahead of a loop over `batches`.
        channels: 3, or 1 for grey values; files of the other kind are converted.
    """

    def __init__(self, paths: Sequence[str], size: int, workers: int, channels: int = 3) -> None:
        vision = import_torchvision()
        assert vision is not None
        self.paths, self.size, self.workers, self.channels = list(paths), size, workers, channels
        self.prepare = vision.transforms.Compose(
            [vision.transforms.Resize(size), vision.transforms.CenterCrop(size), vision.transforms.PILToTensor()]
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.paths), self.channels, self.size, self.size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        """One image, decoded here.

        Raises:
            OSError: naming the file and why it cannot be read.
        """
        return _readable(self._read(number))

    def _read(self, number: int) -> Tensor | Unreadable:
        path = self.paths[number]
        try:
            return self.prepare(_eight_bits(path, MODES[self.channels]))
        except Exception as error:  # Pillow raises whatever a damaged file leads its decoders to
            return Unreadable(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else repr(error)}")

    def subset(self, index: Tensor) -> ImageFiles:
        return ImageFiles([self.paths[i] for i in index.tolist()], self.size, self.workers, self.channels)

    def batches(self, index: Iterable[Tensor], *, pinned: bool = False) -> Iterator[Tensor]:
        """uint8 [B, channels, size, size] for each index [B], decoded ahead of time by the workers.

        Raises:
            OSError: naming the first file that cannot be read.
        """
        batches = [part.tolist() for part in index]
        loader = DataLoader(
            _Reader(self),
            batch_sampler=batches,
            num_workers=min(self.workers, len(batches)),
            collate_fn=_stack,
            pin_memory=pinned,
            generator=torch.Generator(),  # else it draws from the global one
        )
        return (_readable(part) for part in loader)

    def whole(self) -> Tensor:
        """All of them, decoded once."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        start, parts = 0, torch.arange(len(self)).split(256)
        with closing(Progress("reading images", len(parts))) as progress:
            for part in self.batches(parts):
                images[start : start + len(part)] = part
                start += len(part)
                progress.advance()
        return images

    def identity(self) -> bytes:
        """Changes with the list of files, their size in pixels and their channels (three are not mentioned)."""
        facts = (self.paths, self.size) if self.channels == 3 else (self.paths, self.size, self.channels)
        return hashlib.sha256(repr(facts).encode()).digest()


class _Reader(torch.utils.data.Dataset[Any]):
    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, number: int) -> Tensor | Unreadable:
        return self.files._read(number)


def _stack(images: list[Tensor | Unreadable]) -> Tensor | Unreadable:
    pixels = [image for image in images if isinstance(image, Tensor)]
    if len(pixels) == len(images):
        return torch.stack(pixels)
    return next(image for image in images if isinstance(image, Unreadable))


def _readable(found: Tensor | Unreadable) -> Tensor:
    if isinstance(found, Unreadable):
        raise OSError(found.why)
    return found


def _eight_bits(path: str, mode: str) -> Any:
    """The file as a Pillow image of this eight-bit mode.

    Pillow's own `convert` clips pixels of more than eight bits at 255 instead of scaling them.
    """
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        # A PNG holds at most sixteen bits, whatever type Pillow keeps them in.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            values = numpy.asarray(image).astype(numpy.float64)
            return Image.fromarray((values / 257.0).round().astype(numpy.uint8)).convert(mode)
        if image.mode in ("I", "F"):
            kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
            raise ValueError(f"its pixels are {kind}, whose range is not known: convert it to 8 or 16 bits")
        return image.convert(mode)
