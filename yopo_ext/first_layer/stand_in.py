"""Replaces the first layer's forward by an autograd node for the length of a pass; the model is not rewritten."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..compilation import not_traced
from ..model_state import replaced_forward
from ..threat import Ball
from .autograd_node import Evaluation, autograd_node, bound
from .batch_norm_node import BatchNormNode, batch_norm_node
from .describe import AutogradLayer, FusedLayer
from .fused_node import FusedNode, Settings, first_layer_node
from .normalisation import Normalisation, differs, same_elements, sample


@dataclass(frozen=True)
class Place:
    """Where a step's stand-in is, and what it stands in for: the same in all passes of a step."""

    modules: tuple[nn.Module, ...]
    forwards: tuple[Callable[..., Any], ...]  # their own
    layer: FusedLayer | AutogradLayer
    conv: Any  # of a fused layer
    batch_norm: Any
    before: Normalisation  # from x + eta to the layer's input
    untouched: bool  # whether the model hands its input to the layer as it is


@dataclass
class Run:
    """What one pass is run with, and what it counts."""

    place: Place
    x: Tensor
    eta: Tensor  # a fresh leaf; its "gradient" is the perturbation after the inner steps
    check: Tensor  # a fresh leaf [2], see `fused_node`: of compiled graphs only
    given: Tensor  # to the model
    ball: Ball
    settings: Settings  # their dtype is that of the layer's input
    threat: Tensor | None  # the ball's numbers for compiled graphs
    calls: int = 0  # of the layer in the forward; activation checkpointing makes further ones during backward
    backwards: int = 0  # of the node, in eager mode
    flags: list[Tensor] = field(default_factory=list)  # on an accelerator: True where the layer got another input
    arrived: Tensor | None = None  # the layer's input, if it is the model's as it was
    end: int | None = None  # after the model's forward: the next sequence number of autograd


class PassError(ValueError):
    """What the layer's call in a pass shows: an earlier pass may have left gradients, which are taken back."""


class StandIn:
    """The callable that stands in for one first layer during passes.

    The same object is used in every step, because torch.compile compiles again when a module's `forward` changes. Between
    passes it holds nothing, so that it keeps no model alive.
    """

    def __init__(self) -> None:
        self.run: Any = None

    def begin(self, run: Run) -> None:
        """Take up a pass."""
        if self.run is not None:
            raise RuntimeError(
                "model is in another step already, in another thread or by a hook that calls one: run one step after the other"
            )
        self.run = run

    def installed(self) -> Any:
        """Stand in for the layer inside the block. Of several modules the last is the node, the others hand on their input."""
        modules = self.run.place.modules
        if len(modules) == 1:
            return Replaced(modules[0], self)
        entrances = {module: _entrance(module, self, i) for i, module in enumerate(modules[:-1])}
        return replaced_forward({**entrances, modules[-1]: self})

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = self.run
        place = run.place
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if run.end is not None and not self.recomputed():
                return place.forwards[-1](input, *args, **kwargs)
            run.calls += 1
            if len(place.modules) == 1:
                self.observe(input)
        if place.conv is None:
            return self._autograd(input, args, kwargs)
        return self._fused(input, compiling)

    def recomputed(self) -> bool:
        """Whether a call during backward recomputes the model's forward, and not something that the loss called."""
        node = torch._C._current_autograd_node()
        return node is not None and node._sequence_nr() < self.run.end

    def observe(self, observed: Tensor) -> None:
        """Compare the layer's input with what the node takes it to be; ValueError if it is something else."""
        run = self.run
        same = observed is run.given or _same_memory(observed, run.given)
        if run.place.untouched and same and observed._version == 0:
            run.arrived = observed.detach()
            return
        ok = same_elements(observed, run.x)
        if ok and observed.numel():
            expected = run.place.before(sample(run.x) + sample(run.eta.detach()))
            other = differs(sample(observed.detach().reshape(run.x.shape)), expected.to(observed.dtype))
            if other.device.type == "cuda":  # reading it would wait
                run.flags.append(other)
                return
            ok = not bool(other)
        if not ok:
            raise PassError(other_input(run.place.modules[0], observed))

    def _autograd(self, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        run = self.run
        modules, forwards, layer = run.place.modules, run.place.forwards, run.place.layer
        if any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            raise PassError(other_parameters(modules[-1], "is called with one"))
        parts = list(zip(modules, (*forwards[:-1], bound(forwards[-1], args, kwargs)), strict=True))
        evaluation = Evaluation(run, parts, layer.affine, run.settings._replace(dtype=input.dtype), input.shape)
        return autograd_node(evaluation, run.eta, run.x)

    def _fused(self, input: Tensor, compiling: bool) -> Tensor:
        run = self.run
        conv, norm = run.place.conv, run.place.batch_norm
        dtype, kind = input.dtype, input.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        settings = run.settings if run.settings.dtype == dtype else run.settings._replace(dtype=dtype)
        in_graph = compiling and run.threat is not None
        if norm is not None and (norm.training or norm.running_mean is None):
            parameters = (conv.weight, conv.bias, norm.weight, norm.bias)
            if in_graph:
                seen = self._seen(input)
                y, mean, variance, _ = batch_norm_node(
                    run.eta, run.check, seen, run.x, *parameters, run.threat, *settings, norm.eps
                )
            else:
                y, mean, variance = _batch_norm_in_eager(run, settings, norm.eps, run.eta, run.x, *parameters)
            if y.numel() == y.shape[1]:
                raise PassError(f"x must give BatchNorm more than one value per channel; got {list(run.x.shape)}")
            tracked = norm.training and norm.track_running_stats and norm.running_mean is not None
            if tracked and (compiling or run.calls == 1):
                _update_running_statistics(norm, mean.detach(), variance.detach())
            return y
        scale = shift = None
        if norm is not None:
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else norm.weight * scale
            shift = -norm.running_mean * scale
            shift = shift if norm.bias is None else norm.bias + shift
        parameters = (conv.weight, conv.bias, scale, shift)
        if in_graph:
            return first_layer_node(run.eta, run.check, self._seen(input), run.x, *parameters, run.threat, *settings)
        if compiling:
            return _fused_in_eager(run, settings, run.eta, run.x, *parameters)
        return FusedNode.apply(run, settings, run.eta, run.x, *parameters)

    def _seen(self, input: Tensor) -> Tensor:
        """A few pixels of the convolution's input."""
        run = self.run
        return run.place.layer.normalisation(sample(input.detach().reshape(run.x.shape)))


class Replaced:
    """Gives one module another `forward` inside the block; `replaced_forward` for one module, without a generator."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.own, self.forward = vars(module), forward

    def __enter__(self) -> None:
        self.before = self.own.get("forward")
        self.own["forward"] = self.forward

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del self.own["forward"]
        else:
            self.own["forward"] = self.before


class _Entrance:
    """The callable in the place of a module of a first layer that is not its last one: hands on its input."""

    def __init__(self) -> None:
        self.stand_in: Any = None
        self.index = 0

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            run = self.stand_in.run
            if run.end is not None and not self.stand_in.recomputed():
                return run.place.forwards[self.index](input, *args, **kwargs)
            if self.index == 0:
                self.stand_in.observe(input)
        return input


# Weak: models come and go, and a layer's stand-in goes with it.
_stand_ins: weakref.WeakKeyDictionary[nn.Module, StandIn] = weakref.WeakKeyDictionary()
_entrances: weakref.WeakKeyDictionary[nn.Module, _Entrance] = weakref.WeakKeyDictionary()


def stand_in_of(layer: nn.Module) -> StandIn:
    """The one stand-in of a first layer (of several modules: of the last)."""
    return _stand_ins.setdefault(layer, StandIn())


def _entrance(module: nn.Module, stand_in: StandIn, index: int) -> _Entrance:
    entrance = _entrances.setdefault(module, _Entrance())
    entrance.stand_in, entrance.index = weakref.proxy(stand_in), index
    return entrance


def other_input(module: nn.Module, observed: Tensor) -> str:
    """The message for a layer whose input is not the model's."""
    return (
        f"first_layer must take the model's input (per-channel normalised or flattened at most), but the "
        f"{type(module).__name__} got other values, of shape {list(observed.shape)}: give a first_layer that contains what "
        f"comes before it, or a sequence of modules that starts with it"
    )


def other_parameters(module: nn.Module, how: str) -> str:
    """The message for a layer that uses trained tensors of other modules."""
    return (
        f"first_layer must depend on no trained tensors but its own parameters; the {type(module).__name__} {how}: give a "
        f"first_layer that contains what makes it"
    )


def _same_memory(observed: Tensor, given: Tensor) -> bool:
    """Whether the model's input arrived as it was, by its address."""
    same = observed.data_ptr() == given.data_ptr() and observed.dtype == given.dtype
    if not same or observed.numel() != given.numel():
        return False
    return observed.stride() == given.stride() or (observed.is_contiguous() and given.is_contiguous())


def _update_running_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """What BatchNorm's forward does to its buffers in training mode."""
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        count = norm.num_batches_tracked  # an integer tensor, whose reciprocal would be fp32
        momentum = 1.0 / count.to(norm.running_mean.dtype) if norm.momentum is None else norm.momentum
        norm.running_mean.mul_(1 - momentum).add_(momentum * mean)
        norm.running_var.mul_(1 - momentum).add_(momentum * variance)


@not_traced
def _fused_in_eager(*arguments: Any) -> Tensor:
    return FusedNode.apply(*arguments)


@not_traced
def _batch_norm_in_eager(*arguments: Any) -> tuple[Tensor, ...]:
    return BatchNormNode.apply(*arguments)
