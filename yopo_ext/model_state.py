"""Context managers that put a model's modes back, whatever happens in between.

`training` is saved per submodule and `requires_grad` per parameter: a model may hold both frozen and trained parts,
and one global `model.train()` at the end would silently change them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "frozen_parameters", "preserved_modes", "training"]


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore every submodule's `training` and every parameter's `requires_grad` on leaving, exceptions included."""
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modules:
            module.training = mode
        for parameter, requires_grad in parameters:
            # Setting it on an unchanged non-leaf (a parametrised weight, say) would raise.
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for the length of the block, then restore every submodule's mode."""
    with preserved_modes(model):
        model.eval()
        yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode for the length of the block, then restore every submodule's mode."""
    with preserved_modes(model):
        model.train()
        yield


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Compute no weight gradients inside the block: `requires_grad` is off for every parameter, then restored."""
    with preserved_modes(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
