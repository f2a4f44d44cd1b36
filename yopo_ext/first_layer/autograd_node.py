"""The first layer as an autograd node when it is something that the operator does not compute: nested autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..compilation import not_traced
from ..kernels.constants import ACTIVATIONS
from ..model_state import SavedBuffers, replaced_forward
from .fused_node import Settings, update_of
from .normalisation import normalised

Part = tuple[nn.Module, Callable[..., Any]]  # a module of the first layer and its own forward


@dataclass
class Evaluation:
    """One evaluation of the first layer, as its backward repeats it: from the same buffers and random state.

    parts: the modules of the layer in the order they run in, each with its own forward (the stand-in is in its place now).
    """

    run: Any
    parts: Sequence[Part]
    affine: bool
    settings: Settings
    shape: torch.Size  # of the layer's input in the model
    autocast: torch.dtype | None = None
    rng_state: tuple[Tensor, Tensor | None] | None = None
    buffers: list[SavedBuffers] = field(default_factory=list)
    computed: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)  # weights that hooks make
    statistics: dict[nn.Module, list[tuple[Tensor, Tensor]]] = field(
        default_factory=dict
    )  # of each BatchNorm, call by call

    def __call__(self, u: Tensor, forwards: dict[nn.Module, Callable[..., Any]] | None = None) -> Tensor:
        """The layer's output at u = x + eta; `forwards` replace those of some modules."""
        z = normalised(u, self.settings.mean, self.settings.std).reshape(self.shape).to(self.settings.dtype)
        z = z.clone() if z is u or z._base is not None else z  # a layer may overwrite its input
        with replaced_forward(forwards or {}):
            for module, forward in self.parts:
                z = (forwards or {}).get(module, forward)(z)
        return z

    def recorded(self, u: Tensor) -> Tensor:
        """The evaluation that is the model's: what it starts from and its BatchNorm statistics are kept."""
        kind = u.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modules = [m for part, _ in self.parts for m in part.modules()]
        drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules)
        capturing = kind == "cuda" and torch.cuda.is_current_stream_capturing()
        if drops or not (self.affine or capturing):  # any module may draw noise in its forward
            self.rng_state = torch.get_rng_state(), torch.cuda.get_rng_state(u.device) if kind == "cuda" else None
        self.buffers = [SavedBuffers(part) for part, _ in self.parts if any(m._buffers for m in part.modules())]
        self.computed = [(vars(m), n, t) for m in modules for n, t in vars(m).items() if _computed(t)]
        own = dict(self.parts)
        forwards = {m: own.get(m, m.forward) for m in modules}
        noted = {m: self._noting(m, f) for m, f in forwards.items() if _uses_batch_statistics(m, f)}
        return self(u, noted)

    def _noting(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        found = self.statistics.setdefault(module, [])

        def noting(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            values = z.detach()
            values = values if values.dtype == torch.float64 else values.float()
            variance, mean = torch.var_mean(values, [d for d in range(z.dim()) if d != 1], correction=0)
            found.append((mean, variance))
            return forward(z, *args, **kwargs)

        return noting

    def _frozen(self, module: Any) -> Callable[[Tensor], Tensor]:
        """BatchNorm with the recorded statistics; a module that runs twice has two of them."""
        calls = iter(self.statistics[module])

        def forward(z: Tensor) -> Tensor:
            mean, variance = next(calls)
            weight, bias = (None if t is None else t.to(mean.dtype) for t in (module.weight, module.bias))
            wide = z.to(mean.dtype)  # the statistics of a layer in low precision are fp32
            return torch.nn.functional.batch_norm(wide, mean, variance, weight, bias, False, 0.0, module.eps).to(
                z.dtype
            )

        return forward

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Inside, evaluations leave no trace on the module or the random state."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            enabled = self.autocast is not None
            stack.enter_context(torch.autocast(device.type, dtype=self.autocast, enabled=enabled))
            if self.rng_state is not None:
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            yield

    def at(self, u: Tensor, p: Tensor, wanted: Sequence[Tensor], frozen: bool = False) -> tuple[Tensor | None, ...]:
        """Gradients of <p, f0(u)> with respect to `wanted`, f0 from the state that the recorded evaluation started from."""
        if self.rng_state is not None:
            torch.set_rng_state(self.rng_state[0])
            if self.rng_state[1] is not None:
                torch.cuda.set_rng_state(self.rng_state[1], u.device)
        with ExitStack() as stack:
            for buffers in self.buffers:
                stack.enter_context(buffers.as_then())
            for attributes, name, value in self.computed:  # a loss that calls the model makes others
                stack.callback(attributes.__setitem__, name, attributes[name])
                attributes[name] = value
            y = self(u, {module: self._frozen(module) for module in self.statistics} if frozen else None)
            return torch.autograd.grad(y, wanted, p.to(y.dtype), allow_unused=True, retain_graph=True)

    def step(self, x: Tensor, eta: Tensor, g: Tensor | None, steps: int, mask_start: bool) -> Tensor:
        """Inner steps when the gradient g does not change: of a layer f0(u) = u the costate is the gradient."""
        g = torch.zeros_like(x) if g is None else g.to(x.dtype)
        ones = x.new_ones(x.shape[1], 1, 1, 1)
        identity = self.settings._replace(
            mean=[], std=[], stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=x.shape[1],
            activation=ACTIVATIONS["identity"], mask_start=mask_start,
        )  # fmt: skip
        return update_of(self.run.ball)(x, eta, g, ones, None, None, None, identity, steps, False)[0]

    def iterate(self, x: Tensor, eta: Tensor, p: Tensor) -> Tensor:
        """The inner steps of a layer that is not affine."""
        masked = self.settings.mask_start
        for i in range(self.settings.steps):
            u = x + eta
            if masked:
                low, high = self.run.ball.bounds
                u = torch.minimum(torch.maximum(u, low), high)
            u.requires_grad_()
            (g,) = self.at(u, p, [u], frozen=True)
            eta = self.step(x, eta, g, 1, masked and i == 0)
        return eta


def _computed(value: Any) -> bool:
    """Whether an attribute of a module is a tensor with a graph, as `torch.nn.utils.weight_norm` keeps the weight."""
    return isinstance(value, Tensor) and value.grad_fn is not None


def _uses_batch_statistics(module: nn.Module, forward: Any) -> bool:
    """Whether a module is a BatchNorm that normalises by the batch's statistics, with BatchNorm's own forward."""
    # A SyncBatchNorm keeps computing its own: its statistics are not those of the local batch.
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and getattr(forward, "__func__", None) is nn.modules.batchnorm._BatchNorm.forward
        and (module.training or module.running_mean is None)
    )


class AutogradNode(torch.autograd.Function):
    """y0 = f0(x + eta) by the layer's own forward; backward as in `fused_node`."""

    @staticmethod
    def forward(ctx: Any, evaluation: Evaluation, eta: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.evaluation, ctx.graph = evaluation, None
        ctx.save_for_backward(eta, x, *parameters)
        u = x + eta
        if not evaluation.affine:
            y = evaluation.recorded(u)
        else:
            # The graph is the node's own: a checkpoint around the layer must not recompute the layer for it.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_kept, _kept):
                u.requires_grad_()
                y = evaluation.recorded(u)
            ctx.graph = y, u
        y = y.detach()
        return y.clone() if y._base is not None else y

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Any, ...]:
        eta, x, *parameters = ctx.saved_tensors
        eta = eta.detach()
        evaluation: Evaluation = ctx.evaluation
        settings = evaluation.settings
        evaluation.run.backwards += 1
        wanted = [t for t, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        before, after = (bool(wanted) and asked for asked in (settings.gradient_before, settings.gradient_after))
        gradients: list[tuple[Tensor | None, ...]] = []
        with evaluation.again(x.device), _without_hooks(evaluation.parts):
            if evaluation.affine:
                y, u = ctx.graph
                g, *rest = torch.autograd.grad(
                    y, [u, *wanted] if before else [u], p, allow_unused=True, retain_graph=True
                )
                gradients += [tuple(rest)] if before else []
                new_eta = evaluation.step(x, eta, g, settings.steps, settings.mask_start)
            else:
                gradients += [evaluation.at(x + eta, p, wanted)] if before else []
                new_eta = evaluation.iterate(x, eta, p)
            gradients += [evaluation.at(x + new_eta, p, wanted)] if after else []
        sums = iter(
            [sum(t for t in terms if t is not None) for terms in zip(*gradients, strict=True)] or [None] * len(wanted)
        )
        returned = [next(sums) if needed else None for needed in ctx.needs_input_grad[3:]]
        return None, new_eta, None, *(g if isinstance(g, Tensor) else None for g in returned)


def _kept(saved: Tensor) -> Tensor:
    return saved


@contextmanager
def _without_hooks(parts: Sequence[Part]) -> Iterator[None]:
    """Inside, hooks of parameters do not run: `autograd.grad` would run them, and the gradient's accumulation again."""
    hooked = [(p, p._backward_hooks) for module, _ in parts for p in module.parameters() if p._backward_hooks]
    try:
        for p, _ in hooked:
            p._backward_hooks = None
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks


@not_traced
def autograd_node(evaluation: Evaluation, eta: Tensor, x: Tensor) -> Tensor:
    """The node of a layer that autograd runs; the model around it is cut here when it is compiled."""
    parameters = {id(p): p for module, _ in evaluation.parts for p in module.parameters()}
    return AutogradNode.apply(evaluation, eta, x, *parameters.values())


def bound(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The forward with the further arguments that the model calls it with."""
    return functools.partial(_call, forward, args, kwargs) if args or kwargs else forward


def _call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], u: Tensor) -> Any:
    return forward(u, *args, **kwargs)
