"""Looks at one forward of a model on a synthetic input: where the first layer is, and what happens around it."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model_state import SavedBuffers, random_states, replaced_forward, torch_random_states
from .describe import AutogradLayer, FusedLayer, describe
from .normalisation import Normalisation, fitted
from .outputs import leaves, tensors_of
from .stand_in import other_input, other_parameters

_announced: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class FirstLayer:
    """What the inspection found.

    Attributes:
        modules: weak references to the modules of the layer, in the order they run in.
        layer: what they compute.
        inner: what the model does to its input before them.
        logits: (classes, dimensions) of the model's output, None where it is no tensor [B, classes, ...].
        reentrant: the layer ran without gradients, inside a reentrant checkpoint: other ways through the model show only in
            a backward pass.
    """

    modules: tuple[weakref.ref[nn.Module], ...]
    layer: FusedLayer | AutogradLayer
    inner: Normalisation
    logits: tuple[int, int] | None
    reentrant: bool


class FirstLayerError(ValueError):
    """The model or `first_layer` cannot be used as it is."""


class Watch:
    """Looks at the calls of a model's layers during one forward on a synthetic input."""

    def __init__(self, named: list[nn.Module] | None, shape: torch.Size, given: Tensor) -> None:
        self.named, self.shape, self.given = named, shape, given
        self.leaf = given.detach().clone().requires_grad_()
        self.chain: list[nn.Module] = []  # the layer, once its first module has run
        self.near: list[nn.Module] = []
        self.calls: dict[nn.Module, int] = {}
        self.passed_over: list[str] = []
        self.boundary: Tensor | None = None
        self.inner = Normalisation()
        self.layer: Any = None
        self.described: dict[nn.Module, Any] = {}
        self.reentrant = False
        self.handed: Any = None  # by the last module of the chain that ran
        self.start: Any = None  # the input, buffers and random state that the layer ran with

    @contextmanager
    def installed(self, modules: list[nn.Module]) -> Iterator[None]:
        """Watch every candidate inside the block."""
        candidates = self.named or [m for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]
        u = self.given.detach()
        if self.named is not None:
            self.described = {self.named[0]: describe(self.named, u)}
        else:
            self.described = {m: describe([m], u) for m in candidates}
        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
            stack.enter_context(replaced_forward({m: functools.partial(self._run, m, m.forward) for m in candidates}))
            self.originals = {m: vars(m)["forward"].args[1] for m in candidates}
            yield

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self.boundary is None and module not in self.near:
            self.near.append(module)

    def _run(self, module: nn.Module, forward: Callable[..., Any], input: Any, *args: Any, **kwargs: Any) -> Any:
        if self.chain and module in self.chain:
            self.calls[module] = self.calls.get(module, 0) + 1
            if self.calls[module] > 1 or self.boundary is not None:
                return forward(input, *args, **kwargs)
            return self._next(module, forward, input, args, kwargs)
        if self.chain or (self.named is not None and module is not self.named[0]):
            if self.named is not None and not self.chain:
                raise FirstLayerError(self._order(module))
            return forward(input, *args, **kwargs)
        inner = fitted(input, self.given, self.leaf) if isinstance(input, Tensor) else None
        if inner and self._trained_before(module):
            inner = None
        if inner is None:
            if self.named is not None:
                raise FirstLayerError(
                    other_input(module, input) if isinstance(input, Tensor) else self._no_tensor(module)
                )
            shape = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            self.passed_over.append(f"{type(module).__name__} on an input of shape {shape}")
            return forward(input, *args, **kwargs)
        if isinstance(module, nn.Conv2d) and input.dim() == 4 and input.shape[1] != module.in_channels:
            raise FirstLayerError(
                f"x must have as many channels as first_layer takes, {module.in_channels}; got {self.shape[1]}"
            )
        self.chain, self.inner = self.named or [module], inner
        self.calls[module] = 1
        self.layer = self.described[module]
        self.start = input.detach().clone(), [SavedBuffers(m) for m in self.chain], torch_random_states()
        return self._next(module, forward, input, args, kwargs)

    def _trained_before(self, module: nn.Module) -> bool:
        """Whether modules with trained parameters ran before, where no graph would show it: a BatchNorm can be fitted, too."""
        if torch.is_grad_enabled():
            return False
        ran = [m for m in self.near if any(p is not None and p.requires_grad for p in m._parameters.values())]
        return any(all(part is not module for part in m.modules()) for m in ran)

    def _next(self, module: nn.Module, forward: Any, input: Tensor, args: Any, kwargs: Any) -> Any:
        """Run a module of the chain; after the last one the model goes on from a leaf in the place of its output."""
        place = self.chain.index(module)
        if place and not (input is self.handed or _equal(input, self.handed)):
            raise FirstLayerError(self._order(module))
        if any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            raise FirstLayerError(other_parameters(module, "is called with one"))
        self.handed = forward(input, *args, **kwargs)
        if module is not self.chain[-1]:
            return self.handed
        self.reentrant = not torch.is_grad_enabled()
        if not isinstance(self.handed, Tensor) or not self.handed.dtype.is_floating_point:
            raise FirstLayerError(f"first_layer must return one tensor; the {type(module).__name__} does not")
        again = self._replay(args, kwargs) if isinstance(self.layer, AutogradLayer) else self.handed
        self._own_parameters(module, again if self.reentrant else self.handed)
        self.boundary = self.handed.detach().clone().requires_grad_()
        return self.boundary.clone()

    def _own_parameters(self, module: nn.Module, output: Tensor) -> None:
        own = {id(p) for m in self.chain for p in m.parameters()} | {id(self.leaf)}
        others = [leaf for leaf in leaves([output]) if id(leaf) not in own]
        if others:
            raise FirstLayerError(other_parameters(module, f"uses one of shape {list(others[0].shape)} from elsewhere"))

    def _replay(self, args: Any, kwargs: Any) -> Tensor:
        """Run the layer again from where it started: it must answer alike, or the inner steps would see another layer."""
        again, buffers, states = self.start
        now = random_states()
        for restore in states:
            restore()
        with ExitStack() as stack, torch.enable_grad():
            for saved in buffers:
                stack.enter_context(saved.as_then())
            for m in self.chain:
                last = m is self.chain[-1]
                again = self.originals[m](again.clone(), *(args if last else ()), **(kwargs if last else {}))
        for restore in now:
            restore()
        found = self.handed.detach()
        rounding = min(1024 * torch.finfo(found.dtype).eps, 0.05)  # in low precision less than any noise that is meant
        scale = rounding * torch.nan_to_num(found).abs().amax() if found.numel() else 0.0
        if again.shape != found.shape or bool(((again - found).abs() > scale).any()):
            raise FirstLayerError(
                f"first_layer must give the same output when it is run again from the same buffers and random state of torch; "
                f"the {type(self.chain[-1]).__name__} does not (it keeps state in an attribute, or draws from another "
                f"generator): keep its state in buffers"
            )
        return again

    def verdict(self, output: Any, asked: Any, modules: list[nn.Module]) -> FirstLayer:
        """What was found, once the whole model has run."""
        if self.boundary is None:
            raise FirstLayerError(self._never_ran(asked))
        name = type(self.chain[-1]).__name__
        often = max(self.calls.values())
        if often > 1 and not self.reentrant:
            raise FirstLayerError(f"first_layer must run once in a forward pass; the {name} ran {often} times")
        reached = leaves(tensors_of(output))
        if not self.reentrant:
            if isinstance(output, Tensor) and any(leaf is self.leaf for leaf in reached):
                raise FirstLayerError(
                    f"first_layer must be the only way from the input to the output; the model also uses its input beside the "
                    f"{name}: give a first_layer that contains every use of it"
                )
            if not any(leaf is self.boundary for leaf in reached):
                raise FirstLayerError(
                    f"first_layer must lead to the loss; the model's output does not depend on the {name}"
                )
        if isinstance(self.layer, AutogradLayer) and _announced.get(self.chain[-1]) != self.layer.reason:
            _announced[self.chain[-1]] = self.layer.reason
            warnings.warn(
                f"the first layer runs through autograd, at eager speed: {self.layer.reason}", UserWarning, stacklevel=2
            )
        inside = [m for layer in self.chain for m in layer.modules()]
        self.near += [m for m in inside if m not in self.near]
        logits = (output.shape[1], output.dim()) if isinstance(output, Tensor) and output.dim() >= 2 else None
        return FirstLayer(tuple(map(weakref.ref, self.chain)), self.layer, self.inner, logits, self.reentrant)

    def _never_ran(self, asked: Any) -> str:
        if self.named is not None:
            missing = next((m for m in self.named if m not in self.calls), self.named[0])
            name = repr(asked) if isinstance(asked, str) else f"the {type(missing).__name__}"
            return f"first_layer must be a layer that the model runs; {name} did not run"
        met = f" (the first one ran was a {self.passed_over[0]})" if self.passed_over else ""
        return f"first_layer=None found no Conv2d or Linear that runs on the model's input{met}: name the first layer"

    @staticmethod
    def _order(module: nn.Module) -> str:
        return (
            f"first_layer must be modules that run one after the other, each on the output of the one before; the "
            f"{type(module).__name__} got something else"
        )

    @staticmethod
    def _no_tensor(module: nn.Module) -> str:
        return (
            f"first_layer must take the model's input as its first argument; the {type(module).__name__} got no tensor"
        )


def _equal(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.detach(), b.detach())
    )
