"""Cuts a model at its first layer while an oracle's step runs: records one call, and replays it for other inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from networks import without_checkpoints
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class ReachedError(Exception):
    """A replay has come to the first layer's output."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def random_states(model: nn.Module) -> list[Any]:
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Generator)]
    return [torch.get_rng_state(), np.random.get_state(), random.getstate(), [(g, g.get_state()) for g in held]]


def set_random_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    for generator, state in states[3]:
        generator.set_state(state)


def module_states(model: nn.Module, copy: bool) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """Each module's attributes and buffers; with `copy`, buffers are cloned."""

    def own(b: Any) -> Any:
        return b.detach().clone() if copy and isinstance(b, Tensor) else b

    return [(m, dict(vars(m)), {n: own(b) for n, b in m._buffers.items()}) for m in model.modules()]


def set_module_states(states: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]], copy: bool) -> None:
    for module, attributes, buffers in states:
        vars(module).clear()
        vars(module).update(attributes)
        module._buffers.clear()
        for name, value in buffers.items():
            module._buffers[name] = value.clone() if copy and isinstance(value, Tensor) else value


class Cut:
    """The first layer's forward while a step runs."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model, self.layer, self.original = model, layer, layer.forward
        self.mode = "off"
        self.statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        self.calls, self.leaf, self.output = 0, None, None
        self.statistics.clear()

    @contextmanager
    def installed(self) -> Iterator[None]:
        own = vars(self.layer).get("forward")
        vars(self.layer)["forward"] = self
        try:
            yield
        finally:
            vars(self.layer).pop("forward")
            if own is not None:
                vars(self.layer)["forward"] = own

    def _note(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        z = inputs[0].detach()
        variance, mean = torch.var_mean(z, [d for d in range(z.dim()) if d != 1], correction=0)
        self.statistics[norm] = mean, variance

    def _uses_batch_statistics(self, module: nn.Module) -> bool:
        """Whether it is a BatchNorm, with a forward of its own, that normalises by the batch's statistics."""
        forward = self.original if module is self.layer else module.forward
        own = isinstance(module, _BatchNorm) and getattr(forward, "__func__", None) is _BatchNorm.forward
        return own and (module.training or module.running_mean is None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode == "off":
            return self.original(*args, **kwargs)
        if self.mode == "replay":
            set_random_states(self.random)
            raise ReachedError(self.original(*args, **kwargs))
        self.calls += 1
        if self.calls == 1:
            self.random, self.before = random_states(self.model), module_states(self.model, copy=True)
        norms = [m for m in self.layer.modules() if self._uses_batch_statistics(m)]
        hooks = [m.register_forward_pre_hook(self._note) for m in norms if m is not self.layer]
        if self.layer in norms:
            self._note(self.layer, args)
        output = self.original(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        if not torch.is_grad_enabled():  # a reentrant checkpoint, which calls again in backward
            return output
        fresh = output.detach()
        if self.leaf is None:
            self.leaf, self.output = fresh.requires_grad_(), output
        return self.leaf * 1.0

    def replay(self, given: Tensor, frozen: bool) -> Tensor:
        """The first layer's output for this input of the model."""
        now, states, mode = module_states(self.model, copy=False), random_states(self.model), self.mode
        self.mode = "replay"
        with ExitStack() as stack:
            stack.enter_context(without_checkpoints())
            try:
                set_module_states(self.before, copy=True)
                for norm, (mean, variance) in self.statistics.items() if frozen else ():
                    norm.running_mean, norm.running_var, norm.training = mean, variance, False
                self.model(given.clone())
            except ReachedError as reached:
                return reached.output
            finally:
                set_module_states(now, copy=False)
                set_random_states(states)
                self.mode = mode
        raise AssertionError("the model did not come to its first layer")
