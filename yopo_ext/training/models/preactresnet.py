"""Pre-activation ResNets for 32x32 images (He et al., 2016), with the state_dict keys of RobustBench's definition.

The function is that of its `PreActBlockV2`, as in the YOPO paper's code; its `PreActBlock` takes the shortcut from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and convolution, twice; a block that changes shape has a shortcut from after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreActResNet(nn.Module):
    """conv1 (an affine first layer), stages of blocks that each halve the image but the first, average pooling, linear.

    `final_norm` adds BatchNorm and ReLU before the pooling; the network of the YOPO paper has none. `stride` is conv1's.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        channels: int = 3,
        classes: int = 10,
        final_norm: bool = False,
        widths: Sequence[int] = (64, 128, 256, 512),
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, stride, 1, bias=False)
        self.stages = len(blocks)
        inputs = widths[0]
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            self.add_module(f"layer{number}", _stage(inputs, width, count, 1 if number == 1 else 2))
            inputs = width
        if final_norm:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for number in range(1, self.stages + 1):
            out = self.get_submodule(f"layer{number}")(out)
        if hasattr(self, "bn"):
            out = F.relu(self.bn(out))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(PreActBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def preactresnet18(channels: int = 3, classes: int = 10) -> PreActResNet:
    return PreActResNet((2, 2, 2, 2), channels, classes)


def preactresnet8(channels: int = 3, classes: int = 10) -> PreActResNet:
    """174,000 parameters, for training on CPU cores: stages of one block, 24x16x16, 48x8x8 and 96x4x4, conv1 of stride 2."""
    return PreActResNet((1, 1, 1), channels, classes, final_norm=True, widths=(24, 48, 96), stride=2)
