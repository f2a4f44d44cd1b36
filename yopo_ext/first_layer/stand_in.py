"""Putting the autograd node in the place of the first layer for the length of a pass; the model is not rewritten."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .autograd_node import Opaque, opaque_node, replaced_forward
from .batch_norm_node import FirstLayerBatchNormNode, first_layer_batch_norm_node
from .describe import FusedLayer, OpaqueLayer
from .fused_node import Carry, FirstLayerNode, first_layer_node, normalised
from .normalisation import Normalisation, fitted_normalisation, matches


@dataclass
class Pass:
    """What the node needs to know of the full pass it is part of."""

    x: Tensor
    eta: Tensor  # a fresh leaf
    given: Tensor  # to the model
    steps: int
    threat: Tensor  # node.threat_tensor
    norm: int
    mask_start: bool
    gradient_before: bool
    gradient_after: bool
    normalisation: Normalisation  # applied to the model's input by the caller
    allow_tf32: bool
    carry: Carry
    first: bool  # the first pass through this model: look closely, whatever it costs

    def normalisation_before(self, observed: Tensor, known: Normalisation) -> Normalisation | None:
        """What the model did to its input up to here: `known`, or found on the first pass; None: something else."""
        if not known.mean and self._untouched(observed):
            return known
        with torch.no_grad():
            given = normalised(self.x + self.eta, self.normalisation.mean, self.normalisation.std)
            if matches(observed.detach(), normalised(given, known.mean, known.std)):
                return known
        return fitted_normalisation(observed, given) if self.first else None

    def _untouched(self, observed: Tensor) -> bool:
        same = (
            observed.data_ptr() == self.given.data_ptr()
            and observed.dtype == self.given.dtype
            and observed._version == 0
        )
        if not same or observed.numel() != self.given.numel():
            return False
        return observed.stride() == self.given.stride() or (observed.is_contiguous() and self.given.is_contiguous())


class Interposition:
    """The callable that stands for one first layer: one object in every step, so that compiled models are reused."""

    def __init__(
        self, layer: nn.Module, plan: FusedLayer | OpaqueLayer, original: Callable[..., Any] | None = None
    ) -> None:
        self.layer = layer
        self.plan = plan
        self.original = original or layer.forward
        self.inner = Normalisation()  # found between the model's input and the layer
        self.logits: tuple[int, int] | None = None  # (classes, dimensions) of the model's output, once known
        self.surroundings: tuple[int, ...] = ()  # the model's modules, at the first pass
        self.verified: set[Any] = set()  # the circumstances under which a first pass went well
        self.now: Any = None
        self.mean: list[float] = []
        self.std: list[float] = []
        self.calls = 0  # a checkpoint calls once more, in the backward pass
        self.recomputed = False  # a reentrant checkpoint runs the layer without gradients first
        if isinstance(plan, OpaqueLayer):
            warnings.warn(
                f"the first layer runs through autograd, at eager speed: {plan.reason}", UserWarning, stacklevel=2
            )

    def check_channels(self, x: Tensor) -> None:
        """ValueError if x cannot be the layer's input."""
        channels = self.plan.conv.in_channels if isinstance(self.plan, FusedLayer) else x.shape[1]
        if x.shape[1] != channels:
            raise ValueError(f"x must have as many channels as first_layer takes, {channels}; got {x.shape[1]}")

    @contextmanager
    def installed(self, now: Pass) -> Iterator[None]:
        """Stand in for the layer inside the block."""
        self.original = self.layer.forward
        with replaced_forward({self.layer: self}):
            self.begin(now)
            try:
                yield
            finally:
                self.now = None

    def begin(self, now: Pass) -> None:
        """Forget the last pass."""
        self.now, self.calls = now, 0
        self._compose()

    def _compose(self) -> None:
        own = self.plan.normalisation if isinstance(self.plan, FusedLayer) else Normalisation()
        whole = self.now.normalisation.then(self.inner).then(own)
        self.mean, self.std = list(whole.mean), list(whole.std)

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now, observed = self.now, input
        if not torch.compiler.is_compiling():
            self._observe(observed)
        if isinstance(self.plan, OpaqueLayer):
            if any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
                raise ValueError(
                    f"first_layer must depend on no trained tensors but its own parameters; the "
                    f"{type(self.layer).__name__} is called with one: give a first_layer that contains what makes it"
                )
            own = functools.partial(_call, self.original, args, kwargs) if args or kwargs else self.original
            layer = Opaque(
                self.layer, own, self.plan.affine, self.mean, self.std, now.steps, now.threat, now.norm, now.mask_start,
                now.gradient_before, now.gradient_after, observed.shape, observed.dtype,
            )  # fmt: skip
            return opaque_node(layer, now.eta, now.x)
        dtype, kind = observed.dtype, observed.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        return self._fused(self.plan, now, dtype)

    def _observe(self, observed: Tensor) -> None:
        """Count the call and compare the layer's input with what the node takes it to be."""
        now = self.now
        self.calls += 1
        if self.calls == 1:
            self.recomputed = not torch.is_grad_enabled()
        if not (now.first or observed.device.type == "cpu"):
            return
        inner = now.normalisation_before(observed, self.inner)
        if inner is None:
            raise ValueError(
                f"first_layer must take the model's input (per-channel normalised or flattened at most), but the "
                f"{type(self.layer).__name__} got other values, of shape {list(observed.shape)}: give a first_layer "
                f"that contains what comes before it"
            )
        if inner is not self.inner:
            self.inner = inner
            self._compose()

    def _fused(self, plan: FusedLayer, now: Pass, dtype: torch.dtype) -> Tensor:
        conv: Any = plan.conv
        norm: Any = plan.batch_norm
        geometry = (
            self.mean, self.std, list(conv.stride), list(plan.padding), list(conv.dilation), conv.groups,
            plan.activation, plan.negative_slope,
        )  # fmt: skip
        compiling = torch.compiler.is_compiling()
        flags = (now.gradient_before, now.gradient_after, now.allow_tf32, dtype)
        settings = (*geometry, now.steps, now.norm, now.mask_start, *flags)
        scale = shift = None
        if norm is not None:
            if norm.training or norm.running_mean is None:
                tensors = (now.eta, now.x, conv.weight, conv.bias, norm.weight, norm.bias, now.threat)
                node: Any = first_layer_batch_norm_node if compiling else FirstLayerBatchNormNode.apply
                y, mean, variance, _ = node(*tensors, *settings, norm.eps)
                if y.numel() == y.shape[1]:
                    raise ValueError(f"x must give BatchNorm more than one value per channel; got {list(now.x.shape)}")
                if norm.training and norm.running_mean is not None and (compiling or self.calls == 1):
                    _update_running_statistics(norm, mean.detach(), variance.detach())
                return y
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else norm.weight * scale
            shift = -norm.running_mean * scale
            shift = shift if norm.bias is None else norm.bias + shift
        weight, bias = conv.weight, conv.bias  # once: a parametrised one is computed here
        tensors = (now.eta, now.x, weight, bias, scale, shift, now.threat)
        if compiling:
            return first_layer_node(*tensors, *settings)
        state = None if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        ready = now.carry.take(_versions(weight, bias, *(state or ())), dtype)
        # A weight that is computed anew in every pass (a parametrisation) makes another output.
        carry = now.carry if now.carry.wanted and "weight" in conv._parameters else None
        return FirstLayerNode.apply(carry, ready, *tensors, *settings)


def _call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], u: Tensor) -> Any:
    return forward(u, *args, **kwargs)


def _versions(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else (t.data_ptr(), t._version) for t in tensors)


def _update_running_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """What BatchNorm's forward does to its buffers in training mode."""
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        momentum = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.mul_(1 - momentum).add_(momentum * mean)
        norm.running_var.mul_(1 - momentum).add_(momentum * variance)


class Discovery:
    """Finds, during a real pass, the first of several layers that is executed on the model's input."""

    def __init__(self, plans: dict[nn.Module, FusedLayer | OpaqueLayer]) -> None:
        self.plans = plans
        self.originals = {layer: layer.forward for layer in plans}
        self.found: Interposition | None = None
        self.logits: tuple[int, int] | None = None
        self.passed_over: list[str] = []
        self.now: Any = None

    @property
    def calls(self) -> int:
        """How often the layer that was found has run."""
        return 0 if self.found is None else self.found.calls

    @contextmanager
    def installed(self, now: Pass) -> Iterator[None]:
        """Watch every candidate inside the block; the first that fits is stood in for from then on."""
        self.now = now
        with replaced_forward({layer: self._watch(layer) for layer in self.plans}):
            try:
                yield
            finally:
                self.now = None
                if self.found is not None:
                    self.found.now = None

    def _watch(self, layer: nn.Module) -> Callable[..., Tensor]:
        original = self.originals[layer]

        def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.found is None:
                if self.now.normalisation_before(input, Normalisation()) is None:
                    self.passed_over.append(f"{type(layer).__name__} on an input of shape {list(input.shape)}")
                else:
                    self.found = Interposition(layer, self.plans[layer], original)
                    self.found.check_channels(input)
                    self.found.begin(self.now)
            if self.found is not None and self.found.layer is layer:
                return self.found(input, *args, **kwargs)
            return original(input, *args, **kwargs)

        return forward
