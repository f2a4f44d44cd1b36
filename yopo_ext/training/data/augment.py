"""Random crop and flip on the device, as an invertible move: perturbations kept per image must move with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Where each image of a batch was cropped from its zero-padded self, and whether it was mirrored."""

    padding: int
    top: Tensor  # int64 [B], 0 .. 2 * padding
    left: Tensor  # int64 [B]
    mirrored: Tensor  # bool [B]

    def apply(self, x: Tensor) -> Tensor:
        """The augmented images [B, C, H, W]; zero where they reach beyond x."""
        return F.pad(x, [self.padding] * 4)[self._index(x)]

    def undo(self, augmented: Tensor, onto: Tensor) -> Tensor:
        """`onto` [B, C, H, W] with every pixel that the augmented images show replaced by theirs."""
        p, (height, width) = self.padding, onto.shape[-2:]
        canvas = F.pad(onto, [p] * 4)
        canvas[self._index(onto)] = augmented
        return canvas[..., p : p + height, p : p + width]

    def _index(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, channels, height, width = x.shape
        device = x.device
        columns = torch.arange(width, device=device).expand(batch, width)
        columns = torch.where(self.mirrored[:, None], width - 1 - columns, columns) + self.left[:, None]
        rows = torch.arange(height, device=device) + self.top[:, None]
        return (
            torch.arange(batch, device=device)[:, None, None, None],
            torch.arange(channels, device=device)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        )


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the image padded with `padding` zeros, and a mirror image for half of them."""

    padding: int = 4
    mirror: bool = True

    def draw(self, batch: int, generator: torch.Generator, device: torch.device) -> Placement:
        """Independent placements for `batch` images, drawn on the CPU."""
        top, left = torch.randint(0, 2 * self.padding + 1, (2, batch), generator=generator)
        mirrored = torch.rand(batch, generator=generator) < 0.5 if self.mirror else torch.zeros(batch, dtype=torch.bool)
        return Placement(self.padding, top.to(device), left.to(device), mirrored.to(device))
