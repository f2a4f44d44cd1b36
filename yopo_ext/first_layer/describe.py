"""What a first layer computes: act(affine(conv2d(normalise(u)))), which the operator runs, or something that autograd runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..kernels.constants import ACTIVATIONS
from .normalisation import NONE, Normalisation, normalisation_of


@dataclass(frozen=True)
class FusedLayer:
    """A first layer the operator computes: convolution [+ BatchNorm] [+ activation] after an optional normalisation.

    Modules are weak references: descriptions are kept from step to step and must keep no model alive.
    """

    conv: weakref.ref[nn.Conv2d]
    padding: tuple[int, int]
    batch_norm: weakref.ref[nn.BatchNorm2d] | None = None
    activation: int = ACTIVATIONS["identity"]
    negative_slope: float = 0.0
    normalisation: Normalisation = NONE


@dataclass(frozen=True)
class AutogradLayer:
    """A first layer that is differentiated by autograd, and why; affine in its input or not."""

    reason: str
    affine: bool  # then one input gradient serves every inner step


def describe(layers: Sequence[nn.Module], u: Tensor) -> FusedLayer | AutogradLayer:
    """What the modules `layers`, run one after the other, compute; `u` [B, C, H, W] is an input to try normalisations on."""
    if len(layers) == 1 and not _runs(layers[0], nn.Sequential):
        return _single(layers[0])
    parts: list[nn.Module] = []
    for i, layer in enumerate(layers):
        opened = _flattened(layer) if _runs(layer, nn.Sequential) else [layer]
        if opened is None or (len(layers) > 1 and i < len(layers) - 1 and _has_hooks(layer)):
            return AutogradLayer("a module in its Sequential has hooks", False)
        parts += opened
    parts = [part for part in parts if not _runs(part, nn.Identity)]
    normalisation = Normalisation()
    if parts and not isinstance(parts[0], nn.Conv2d):
        found = normalisation_of(parts[0], u)
        if found is None:
            return AutogradLayer(f"its Sequential starts with a {type(parts[0]).__name__}", False)
        normalisation, parts = found, parts[1:]
    return _sequence(parts, normalisation)


def _single(module: nn.Module) -> FusedLayer | AutogradLayer:
    if _runs(module, nn.Linear):
        return AutogradLayer("it is a Linear layer", True)
    if _runs(module, nn.Conv2d, "_conv_forward"):
        padding = _padding(module)  # type: ignore[arg-type]
        if isinstance(padding, str):
            return AutogradLayer(padding, True)
        return FusedLayer(weakref.ref(module), padding)  # type: ignore[arg-type]
    return AutogradLayer(
        f"it is a {type(module).__name__}, neither a Conv2d nor a Sequential that starts with one", False
    )


def _sequence(parts: list[nn.Module], normalisation: Normalisation) -> FusedLayer | AutogradLayer:
    rest = list(parts)
    if not rest or not _runs(rest[0], nn.Conv2d, "_conv_forward"):
        return AutogradLayer("its Sequential does not start with a plain Conv2d", False)
    conv: Any = rest.pop(0)
    padding = _padding(conv)
    if isinstance(padding, str):
        return AutogradLayer(f"of its convolution {padding}", False)
    norm: Any = rest.pop(0) if rest and type(rest[0]) is nn.BatchNorm2d and _runs(rest[0], nn.BatchNorm2d) else None
    activation = _activation(rest[0]) if rest else None
    if activation is not None:
        rest.pop(0)
    if rest:
        return AutogradLayer(f"its Sequential goes on with a {type(rest[0]).__name__}", False)
    code, slope = activation or (ACTIVATIONS["identity"], 0.0)
    batch_norm = None if norm is None else weakref.ref(norm)
    return FusedLayer(weakref.ref(conv), padding, batch_norm, code, slope, normalisation)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _runs(module: nn.Module, definition: type[nn.Module], *methods: str) -> bool:
    """Whether the module computes what `definition` defines (parametrised and renamed subclasses do)."""
    return isinstance(module, definition) and all(
        getattr(type(module), method) is getattr(definition, method) and method not in vars(module)
        for method in ("forward", *methods)
    )


def _padding(conv: nn.Conv2d) -> tuple[int, int] | str:
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}"
    if isinstance(conv.padding, str):
        left_right_top_bottom = conv._reversed_padding_repeated_twice
        left, right, top, bottom = left_right_top_bottom
        if left != right or top != bottom:
            return f"its padding {conv.padding!r} is not symmetric"
        return top, left
    return conv.padding[0], conv.padding[1]


def _activation(module: Any) -> tuple[int, float] | None:
    kind = type(module)
    if "forward" in vars(module):
        return None
    if kind is nn.ReLU:
        return ACTIVATIONS["relu"], 0.0
    if kind is nn.LeakyReLU:
        return ACTIVATIONS["leaky_relu"], float(module.negative_slope)
    if kind is nn.GELU:
        return ACTIVATIONS["gelu_tanh" if module.approximate == "tanh" else "gelu"], 0.0
    if kind is nn.SiLU:
        return ACTIVATIONS["silu"], 0.0
    return None


def _flattened(module: nn.Module) -> list[nn.Module] | None:
    """The modules of a Sequential in the order they run in, nested ones opened; None if one of them has hooks."""
    parts: list[nn.Module] = []
    for child in module._modules.values():  # a module may stand in it twice
        assert child is not None
        inside = _flattened(child) if _runs(child, nn.Sequential) else [child]
        if inside is None or _has_hooks(child):
            return None
        parts += inside
    return parts


# --- which module it is ---


def resolve(model: nn.Module, first_layer: Any, wrappers: Sequence[nn.Module]) -> list[nn.Module] | None:
    """The submodules of model that `first_layer` gives, in the order they run in; None where it is None.

    wrappers: the model and what its wrappers hold, outermost first.

    Raises:
        ValueError, TypeError: the model has no such submodule.
    """
    if first_layer is None:
        layer = _declared(wrappers)
        return None if layer is None else [layer]
    if isinstance(first_layer, list | tuple):
        if not first_layer:
            raise ValueError("first_layer must hold at least one module or name; got an empty sequence")
        return [_one(model, one, wrappers) for one in first_layer]
    return [_one(model, first_layer, wrappers)]


def _one(model: nn.Module, first_layer: Any, wrappers: Sequence[nn.Module]) -> nn.Module:
    if isinstance(first_layer, nn.Module):
        if all(module is not first_layer for module in model.modules()):
            raise ValueError(
                f"first_layer must be a submodule of model; got a {type(first_layer).__name__} that is not one"
            )
        return first_layer
    if not isinstance(first_layer, str):
        raise TypeError(
            f"first_layer must be a module, its dotted name, a sequence of these or None; got {first_layer!r} "
            f"({type(first_layer).__name__})"
        )
    for candidate in wrappers:
        try:
            return candidate.get_submodule(first_layer)
        except AttributeError:
            continue
    names = [name for name, module in candidate.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    raise ValueError(
        f"first_layer must name a submodule of model; got {first_layer!r}, the model has "
        f"{', '.join(names[:3]) or 'no layers'}..."
    )


def _declared(wrappers: Sequence[nn.Module]) -> nn.Module | None:
    """The first layer that the model itself declares (timm's `default_cfg["first_conv"]`), if it has that submodule."""
    for candidate in wrappers:
        config = getattr(candidate, "default_cfg", None)
        name = config.get("first_conv") if hasattr(config, "get") else None  # type: ignore[union-attr]
        if isinstance(name, str):
            try:
                return candidate.get_submodule(name)
            except AttributeError:
                return None
    return None
