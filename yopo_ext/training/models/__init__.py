"""Models by name: this package's own (`MODELS`), `wrn-DEPTH-WIDTH`, and any of timm's and torchvision's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from yopo_ext.model_state import evaluating
from yopo_ext.training.models.preactresnet import PreActResNet, preactresnet8, preactresnet18
from yopo_ext.training.models.resnet import ResNet, resnet18
from yopo_ext.training.models.small import SmallCNN, digits_cnn
from yopo_ext.training.models.wideresnet import WideResNet
from yopo_ext.training.nearest import nearest
from yopo_ext.training.torchvision_import import import_torchvision

__all__ = [
    "MODELS",
    "ModelEntry",
    "PreActResNet",
    "ResNet",
    "SmallCNN",
    "WideResNet",
    "build_model",
    "check_model_name",
    "robustbench_model",
]

Builder = Callable[[int, int], nn.Module]  # (input channels, classes)


@dataclass(frozen=True)
class ModelEntry:
    """How to build a model, and which submodule is its first layer in the sense of YOPO (None: found).

    `robustbench` builds the network with the same keys and the same function from RobustBench's `model_zoo.architectures`.
    """

    build: Builder
    first_layer: str | None = None
    robustbench: str | None = None


MODELS: dict[str, ModelEntry] = {
    "digits-cnn": ModelEntry(digits_cnn, "first"),  # conv + ReLU: a first layer with a real inner loop
    "smallcnn": ModelEntry(SmallCNN, "feature_extractor.first"),  # the same on MNIST
    # Affine: the inner steps collapse. RobustBench's PreActResNet18() has the same keys and another function (its shortcuts
    # start before the first activation): it would load these weights without a word and classify worse.
    "preactresnet18": ModelEntry(
        preactresnet18, "conv1", "resnet.PreActResNet(resnet.PreActBlockV2, [2, 2, 2, 2], num_classes={})"
    ),
    "resnet18": ModelEntry(resnet18, "conv1", "resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], num_classes={})"),
    "preactresnet8": ModelEntry(preactresnet8, "conv1"),  # the same idea for natural images on a CPU
}
_WIDE = re.compile(r"wrn-(\d+)-(\d+)")


def check_model_name(name: str | None) -> None:
    """Raise ValueError unless `build_model` knows this name."""
    if not isinstance(name, str) or _builder(name) is None:
        allowed = f"{', '.join(MODELS)}, wrn-DEPTH-WIDTH (wrn-34-10), timm/NAME, torchvision/NAME"
        library = str(name).partition("/")[0]
        why = f" ({library} is not installed, or has no such model)" if library in ("timm", "torchvision") else ""
        raise ValueError(f"model must be one of {allowed}; got {name!r}{why or nearest(name, MODELS)}")


def robustbench_model(name: str, classes: int) -> str | None:
    """The expression that builds the same network from RobustBench's `model_zoo.architectures`; None if there is none."""
    entry = _builder(name)
    return None if entry is None or entry.robustbench is None else entry.robustbench.format(classes)


def build_model(name: str, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, str | None]:
    """(model with fresh weights from the global random state, name of its first layer or None).

    Args:
        name: see `check_model_name`.
        shape: of an image, [C, H, W]. Models of timm that are built for one size (ViTs) are built for this one.
        classes: how many logits.

    Raises:
        ValueError: unknown name, or a model that cannot take such images.
    """
    check_model_name(name)
    entry = _builder(name)
    assert entry is not None
    model = entry.build(shape[0], classes)
    try:
        resize = getattr(model, "set_input_size", None)
        if callable(resize):
            resize(img_size=shape[1:])
        _check_logits(model, name, shape, classes)
    except (RuntimeError, TypeError, AssertionError, IndexError) as error:
        raise ValueError(f"model must take images of shape {list(shape)}; {name!r} says: {error}") from error
    return model, entry.first_layer


@torch.no_grad()
def _check_logits(model: nn.Module, name: str, shape: tuple[int, int, int], classes: int) -> None:
    with evaluating(model):
        found = list(model(torch.zeros(1, *shape)).shape)
    if found != [1, classes]:
        raise ValueError(f"model must make {classes} logits of an image; {name!r} makes shape {found[1:]}")


def _builder(name: str) -> ModelEntry | None:
    if name in MODELS:
        return MODELS[name]
    wide = _WIDE.fullmatch(name)
    if wide:
        depth, width = int(wide[1]), int(wide[2])
        theirs = f"wide_resnet.WideResNet(depth={depth}, widen_factor={width}, num_classes={{}})"
        return ModelEntry(lambda c, k: WideResNet(depth, width, c, k), "conv1", theirs)
    library, _, model = name.partition("/")
    if library == "timm":
        return _from_timm(model)
    if library == "torchvision":
        return _from_torchvision(model)
    return None


def _from_timm(name: str) -> ModelEntry | None:
    import_torchvision(required=False)  # timm imports it
    try:
        import timm
    except ModuleNotFoundError:
        return None
    if not timm.is_model(name):
        return None
    return ModelEntry(lambda c, k: timm.create_model(name, pretrained=False, in_chans=c, num_classes=k))


def _from_torchvision(name: str) -> ModelEntry | None:
    torchvision = import_torchvision(required=False)
    if torchvision is None or name not in torchvision.models.list_models(module=torchvision.models):
        return None

    def build(channels: int, classes: int) -> nn.Module:
        if channels != 3:
            raise ValueError(f"dataset must have 3 channels for model torchvision/{name}; got {channels}")
        # Two of them have auxiliary outputs in training, for which the methods have no use.
        plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=classes, **plain)

    return ModelEntry(build)
