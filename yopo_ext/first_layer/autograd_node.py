"""The first layer as an autograd node when it is a module that the operator does not compute: nested autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..compilation import not_traced
from ..kernels.constants import ACTIVATIONS
from .fused_node import normalised, per_channel, threat_constants, update


@contextmanager
def scratch_buffers(module: nn.Module) -> Iterator[None]:
    """Let the module write into copies of its buffers, which are dropped at the end: it runs again without a trace."""
    owners = [submodule._buffers for submodule in module.modules() if submodule._buffers]
    kept = [dict(owner) for owner in owners]
    try:
        for owner in owners:
            owner.update({name: None if b is None else b.clone() for name, b in owner.items()})
        yield
    finally:
        for owner, buffers in zip(owners, kept, strict=True):
            owner.update(buffers)


@contextmanager
def replaced_forward(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another `forward` inside the block. (Compiled models guard on it; hooks added late they ignore.)"""
    before = {module: vars(module).get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _uses_batch_statistics(module: nn.Module) -> bool:
    # A SyncBatchNorm keeps computing its own: its statistics are not those of the local batch.
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and (module.training or module.running_mean is None)
    )


@dataclass
class Opaque:
    """One evaluation of an opaque first layer: what its backward needs to run it again."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]  # the module's own
    affine: bool
    mean: Sequence[float]
    std: Sequence[float]
    steps: int
    threat: Tensor
    norm: int
    mask_start: bool
    gradient_before: bool
    gradient_after: bool
    shape: torch.Size  # of the observed input
    dtype: torch.dtype  # of the observed input
    autocast: torch.dtype | None = None
    rng_state: tuple[Tensor, Tensor | None] | None = None
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, u: Tensor) -> Tensor:
        v = normalised(u, self.mean, self.std).reshape(self.shape)
        output = self.forward(v.to(self.dtype, copy=True))  # the module may overwrite its input
        if not isinstance(output, Tensor):
            raise TypeError(
                f"first_layer must return one tensor; {type(self.module).__name__} returned {type(output).__name__}"
            )
        return output

    def recorded(self, u: Tensor) -> Tensor:
        """The first evaluation, which notes what `again` must repeat: dropout masks, autocast, batch statistics."""
        kind = u.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        drops = any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in self.module.modules()
        )
        capturing = kind == "cuda" and torch.cuda.is_current_stream_capturing()
        if drops or not (self.affine or capturing):  # any module may draw noise in its forward
            self.rng_state = torch.get_rng_state(), torch.cuda.get_rng_state(u.device) if kind == "cuda" else None
        hooks = [
            m.register_forward_pre_hook(self._note_statistics)
            for m in self.module.modules()
            if _uses_batch_statistics(m)
        ]
        try:
            return self(u)
        finally:
            for hook in hooks:
                hook.remove()

    def _note_statistics(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        z = inputs[0].detach()
        z = z if z.dtype == torch.float64 else z.float()
        variance, mean = torch.var_mean(z, [d for d in range(z.dim()) if d != 1], correction=0)
        self.statistics[module] = mean, variance

    def _frozen(self, module: Any) -> Callable[[Tensor], Tensor]:
        mean, variance = self.statistics[module]

        def forward(z: Tensor) -> Tensor:
            return torch.nn.functional.batch_norm(z, mean, variance, module.weight, module.bias, False, 0.0, module.eps)

        return forward

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Inside, evaluations repeat the recorded one and leave no trace on the module or the random state."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(scratch_buffers(self.module))
            enabled = self.autocast is not None
            stack.enter_context(torch.autocast(device.type, dtype=self.autocast, enabled=enabled))
            if self.rng_state is not None:
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            yield

    def at(self, u: Tensor, p: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients of <p, f0(u)> with respect to `wanted`."""
        if self.rng_state is not None:
            torch.set_rng_state(self.rng_state[0])
            if self.rng_state[1] is not None:
                torch.cuda.set_rng_state(self.rng_state[1], u.device)
        y = self(u)
        return torch.autograd.grad(y, wanted, p.to(y.dtype), allow_unused=True, retain_graph=True)

    def step(self, x: Tensor, eta: Tensor, g: Tensor | None, steps: int, mask_start: bool) -> Tensor:
        """`steps` inner steps along the constant gradient g: for the operator, an identity layer with costate g."""
        g = torch.zeros_like(x) if g is None else g.to(x.dtype)
        ones = x.new_ones(x.shape[1], 1, 1, 1)
        geometry = ([1, 1], [0, 0], [1, 1], x.shape[1], ACTIVATIONS["identity"], 0.0)
        layer: tuple[Any, ...] = (ones, None, None, None, [], [], *geometry)
        return update(self.threat, x, eta, g, *layer, steps, self.norm, mask_start, False, False, False)[0]

    def iterate(self, x: Tensor, eta: Tensor, p: Tensor) -> Tensor:
        """The inner steps of a layer that is not affine."""
        _, _, lo, hi = threat_constants(self.threat)
        low, high = per_channel(lo, x), per_channel(hi, x)
        with replaced_forward({module: self._frozen(module) for module in self.statistics}):
            for i in range(self.steps):
                u = x + eta
                if self.mask_start:
                    u = torch.clamp(torch.clamp(u, min=low), max=high)
                (g,) = self.at(u.requires_grad_(), p, [u])
                eta = self.step(x, eta, g, 1, self.mask_start and i == 0)
        return eta


class OpaqueNode(torch.autograd.Function):
    """y0 = f0(x + eta) for an `Opaque` layer; backward as `yopo_ext.first_layer.fused_node.first_layer_node`."""

    @staticmethod
    def forward(ctx: Any, layer: Opaque, eta: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.graph = layer, None
        ctx.save_for_backward(eta, x, *parameters)
        u = x + eta
        if not layer.affine:
            y = layer.recorded(u)
        else:
            with torch.enable_grad():
                u.requires_grad_()
                y = layer.recorded(u)
            ctx.graph = y, u
        y = y.detach()
        return y.clone() if y._base is not None else y

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:
        eta, x, *parameters = ctx.saved_tensors
        eta = eta.detach()
        layer: Opaque = ctx.layer
        wanted = [t for t, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        before, after = (bool(wanted) and asked for asked in (layer.gradient_before, layer.gradient_after))
        gradients: list[tuple[Tensor | None, ...]] = []
        with layer.again(x.device):
            if layer.affine:
                y, u = ctx.graph
                g, *rest = torch.autograd.grad(
                    y, [u, *wanted] if before else [u], p, allow_unused=True, retain_graph=True
                )
                gradients += [tuple(rest)] if before else []
                new_eta = layer.step(x, eta, g, layer.steps, layer.mask_start)
            else:
                gradients += [layer.at(x + eta, p, wanted)] if before else []
                new_eta = layer.iterate(x, eta, p)
            gradients += [layer.at(x + new_eta, p, wanted)] if after else []
        sums = iter(
            [sum(t for t in terms if t is not None) for terms in zip(*gradients, strict=True)] or [None] * len(wanted)
        )
        returned = [next(sums) if needed else None for needed in ctx.needs_input_grad[3:]]
        return None, new_eta, None, *(g if isinstance(g, Tensor) else None for g in returned)


@not_traced
def opaque_node(layer: Opaque, eta: Tensor, x: Tensor) -> Tensor:
    """The node of an opaque layer; the model around it is cut here when it is compiled."""
    return OpaqueNode.apply(layer, eta, x, *layer.module.parameters())
