"""Full passes through a model with its first layer replaced by the autograd node: each moves the perturbation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..kernels.dispatch import resolve_allow_tf32
from . import describe as layers
from .fused_node import Carry, normalised
from .normalisation import Normalisation
from .stand_in import Discovery, Interposition, Pass

# What is known of a model's first layer, by what the caller gave as `first_layer`. Weak: models come and go.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Interposition]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class PassResult:
    """What one full pass found; output and loss are detached."""

    eta: Tensor
    loss: Tensor
    output: Any


def detached(output: Any) -> Any:
    """A model's output without its graph."""
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, output)


def distributed(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel module among the model's wrappers."""
    return next((m for m in layers.unwrapped(model) if isinstance(m, DistributedDataParallel)), None)


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Inside, backward passes leave gradients unreduced."""
    parallel = distributed(model)
    # What fully_shard makes of a module is no wrapper, but has this method.
    sharded: list[Any] = [m for m in layers.unwrapped(model) if hasattr(m, "set_requires_gradient_sync")]
    with nullcontext() if parallel is None else parallel.no_sync():
        try:
            for module in sharded:
                module.set_requires_gradient_sync(False)
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True)


@contextmanager
def restored_buffers_on_error(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Put every buffer back to its value if the block raises."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if wanted else []
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        raise


def _leaves(output: Tensor) -> set[Tensor]:
    """The leaves that autograd leads to from `output` (tensors hash by identity)."""
    seen: set[Any] = set()
    leaves: set[Tensor] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        stack += [following for following, _ in node.next_functions]
    return leaves


class Passes:
    """The passes of one step: fixed model, input, threat model and number of inner steps."""

    def __init__(
        self, model: nn.Module, first_layer: nn.Module | str | None, x: Tensor, *, steps: int, threat: Tensor,
        norm: int, normalisation: Normalisation, backward: Callable[[Tensor], Any] | None,
    ) -> None:  # fmt: skip
        self.model, self.first_layer, self.x = model, first_layer, x
        self.steps, self.threat, self.norm, self.normalisation = steps, threat, norm, normalisation
        self.backward = backward or torch.Tensor.backward
        self.allow_tf32 = resolve_allow_tf32(None)
        self.carry = Carry()
        self.base = list(layers.unwrapped(model))[-1]
        modules = list(self.base.modules())
        self.surroundings = tuple(map(id, modules))
        self.interposition = self._lookup(modules)
        if isinstance(self.interposition, Interposition):
            self.interposition.check_channels(x)

    # --- which layer ---

    @property
    def is_new(self) -> bool:
        """Whether no pass has gone through this model's first layer yet."""
        return isinstance(self.interposition, Discovery) or not self.interposition.verified

    @property
    def logits(self) -> tuple[int, int] | None:
        """How many classes and dimensions the model's output has, once a pass has shown it."""
        return self.interposition.logits

    @logits.setter
    def logits(self, value: tuple[int, int]) -> None:
        self.interposition.logits = value

    @property
    def _key(self) -> Any:
        return id(self.first_layer) if isinstance(self.first_layer, nn.Module) else self.first_layer

    def _lookup(self, modules: list[nn.Module]) -> Interposition | Discovery:
        """The interposition of a known first layer, a new one for a layer that is named, or else a discovery."""
        known = _known.setdefault(self.model, {})
        present = set(modules)
        for key in [key for key, other in known.items() if other.layer not in present]:
            del known[key]
        layer = (
            layers.declared(self.model) if self.first_layer is None else layers.resolve(self.model, self.first_layer)
        )
        if layer is None and None in known and known[None].surroundings == self.surroundings:
            layer = known[None].layer
        if layer is None:
            return Discovery({m: layers.describe(m, self.x) for m in layers.candidates(self.base)})
        same = next((other for other in known.values() if other.layer is layer), None)
        if (
            same is not None
            and same.surroundings == self.surroundings
            and same.plan.circumstances == layers.circumstances(layer)
        ):
            return same
        return Interposition(layer, layers.describe(layer, self.x))

    def _adopt(self) -> Interposition:
        """Settle for the layer that a first pass went through."""
        at = self.interposition
        found = at.found if isinstance(at, Discovery) else at
        if found is None or at.calls == 0:
            raise ValueError(self._never_ran(at))
        if at.calls > 1:
            raise ValueError(self._ran_often(found))
        found.logits, found.surroundings = at.logits, self.surroundings
        self.interposition = found
        if found.layer is not self.model:  # (the entry would keep its own key alive)
            _known[self.model][self._key] = found
        return found

    def _never_ran(self, at: Interposition | Discovery) -> str:
        if isinstance(at, Interposition):
            name = repr(self.first_layer) if isinstance(self.first_layer, str) else f"the {type(at.layer).__name__}"
            return f"first_layer must be a layer that the model runs; {name} did not run"
        met = f" (the first one ran was a {at.passed_over[0]})" if at.passed_over else ""
        return f"first_layer=None found no Conv2d or Linear that runs on the model's input{met}: name the first layer"

    @staticmethod
    def _ran_often(at: Interposition) -> str:
        return f"first_layer must run once in a forward pass; the {type(at.layer).__name__} ran {at.calls} times"

    # --- one pass ---

    def run(
        self, eta: Tensor, objective: Callable[[Any], Tensor], *, gradient_before: bool, gradient_after: bool,
        mask_start: bool = False, scale: float = 1.0, synchronise: bool = True, more: bool = False,
    ) -> PassResult:  # fmt: skip
        """Forward at x + eta, `objective` of the output, backward of `scale` times it; gives the moved perturbation.

        `more` announces another pass with these weights, at the perturbation that this one gives.
        """
        self.carry.wanted = more
        leaf = eta.detach().requires_grad_()
        reached: list[None] = []
        leaf.register_post_accumulate_grad_hook(lambda _: reached.append(None))  # to keep the leaf would be a cycle
        with torch.no_grad():
            u = normalised(self.x + eta, self.normalisation.mean, self.normalisation.std)
        circumstances = (self.base.training, bool(self.normalisation.mean))
        first = isinstance(self.interposition, Discovery) or circumstances not in self.interposition.verified
        now = Pass(
            self.x, leaf, u, self.steps, self.threat, self.norm, mask_start, gradient_before, gradient_after,
            self.normalisation, self.allow_tf32, self.carry, first,
        )  # fmt: skip
        with ExitStack() as stack:
            if not synchronise:
                stack.enter_context(unsynchronised(self.model))
            stack.enter_context(self.interposition.installed(now))
            output, loss = self._first_forward(now, objective) if first else self._forward(now, objective)
            self.descend(loss if scale == 1.0 else loss * scale)
        assert isinstance(self.interposition, Interposition)
        if len(reached) != 1 or leaf.grad is None or now.given.grad is not None:
            raise RuntimeError(
                f"the backward pass must reach the input through the first layer, once; it did {len(reached)} times"
                + (", and by another path inside a reentrant checkpoint" if now.given.grad is not None else "")
                + ("" if reached else ": `backward` must run one backward pass")
            )
        self.interposition.verified.add(circumstances)
        return PassResult(leaf.grad.detach(), loss.detach(), detached(output))

    def descend(self, loss: Tensor) -> None:
        """The backward pass, outside of any autocast that the forward ran under."""
        with torch.autocast(self.x.device.type, enabled=False):
            self.backward(loss)
        # Its copies of the weights are old if an optimizer steps between passes, or inside of backward.
        torch.clear_autocast_cache()

    def _forward(self, now: Pass, objective: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
        assert isinstance(self.interposition, Interposition)
        if self.interposition.recomputed:
            now.given.requires_grad_()  # a reentrant checkpoint has a backward only if its input wants one
        output = self.model(now.given)
        loss = self._scalar(objective(output))  # which might run the model, too
        if self.interposition.calls > 1:
            raise ValueError(self._ran_often(self.interposition))
        return output, loss

    def _first_forward(self, now: Pass, objective: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
        """The forward of a first pass: in eager mode, everything looked at before any gradient or buffer changes."""
        now.given.requires_grad_()
        with restored_buffers_on_error(self.model), torch.compiler.set_stance("force_eager"):
            output = self.model(now.given.clone())  # a model may overwrite its input
            found = self._adopt()
            loss = self._scalar(objective(output))
            if found.calls > 1:
                raise ValueError(self._ran_often(found))
            name = type(found.layer).__name__
            reached = _leaves(loss)
            if found.recomputed and now.given in reached:
                return output, loss  # what is inside a reentrant checkpoint shows only in the backward pass
            if now.given in reached:
                raise ValueError(
                    f"first_layer must be the only way from the input to the output; the model also uses its input "
                    f"beside the {name}: give a first_layer that contains every use of it"
                )
            if now.eta not in reached:
                raise ValueError(f"first_layer must lead to the loss; the loss does not depend on the {name}")
        return output, loss

    @staticmethod
    def _scalar(loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor; got {got}")
        return loss if loss.dim() == 0 else loss.reshape(())
