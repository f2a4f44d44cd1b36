"""What makes an attack's result on an image independent of the images beside it: own random numbers, one batch size.

So an image that earlier attacks have left can be attacked in another batch than in an evaluation that attacks all images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from yopo_ext.threat import Ball
from yopo_ext.training.run.seeds import mix_seed


class Starts:
    """The random starts of one batch. The numbers of an image depend on the seed and its place in the split alone."""

    def __init__(self, ball: Ball, images: Tensor, seed: int) -> None:
        """`ball`: the perturbations allowed around the batch; `images`: the places of its images in the split, [B]."""
        self.ball, self.images, self.seed = ball, images, seed
        self.turn = 0

    def draw(self) -> Tensor:
        """The next start of every image: uniform in its ball, [B, C, H, W]."""
        generator = torch.Generator(self.images.device)
        rows = []
        for row, image in enumerate(self.images.tolist()):
            generator.manual_seed(mix_seed(self.seed, image, self.turn))
            rows.append(self.ball.subset(torch.tensor([row], device=self.images.device)).uniform(generator))
        self.turn += 1
        return torch.cat(rows)


class FixedBatches(nn.Module):
    """The model on batches of at most `size` images, each filled up to `size` with copies of its last image.

    Matrix products and convolutions choose their order of summation by the shape of the batch: one shape, one rounding.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        if 0 < count < self.size:
            layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
            x = torch.cat([x, x[-1:].expand(self.size - count, *x.shape[1:])])
            x = x if layout is None else x.contiguous(memory_format=layout)
        return self.model(x)[:count]
