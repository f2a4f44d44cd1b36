"""Finds a model's first layer and what is before it, by one forward on a synthetic input that leaves no trace.

The verdict is kept per model and looked up in every step by what it depends on: the modules and their modes, the settings of
those that run before the layer or in it, and the input's kind. Every pass checks it again, see `full_pass`.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from ..model_state import (
    agreement,
    replaced_forward,
    sharded,
    shares_gradients,
    without_trace,
)
from ..threat import Ball
from .describe import resolve
from .fingerprint import Fingerprint, Structure
from .normalisation import Normalisation
from .watch import FirstLayer, FirstLayerError, Watch

Forward = Callable[[nn.Module, Tensor], Any]


class _Known:
    """What is kept of one model: its modules, and verdicts with the fingerprints they hold for."""

    SIZE = 8  # a model in a few modes and with a few kinds of input

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.verdicts: OrderedDict[Any, tuple[Fingerprint, FirstLayer]] = OrderedDict()


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # around the process-wide switch that keeps torch.compile out of an inspection


@dataclass
class Inspection:
    """The question: where a model's first layer is for inputs like x.

    model: as it is called in passes; `wrappers`: the model and what it wraps, outermost first, the last being inspected.
    outer: what the caller applies to x + eta.

    Attributes that `verdict` sets:
        new: whether the verdict was made now.
        modules, parameters: those of the inspected model.
        input_dtype: of what the model gets.
        shared: whether backward passes reduce gradients over processes.
    """

    model: nn.Module
    wrappers: Sequence[nn.Module]
    forward: Forward
    first_layer: Any
    x: Tensor
    ball: Ball
    outer: Normalisation

    new = False

    @property
    def base(self) -> nn.Module:
        return self.wrappers[-1]

    def verdict(self) -> FirstLayer:
        """The first layer, from an inspection now or from an earlier one that still holds.

        Raises:
            ValueError, TypeError: the model or `first_layer` cannot be used, with the reason; nothing has changed.
        """
        known = _known.get(self.base)
        modules = None if known is None else known.structure.modules()
        if known is None or modules is None:
            known = _known[self.base] = _Known(Structure(self.base))
            modules = list(self.base.modules())
        self.modules = modules
        self.parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        validation.same_device("x", self.x, self.parameters)
        self.input_dtype = validation.input_dtype(self.x, {p.dtype for p in self.parameters})
        key = self._key(modules)
        fingerprint, found = known.verdicts.get(key, (None, None))
        holds = fingerprint is not None and fingerprint.holds(modules)
        self.shared = shares_gradients(self.wrappers)
        if self.shared and sharded(self.model):
            self._agree(holds)
        if not holds:
            self.new = True
            near, verdict = self._inspect(modules)
            fresh = Fingerprint(modules, near)
            if fingerprint is not None and verdict == found:
                fresh.ignore_changes_since(fingerprint)
            known.verdicts[key] = fresh, verdict
            found = verdict
            if len(known.verdicts) > known.SIZE:
                known.verdicts.popitem(last=False)
        known.verdicts.move_to_end(key)
        assert found is not None
        return found

    def _key(self, modules: list[nn.Module]) -> Any:
        device = self.x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (
            bytes([m.training for m in modules]), self.x.shape[1:], self.x.dtype, self.input_dtype, self.x.device, autocast,
            self.outer, _name(self.first_layer), *map(_bound, self.ball.bounds_as_given),
            # A function that is made anew for every step has the same code.
            getattr(self.forward, "__code__", type(self.forward)),
        )  # fmt: skip

    def _agree(self, holds: bool) -> None:
        """ValueError on every process if only some have to inspect: a sharded model's forward needs all of them."""
        rank = torch.distributed.get_rank()
        asks = torch.tensor([0 if holds else 1, 1 if holds else 0, 0 if holds else rank + 1], device=self.x.device)
        agreement(self.model, asks, torch.distributed.ReduceOp.MAX)
        anew, known, which = asks.tolist()
        if anew and known:
            raise FirstLayerError(
                f"model must be changed on all processes alike; it was changed on rank {which - 1} since the last step, and not "
                f"on every other"
            )

    # --- one inspection ---

    def _inspect(self, modules: list[nn.Module]) -> tuple[list[nn.Module], FirstLayer]:
        """(the modules that run before the layer or are part of it, the verdict)."""
        refuse_unsupported(self.base, modules)
        if self.x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise FirstLayerError("model must have taken a step before a CUDA graph is captured: warm up with one step")
        named = resolve(self.model, self.first_layer, self.wrappers)
        with torch.inference_mode(False), _lock:
            try:
                return self._look(named, modules, whole=False)
            except FirstLayerError:
                raise
            except Exception as error:  # the model's own: a batch may be smaller than it takes
                if "more than 1 value per channel" in str(error) and len(self.x) < 2:
                    shape = list(self.x.shape)
                    raise FirstLayerError(
                        f"x must give BatchNorm more than one value per channel; got {shape}"
                    ) from error
                return self._look(named, modules, whole=True)

    def _look(
        self, named: list[nn.Module] | None, modules: list[nn.Module], whole: bool
    ) -> tuple[list[nn.Module], FirstLayer]:
        u = self._synthetic(whole)
        given = self.outer(u).to(self.input_dtype)
        watch = Watch(named, self.x.shape, given)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(without_trace(self.base))
            for module in sharded(self.base):
                stack.callback(module.reshard)  # no backward pass follows that would do it
            stack.enter_context(_in_eager_mode())
            stack.enter_context(replaced_forward(_local_statistics(modules)))
            stack.enter_context(watch.installed(modules))
            output = self.forward(self.base, watch.leaf.clone())  # a model may overwrite its input
            return watch.near, watch.verdict(output, self.first_layer, modules)

    def _synthetic(self, whole: bool) -> Tensor:
        """Images like x whose values vary in every channel, at most two of them."""
        x = self.x
        count = len(x) if whole else min(len(x), 2) or 2
        generator = torch.Generator(x.device).manual_seed(0)
        noise = torch.rand((count, *x.shape[1:]), dtype=x.dtype, device=x.device, generator=generator)
        low, high = (b[:count] if b.dim() == x.dim() and b.shape[0] > 1 else b for b in self.ball.bounds)
        if bool((low.isfinite() & high.isfinite()).all()):
            return low + (high - low) * noise
        if len(x) == 0:
            return noise
        # Unbounded: the images, moved by as much as they vary.
        dims = [d for d in range(x.dim()) if d != 1]
        spread = x.amax(dims, keepdim=True) - x.amin(dims, keepdim=True)
        images = torch.nan_to_num(x[:count])
        return images + (noise - 0.5) * torch.where(spread.isfinite() & (spread > 0), spread, 1.0)


def refuse_unsupported(base: nn.Module, modules: list[nn.Module]) -> None:
    """FirstLayerError for models that a step would get wrong in silence."""
    for module in modules:
        name = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise FirstLayerError(f"model must not hold a ScriptModule, whose forward cannot be replaced; got a {name}")
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise FirstLayerError(
                "model must not be a FullyShardedDataParallel: use torch.distributed.fsdp.fully_shard instead"
            )
    for parameter in base.parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise FirstLayerError("model has lazy parameters: run one forward first")
        if hasattr(parameter, "grad_sample"):
            raise FirstLayerError(
                "model must not compute per-sample gradients (grad_sample): the passes of a step would leave them out"
            )
        if parameter.is_inference():
            raise FirstLayerError("model must not hold inference tensors: make it outside of torch.inference_mode")


def _bound(value: Any) -> Any:
    """A bound of the pixels as part of a key; a model may clamp to other ones."""
    return value.shape if isinstance(value, Tensor) else tuple(value)


def _name(first_layer: Any) -> Any:
    """`first_layer` as part of a key: modules by their identity (the fingerprint's weak references tell whether they live)."""
    if isinstance(first_layer, list | tuple):
        return tuple(map(_name, first_layer))
    return id(first_layer) if isinstance(first_layer, nn.Module) else first_layer


@contextmanager
def _in_eager_mode() -> Iterator[None]:
    """Inside, nothing is compiled; importing the compiler, where nothing used it, would take seconds."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _local_statistics(modules: list[nn.Module]) -> dict[nn.Module, Callable[..., Any]]:
    """SyncBatchNorms as BatchNorms of this process: an inspection must not wait for the other processes."""
    return {
        m: functools.partial(nn.modules.batchnorm._BatchNorm.forward, m)
        for m in modules
        if isinstance(m, nn.SyncBatchNorm) and m.training
    }
