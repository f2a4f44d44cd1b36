"""WideResNet for 32x32 images (Zagoruyko and Komodakis, 2016), with the state_dict keys of RobustBench's definition."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """BatchNorm, ReLU and convolution, twice; a block that changes width has a shortcut from after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.convShortcut(out) if hasattr(self, "convShortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class NetworkBlock(nn.Module):
    """A stage: one block that changes the shape, then blocks that keep it."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = BasicBlock(inputs, outputs, stride)
        self.layer = nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """conv1 (an affine first layer), three stages, BatchNorm, ReLU, average pooling, linear.

    Args:
        depth: layers, 6n + 4.
        width: factor on the channels 16, 32, 64.

    Raises:
        ValueError: for any other depth, or a width below 1.
    """

    def __init__(self, depth: int = 34, width: int = 10, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...); got {depth}")
        if width < 1:
            raise ValueError(f"width must be >= 1; got {width}")
        blocks, (a, b, c) = (depth - 4) // 6, (16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1 = NetworkBlock(blocks, 16, a, 1)
        self.block2 = NetworkBlock(blocks, a, b, 2)
        self.block3 = NetworkBlock(blocks, b, c, 2)
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.avg_pool2d(F.relu(self.bn1(out)), 8).flatten(1))
