"""ResNet-18 for 32x32 images (He et al., 2016), with the state_dict keys and the function of RobustBench's definition."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Convolution, BatchNorm and ReLU, twice, the last ReLU after the shortcut is added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """conv1 (an affine first layer), BatchNorm, ReLU, four stages of two blocks, average pooling, linear."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, width in enumerate((64, 128, 256, 512), 1):
            first = BasicBlock(inputs, width, 1 if number == 1 else 2)
            self.add_module(f"layer{number}", nn.Sequential(first, BasicBlock(width, width, 1)))
            inputs = width
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for number in (1, 2, 3, 4):
            out = self.get_submodule(f"layer{number}")(out)
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def resnet18(channels: int = 3, classes: int = 10) -> ResNet:
    return ResNet(channels, classes)
