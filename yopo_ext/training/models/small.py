"""Networks small enough for a CPU."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


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


class SmallCNN(nn.Module):
    """The MNIST network of TRADES and YOPO, for 28x28 images, with the state_dict keys its checkpoints have.

    The first layer in the sense of YOPO is conv + ReLU. It is a module, `feature_extractor.first`, of which the
    state_dict knows nothing: its convolution is saved and loaded as `feature_extractor.conv1`.
    """

    def __init__(self, channels: int = 1, classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                first=nn.Sequential(OrderedDict(conv1=nn.Conv2d(channels, 32, 3), relu1=nn.ReLU())),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(64 * 4 * 4, 200),
                relu1=nn.ReLU(),
                drop=nn.Dropout(dropout),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=nn.Linear(200, classes),
            )
        )
        self.register_state_dict_post_hook(_outward)
        self.register_load_state_dict_pre_hook(_inward)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature_extractor(x).flatten(1))


_OURS, _THEIRS = "feature_extractor.first.conv1.", "feature_extractor.conv1."


def _outward(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, prefix + _OURS, prefix + _THEIRS)


def _inward(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix + _THEIRS, prefix + _OURS)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in list(state):  # all are put back in, so that the order stays
        state[name.replace(old, new) if name.startswith(old) else name] = state.pop(name)
