"""PreActResNet-18 for 32x32 images (He et al., 2016), with the state_dict keys of RobustBench's definition.

The function is that of its `PreActBlockV2`, as in the YOPO paper's code; its `PreActBlock` takes the shortcut from elsewhere.
"""

from __future__ import annotations

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
    """conv1 (an affine first layer), four stages of blocks, average pooling, linear.

    `final_norm` adds BatchNorm and ReLU before the pooling; the network of the YOPO paper has none.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], channels: int = 3, classes: int = 10, final_norm: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.layer1 = _stage(64, 64, blocks[0], 1)
        self.layer2 = _stage(64, 128, blocks[1], 2)
        self.layer3 = _stage(128, 256, blocks[2], 2)
        self.layer4 = _stage(256, 512, blocks[3], 2)
        if final_norm:
            self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if hasattr(self, "bn"):
            out = F.relu(self.bn(out))
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(PreActBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def preactresnet18(channels: int = 3, classes: int = 10) -> PreActResNet:
    return PreActResNet((2, 2, 2, 2), channels, classes)
