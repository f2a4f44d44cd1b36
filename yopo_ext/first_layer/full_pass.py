"""One full pass through a model with its first layer replaced by the autograd node: it moves the perturbation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.constants import NORMS
from ..model_state import SavedBuffers, unsynchronised
from ..threat import Ball
from .describe import FusedLayer
from .fused_node import Settings
from .inspect import Forward, Inspection
from .normalisation import Normalisation
from .outputs import detached
from .stand_in import PassError, Place, Run, StandIn, other_input, stand_in_of
from .watch import FirstLayer


class Gradients(NamedTuple):
    """What a pass adds to the first layer's `.grad`: the gradient at the perturbation before the inner steps, after, both."""

    before: bool
    after: bool


@dataclass
class FullPass:
    """The passes of one step: what they have in common.

    Attributes:
        forward: called as forward(model, u).
        outer: what the caller applies to x + eta.
        backward: runs the backward pass from a loss; None: loss.backward().
        inspection, found: the inspection that went before, and its verdict.
    """

    model: nn.Module
    forward: Forward
    x: Tensor
    ball: Ball
    steps: int
    mask_start: bool
    outer: Normalisation
    backward: Callable[[Tensor], Any] | None
    allow_tf32: bool
    inspection: Inspection
    found: FirstLayer

    def __post_init__(self) -> None:
        found = self.found
        modules = tuple(m for m in (reference() for reference in found.modules) if m is not None)
        before, conv, norm = self.outer.then(found.inner), None, None
        geometry: tuple[Any, ...] = ([], [], [], 1, 0, 0.0)
        whole = before
        if isinstance(found.layer, FusedLayer):
            layer, conv = found.layer, found.layer.conv()
            assert conv is not None
            norm = None if layer.batch_norm is None else layer.batch_norm()
            whole = before.then(layer.normalisation)
            geometry = (
                list(conv.stride), list(layer.padding), list(conv.dilation), conv.groups, layer.activation,
                layer.negative_slope,
            )  # fmt: skip
        self.settings = Settings(  # type: ignore[call-arg]
            list(whole.mean), list(whole.std), *geometry, self.steps, NORMS[self.ball.norm], self.mask_start, False, False,
            self.allow_tf32, self.inspection.input_dtype,
        )  # fmt: skip
        forwards = tuple(module.forward for module in modules)
        self.place = Place(modules, forwards, found.layer, conv, norm, before, not found.inner)
        self.stand_in: StandIn = stand_in_of(modules[-1])
        # Full backward hooks run when the gradient of a module's input is there: an input that wants one and gets none
        # would keep them from running.
        self.probed = found.reentrant or not any(m._backward_hooks for m in self.inspection.modules)
        self.threat = None
        if "torch._dynamo" in sys.modules and self.ball.numbers is not None:
            self.threat = self.ball.table
        # The loss is unknown before the first pass: if it is refused there, buffers are put back.
        self.unseen = SavedBuffers(self.model) if self.inspection.new else None
        self.without_gradient = [p for p in self.inspection.parameters if p.grad is None]
        raise_late_errors(self.stand_in)

    def output(self, eta: Tensor | float) -> Any:
        """What the model answers for a perturbation, without a stand-in."""
        u = self.input(eta)
        if self.found.reentrant and torch.is_grad_enabled():
            u = u.detach().requires_grad_().clone()  # a reentrant checkpoint has a backward only if its input wants one
        return self.forward(self.model, u)

    def input(self, eta: Tensor | float) -> Tensor:
        """What the model gets for a perturbation."""
        u, dtype = self.outer(self.x + eta), self.inspection.input_dtype
        return u if u.dtype == dtype else u.to(dtype)

    def __call__(
        self, eta: Tensor, objective: Callable[[Any], Tensor], gradients: Gradients, *, scale: float = 1.0,
        synchronise: bool = True,
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """Forward at x + eta, `objective` of the output, backward of `scale` times it.

        Returns:
            (the perturbation after the inner steps, the objective, the model's output), all detached.

        Raises:
            ValueError: `first_layer` or the model is not as the inspection found it; `.grad` is as before the step if it was
                None then.
        """
        # The model's input is no leaf (a model may overwrite it), but leads to one. Its gradient is the other ways from the
        # input to the loss: the first layer gets its input from `eta` below.
        probe = eta.detach()
        if self.probed:
            probe.requires_grad_()
        given = self.input(probe)
        x, stand_in = self.x, self.stand_in
        # Fresh in every pass: a loss may keep the graph of an earlier pass and run backward through it again.
        check = x if self.threat is None else x.new_zeros(2).requires_grad_()
        settings = self.settings._replace(gradient_before=gradients.before, gradient_after=gradients.after)
        run = Run(self.place, x, eta.detach().requires_grad_(), check, given, self.ball, settings, self.threat)
        stand_in.begin(run)
        try:
            if self.inspection.shared and not synchronise:
                with unsynchronised(self.model):
                    loss, output = self._both_ways(run, objective, scale)
            else:
                loss, output = self._both_ways(run, objective, scale)
        except PassError as error:
            raise ValueError(str(error) + self._taken_back()) from error
        finally:
            stand_in.run = None
        self._judge(run, probe)
        assert run.eta.grad is not None
        return run.eta.grad, loss, detached(output)

    def _both_ways(self, run: Run, objective: Callable[[Any], Tensor], scale: float) -> tuple[Tensor, Any]:
        unseen, self.unseen = self.unseen, None
        with nullcontext() if unseen is None else unseen.put_back_on_error():
            with self.stand_in.installed():
                output = self.forward(self.model, run.given)
            run.end = torch._C._autograd._get_sequence_nr()
            if run.calls > 1:
                self._fail(f"first_layer must run once in a forward pass; the {self._name} ran {run.calls} times")
            loss = _scalar(objective(output))  # which may run the model, too
        with self.stand_in.installed():
            self.descend(loss, scale)
        return loss.detach(), output

    def descend(self, loss: Tensor, scale: float = 1.0) -> None:
        """The backward pass of `scale` times the loss, outside of any autocast that the forward ran under."""
        try:
            if not torch.is_autocast_enabled(self.x.device.type):
                self._backward(loss, scale)
                return
            with torch.autocast(self.x.device.type, enabled=False):
                self._backward(loss, scale)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            message = (
                "loss_fn keeps a graph that several passes use, and the first of them freed it: give "
                "backward=lambda loss: loss.backward(retain_graph=True)"
            )
            raise RuntimeError(message + self._taken_back()) from error
        # Its copies of the weights are old if an optimizer steps between passes, or inside of backward.
        torch.clear_autocast_cache()

    def _backward(self, loss: Tensor, scale: float) -> None:
        if self.backward is not None:
            self.backward(loss if scale == 1.0 else loss * scale)
        else:
            torch.autograd.backward(loss, None if scale == 1.0 else torch.full_like(loss, scale))

    # --- what every pass shows ---

    def _judge(self, run: Run, probe: Tensor) -> None:
        """Errors of what the forward and the backward pass showed."""
        seen = run.check.grad  # not None: the node ran in a compiled graph
        if run.x.device.type == "cuda":  # reading would wait
            if run.eta.grad is None:
                self._fail(self._unreached(0, False))
            flags = [*run.flags, *([] if seen is None else [seen]), *([] if probe.grad is None else [probe.grad.any()])]
            keep_for_later(self.stand_in, flags, self._late)
            return
        reached, other = (run.backwards, 0) if seen is None else seen.tolist()
        bypassed = probe.grad is not None and bool(probe.grad.any())
        if bypassed or reached != 1 or run.eta.grad is None:
            self._fail(self._unreached(int(reached), bypassed))
        if other:
            self._fail(other_input(self.place.modules[0], run.given))

    def _unreached(self, reached: int, bypassed: bool) -> str:
        if bypassed and reached == 1 and not self.found.reentrant:
            return (
                f"first_layer must be the only way from the input to the output; the model also uses its input beside the "
                f"{self._name}: give a first_layer that contains every use of it"
            )
        return (
            f"the backward pass must reach the input through first_layer, once; it did {reached} times"
            + (", and by another path inside a reentrant checkpoint" if bypassed else "")
            + ("" if reached else ": `backward` must run one backward pass, and the loss depend on the first layer")
        )

    @property
    def _late(self) -> str:
        return (
            f"first_layer must be the only way from the input to the output, run once, on the model's input: in an earlier "
            f"step's pass the {self._name} was not, and that step's gradients are wrong"
        )

    def _fail(self, message: str) -> None:
        """Raise, with the gradients that this step made gone."""
        kind = RuntimeError if message.startswith("the backward pass") else ValueError
        raise kind(message + self._taken_back())

    def _taken_back(self) -> str:
        """Gradients that were None before the step are None again; what to say of the others."""
        for parameter in self.without_gradient:
            parameter.grad = None
        others = any(p.grad is not None for p in self.inspection.parameters)
        return "; `.grad` holds parts of this step and is unusable" if others else ""

    @property
    def _name(self) -> str:
        return type(self.place.modules[-1]).__name__


# --- on an accelerator: flags are read in the next step, when they are there ---

_pending: dict[int, tuple[Any, Tensor, str]] = {}


def keep_for_later(stand_in: StandIn, flags: list[Tensor], message: str) -> None:
    """Copy flags to the host without waiting: True, or [calls, another input] of a compiled graph, are errors."""
    if not flags or torch.cuda.is_current_stream_capturing():
        return
    bad = torch.stack([f if f.dim() == 0 else (f[0] != 1) | (f[1] != 0) for f in flags]).any()
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(bad, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending[id(stand_in)] = event, host, message


def raise_late_errors(stand_in: StandIn) -> None:
    """ValueError for what an earlier step's passes showed."""
    event, host, message = _pending.get(id(stand_in), (None, None, ""))
    if event is None or torch.cuda.is_current_stream_capturing() or not event.query():
        return
    del _pending[id(stand_in)]
    if bool(host):
        raise ValueError(message)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor; got {got}")
    return loss if loss.dim() == 0 else loss.reshape(())
