"""Networks small enough for a CPU."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def digits_cnn(channels: int = 1, classes: int = 10, width: int = 32) -> nn.Sequential:
    """Three convolutions and two linear layers for 8x8 images; the first layer is conv + ReLU."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()),
            second=nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            third=nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            head=nn.Sequential(nn.Flatten(), nn.Linear(8 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, classes)),
        )
    )
