"""What a step changes about a model for a while, and puts back whatever happens.

Modes and `requires_grad` are saved per module and parameter: a model may hold both frozen and trained parts, and one global
`model.train()` at the end would silently change them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "SavedBuffers", "distributed", "evaluating", "frozen_parameters", "preserved_modes", "replaced_forward", "sharded",
    "training", "unsynchronised", "unwrapped", "without_trace",
]  # fmt: skip

# --- modes ---


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
def frozen_parameters(model: nn.Module | None) -> Iterator[None]:
    """Compute no weight gradients inside the block: `requires_grad` is off for every parameter, then restored."""
    if model is None:
        yield
        return
    with preserved_modes(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


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


# --- wrappers and processes ---


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what its wrappers (torch.compile, DistributedDataParallel, Fabric) hold, outermost first."""
    while True:
        yield model
        if isinstance(model, torch.jit.ScriptModule):
            return
        inner = model._modules.get("_orig_mod") or model._modules.get("_forward_module")
        if inner is None and isinstance(model, DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return
        model = inner


def distributed(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel module among the model's wrappers."""
    return next((m for m in unwrapped(model) if isinstance(m, DistributedDataParallel)), None)


def sharded(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to, if the model itself is one (fully_shard is no wrapper)."""
    if not any(hasattr(m, "set_requires_gradient_sync") for m in unwrapped(model)):
        return []
    return [m for m in model.modules() if hasattr(m, "set_requires_gradient_sync")]


def shares_gradients(wrappers: Sequence[nn.Module]) -> bool:
    """Whether backward passes through a model reduce gradients over processes, given the model and all that it wraps."""
    return any(isinstance(m, DistributedDataParallel) or hasattr(m, "set_requires_gradient_sync") for m in wrappers)


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Inside, backward passes leave gradients unreduced; afterwards the caller's setting holds as before."""
    parallel = distributed(model)
    kept = [
        (group, group.reduce_grads, group.all_reduce_grads) for module in sharded(model) for group in _groups(module)
    ]
    with nullcontext() if parallel is None else parallel.no_sync():
        try:
            for group, _, _ in kept:
                group.reduce_grads = group.all_reduce_grads = False
            yield
        finally:
            for group, reduce, all_reduce in kept:
                group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def _groups(module: Any) -> list[Any]:
    """The parameter groups of a fully sharded module; the state is private, but nothing public reads the flag."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


def agreement(model: nn.Module, flag: Tensor, operation: Any) -> Tensor:
    """`flag` reduced over the processes that share the model's gradients; `flag` itself in one process."""
    parallel = distributed(model)
    if parallel is not None:
        torch.distributed.all_reduce(flag, operation, group=parallel.process_group)
        return flag
    meshes = [p.device_mesh for m in sharded(model)[:1] for p in m.parameters() if hasattr(p, "device_mesh")]
    for dimension in range(meshes[0].ndim if meshes else 0):
        torch.distributed.all_reduce(flag, operation, group=meshes[0].get_group(dimension))
    return flag


# --- buffers, and everything else ---


class SavedBuffers:
    """The buffers of a module as they are now: which tensors they are, and their values."""

    def __init__(self, module: nn.Module) -> None:
        self.owners = [
            (m, [(name, b, None if b is None else b.detach().clone()) for name, b in m._buffers.items()])
            for m in module.modules()
        ]

    def put_back(self) -> None:
        """Buffers that were created are gone, those that were assigned anew are the old tensors, with the old values."""
        with torch.no_grad():
            for owner, saved in self.owners:
                buffers = owner._buffers
                for name in buffers.keys() - {name for name, _, _ in saved}:
                    del buffers[name]
                for name, buffer, value in saved:
                    if buffer is not None and value is not None:
                        if buffer.shape == value.shape and buffer.dtype == value.dtype:
                            buffer.copy_(value)
                        else:
                            buffer.data = value.clone()
                    buffers[name] = buffer

    @contextmanager
    def as_then(self) -> Iterator[None]:
        """Inside, the module runs with copies of the saved buffers, which are dropped: it runs again without a trace."""
        now = [(owner._buffers, dict(owner._buffers)) for owner, _ in self.owners]
        try:
            for owner, saved in self.owners:
                owner._buffers.update({name: None if value is None else value.clone() for name, _, value in saved})
            yield
        finally:
            for buffers, kept in now:
                for name in buffers.keys() - kept.keys():
                    del buffers[name]
                buffers.update(kept)

    @contextmanager
    def put_back_on_error(self) -> Iterator[None]:
        """Put the buffers back if the block raises."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Run the model inside; afterwards everything of it is as before.

    Restored: parameters, `.grad`, buffers (created and re-assigned ones too), each module's attributes (shallow), and the
    states of torch's, CUDA's, numpy's and random's generators and of generators that modules hold. Not restored: contents of
    mutable attributes, and what hooks do elsewhere.
    """
    modules = list(model.modules())
    attributes = [(vars(m), dict(vars(m))) for m in modules]
    registries = [(r, dict(r)) for m in modules for r in (m._parameters, m._modules)]
    parameters = [(p, p.grad, _local(p).detach().clone()) for p in model.parameters()]
    buffers = SavedBuffers(model)
    with ExitStack() as stack:
        stack.callback(buffers.put_back)
        for generator in [v for own, _ in attributes for v in own.values() if isinstance(v, torch.Generator)]:
            stack.callback(generator.set_state, generator.get_state())
        for restore in random_states():
            stack.callback(restore)
        try:
            yield
        finally:
            for own, saved in [*attributes, *registries]:
                for name in own.keys() - saved.keys():
                    del own[name]
                own.update(saved)
            with torch.no_grad():
                for parameter, gradient, value in parameters:
                    parameter.grad = gradient
                    if not torch.equal(_local(parameter), value):
                        _local(parameter).copy_(value)


def torch_random_states() -> list[Callable[[], None]]:
    """Functions that put torch's own random generators back: the CPU's, and CUDA's if it is in use."""
    state = torch.get_rng_state()
    restore: list[Callable[[], None]] = [lambda: torch.set_rng_state(state)]
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        restore.append(lambda: torch.cuda.set_rng_state_all(states))
    return restore


def random_states() -> list[Callable[[], None]]:
    """Functions that put the process's random generators back: torch's, that of `random`, numpy's if it is loaded."""
    python = random.getstate()
    restore = [*torch_random_states(), lambda: random.setstate(python)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kept = numpy.random.get_state()
        restore.append(lambda: numpy.random.set_state(kept))
    return restore


def _local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# --- losses that are not finite ---


class NonFiniteGuard:
    """Takes back what a batch did to `.grad` and the buffers if its loss is not finite.

    mode "ignore" does and costs nothing, "skip" takes back, "raise" takes back and raises FloatingPointError. The processes
    that share gradients decide together: their gradients are already mixed.
    """

    def __init__(self, model: nn.Module, loss: nn.Module | None, mode: str) -> None:
        self.model, self.mode = model, mode
        self.parts = [model] if loss is None else [model, loss]
        self.remember()

    def remember(self) -> None:
        """Take the present state as the one to go back to."""
        if self.mode == "ignore":
            return
        parameters = [p for part in self.parts for p in part.parameters()]
        self.gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]
        self.buffers = [SavedBuffers(part) for part in self.parts]

    def accepts(self, losses: list[Tensor]) -> bool:
        """Whether all losses are finite; if not, everything is put back."""
        if self.mode == "ignore":
            return True
        bad = (~torch.isfinite(torch.stack(losses))).any().to(torch.int32)
        if not bool(agreement(self.model, bad, torch.distributed.ReduceOp.MAX) if self._shared else bad):
            return True
        with torch.no_grad():
            for parameter, gradient, value in self.gradients:
                if gradient is not None and value is not None and parameter.grad is gradient:
                    gradient.copy_(value)
                else:
                    parameter.grad = value
        for buffers in self.buffers:
            buffers.put_back()
        self._reduce_as_the_backward_pass_would()
        if self.mode == "raise":
            numbers = [f"{loss.item():g}" for loss in losses]
            raise FloatingPointError(
                f"the loss is not finite (per pass: {', '.join(numbers)}); no gradient was accumulated"
            )
        return False

    def _reduce_as_the_backward_pass_would(self) -> None:
        """DistributedDataParallel averages what earlier batches left unreduced together with the batch that is taken back."""
        parallel: Any = distributed(self.model)
        if parallel is None or not parallel.require_backward_grad_sync:
            return
        size = torch.distributed.get_world_size(parallel.process_group)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad.div_(size), group=parallel.process_group)

    @property
    def _shared(self) -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()
