"""Which module is the first layer, and what it computes: act(affine(conv2d(normalise(u)))) or something opaque."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..kernels.constants import ACTIVATIONS
from .normalisation import Normalisation, normalisation_of


@dataclass(frozen=True)
class FusedLayer:
    """A first layer the operator computes: convolution [+ BatchNorm] [+ activation] after an optional normalisation."""

    conv: nn.Conv2d
    padding: tuple[int, int]
    batch_norm: nn.BatchNorm2d | None = None
    activation: int = ACTIVATIONS["identity"]
    negative_slope: float = 0.0
    normalisation: Normalisation = field(default=Normalisation())
    circumstances: tuple[Any, ...] = field(default=(), compare=False)  # of the layer when it was described


@dataclass(frozen=True)
class OpaqueLayer:
    """A first layer that is differentiated by autograd, and why."""

    module: nn.Module
    reason: str
    affine: bool  # in its input, so that one input gradient serves every inner step
    circumstances: tuple[Any, ...] = field(default=(), compare=False)  # of the layer when it was described


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what its wrappers (torch.compile, DistributedDataParallel, Fabric) hold, outermost first."""
    while True:
        yield model
        inner = model._modules.get("_orig_mod") or model._modules.get("_forward_module")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return
        model = inner


def resolve(model: nn.Module, first_layer: nn.Module | str) -> nn.Module:
    """The submodule that `first_layer` names; ValueError or TypeError if the model has none."""
    if isinstance(first_layer, nn.Module):
        if all(module is not first_layer for module in model.modules()):
            raise ValueError(
                f"first_layer must be a submodule of model; got a {type(first_layer).__name__} that is not one"
            )
        return first_layer
    if not isinstance(first_layer, str):
        raise TypeError(
            f"first_layer must be a module, its dotted name or None; got {first_layer!r} ({type(first_layer).__name__})"
        )
    for candidate in unwrapped(model):
        try:
            return candidate.get_submodule(first_layer)
        except AttributeError:
            continue
    names = [name for name, module in candidate.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    raise ValueError(
        f"first_layer must name a submodule of model; got {first_layer!r}, the model has "
        f"{', '.join(names[:3]) or 'no layers'}..."
    )


def declared(model: nn.Module) -> nn.Module | None:
    """The first layer that the model itself declares (timm's `default_cfg["first_conv"]`), if it has that submodule."""
    for candidate in unwrapped(model):
        config = getattr(candidate, "default_cfg", None)
        name = config.get("first_conv") if hasattr(config, "get") else None  # type: ignore[union-attr]
        if isinstance(name, str):
            try:
                return candidate.get_submodule(name)
            except AttributeError:
                return None
    return None


def candidates(model: nn.Module) -> list[nn.Module]:
    """Every module that may turn out to be the first one executed on the input."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


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


def _activation(module: nn.Module) -> tuple[int, float] | None:
    if type(module) is nn.ReLU:
        return ACTIVATIONS["relu"], 0.0
    if type(module) is nn.LeakyReLU:
        return ACTIVATIONS["leaky_relu"], float(module.negative_slope)
    if type(module) is nn.GELU:
        return ACTIVATIONS["gelu_tanh" if module.approximate == "tanh" else "gelu"], 0.0
    if type(module) is nn.SiLU:
        return ACTIVATIONS["silu"], 0.0
    return None


def _flattened(module: nn.Module) -> list[nn.Module] | None:
    """The modules of a Sequential in order, nested ones opened; None if something would be lost by that."""
    parts: list[nn.Module] = []
    for child in module.children():
        inside = _flattened(child) if _runs(child, nn.Sequential) else [child]
        if inside is None or _has_hooks(child):
            return None
        parts += [part for part in inside if type(part) is not nn.Identity]
    return parts


def circumstances(module: nn.Module) -> tuple[Any, ...]:
    """What `describe` looks at, in a form that can be compared: a module may be changed after it was described.

    Weights, strides and BatchNorm's state are not in it: they are read in every pass.
    """
    found: list[Any] = []
    for part in module.modules():
        own = vars(part)
        settings = [own.get(name) for name in ("padding", "padding_mode", "negative_slope", "approximate")]
        state = [(own | part._buffers).get(name) for name in ("mean", "std")]  # of a module that normalises
        values = [(v.data_ptr(), v._version) if isinstance(v, Tensor) else repr(v) for v in state]
        found.append((id(part), type(part), id(own.get("forward")), _has_hooks(part), *settings, *values))
    return tuple(found)


def describe(module: nn.Module, u: Tensor) -> FusedLayer | OpaqueLayer:
    """What the first layer computes; `u` [B, C, H, W] is an input to try a normalising module on."""
    return dataclasses.replace(_describe(module, u), circumstances=circumstances(module))


def _describe(module: nn.Module, u: Tensor) -> FusedLayer | OpaqueLayer:
    def opaque(reason: str, affine: bool = False) -> OpaqueLayer:
        return OpaqueLayer(module, reason, affine)

    if _runs(module, nn.Linear):
        return opaque("it is a Linear layer", affine=True)
    if _runs(module, nn.Conv2d, "_conv_forward"):
        padding = _padding(module)  # type: ignore[arg-type]
        if isinstance(padding, str):
            return opaque(padding, affine=True)
        return FusedLayer(module, padding)  # type: ignore[arg-type]
    if not _runs(module, nn.Sequential):
        return opaque(f"it is a {type(module).__name__}, neither a Conv2d nor a Sequential that starts with one")
    parts = _flattened(module)
    if parts is None:
        return opaque("a module in its Sequential has hooks")
    normalisation = Normalisation()
    if parts and not isinstance(parts[0], nn.Conv2d):
        found = normalisation_of(parts[0], u)
        if found is None:
            return opaque(f"its Sequential starts with a {type(parts[0]).__name__}")
        normalisation, parts = found, parts[1:]
    return _describe_parts(module, parts, normalisation)


def _describe_parts(
    module: nn.Module, parts: Sequence[nn.Module], normalisation: Normalisation
) -> FusedLayer | OpaqueLayer:
    rest = list(parts)
    if not rest or not _runs(rest[0], nn.Conv2d, "_conv_forward"):
        return OpaqueLayer(module, "its Sequential does not start with a plain Conv2d", False)
    conv: Any = rest.pop(0)
    padding = _padding(conv)
    if isinstance(padding, str):
        return OpaqueLayer(module, f"of its convolution {padding}", False)
    batch_norm: Any = rest.pop(0) if rest and type(rest[0]) is nn.BatchNorm2d else None
    activation = _activation(rest[0]) if rest else None
    if activation is not None:
        rest.pop(0)
    if rest:
        return OpaqueLayer(module, f"its Sequential goes on with a {type(rest[0]).__name__}", False)
    code, slope = activation or (ACTIVATIONS["identity"], 0.0)
    return FusedLayer(conv, padding, batch_norm, code, slope, normalisation)
