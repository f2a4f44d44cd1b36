"""Models by name; `MODELS` is the one list of this package's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from yopo_ext.training.models.small import digits_cnn

__all__ = ["MODELS", "ModelEntry", "build_model", "check_model_name"]

Builder = Callable[[int, int], nn.Module]  # (input channels, classes)


@dataclass(frozen=True)
class ModelEntry:
    """How to build a model, and which submodule is its first layer in the sense of YOPO (None: found)."""

    build: Builder
    first_layer: str | None = None


MODELS: dict[str, ModelEntry] = {
    "digits-cnn": ModelEntry(digits_cnn, "first"),  # conv + ReLU: a first layer with a real inner loop
}


def check_model_name(name: str | None) -> None:
    """Raise ValueError unless `build_model` knows this name."""
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")


def build_model(name: str, channels: int, classes: int) -> tuple[nn.Module, str | None]:
    """(model with fresh weights from the global random state, name of its first layer or None).

    Raises:
        ValueError: unknown name.
    """
    check_model_name(name)
    return MODELS[name].build(channels, classes), MODELS[name].first_layer
