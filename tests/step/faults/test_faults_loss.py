"""Losses that run the model themselves, or keep a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fault_oracle import LossFunction, Net, agrees, batch, conv, net, trades_agrees
from fault_rows import AS_EXPECTED, EAGER, EVERYWHERE, REFERENCE, TWO_PROCESSES, Row, cells
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLEAN = batch(9)[0]
NOT_COMPILED = (EAGER, TWO_PROCESSES, REFERENCE)


def pairing(model: Any) -> LossFunction:
    """Adversarial logit pairing: the clean branch is trained too."""
    return lambda output, y: F.cross_entropy(output, y) + 2 * F.mse_loss(output, model(CLEAN))


def consistency(model: Any) -> LossFunction:
    """The clean branch is a target."""

    def loss(output: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = model(CLEAN).softmax(1)
        return F.cross_entropy(output, y) + F.mse_loss(output.softmax(1), target)

    return loss


def features(model: Any) -> LossFunction:
    """Only the first layer runs again."""
    return lambda output, y: F.cross_entropy(output, y) + model.first(CLEAN).square().mean()


def later(make: Callable[[Any], LossFunction], calls: int) -> Callable[[Any], LossFunction]:
    """`make`'s loss after this many calls, cross-entropy before."""

    def loss_of(model: Any) -> LossFunction:
        full, seen = make(model), [0]

        def loss(output: Tensor, y: Tensor) -> Tensor:
            seen[0] += 1
            return full(output, y) if seen[0] > calls else F.cross_entropy(output, y)

        return loss

    return loss_of


class Checkpointed(Net):
    """Recomputes part of its forward in backward."""

    part, reentrant = "all", False

    def forward(self, u: Tensor) -> Tensor:
        if self.part == "all":
            return checkpoint(super().forward, u, use_reentrant=self.reentrant)
        if self.part == "first":
            return self.body(checkpoint(self.first, u, use_reentrant=self.reentrant))
        return checkpoint(self.body, self.first(u), use_reentrant=self.reentrant)


class FirstCheckpointed(Checkpointed):
    part = "first"


class BodyCheckpointed(Checkpointed):
    part, reentrant = "body", True


class Reentrant(Checkpointed):
    reentrant = True


def pairing_with_leaf(model: Any) -> LossFunction:
    """A reentrant checkpoint has a backward only if its input wants one."""
    return lambda output, y: F.cross_entropy(output, y) + 2 * F.mse_loss(output, model(CLEAN.clone().requires_grad_()))


def penalty(model: Any) -> LossFunction:
    """The penalty's graph is made once and used by every pass."""
    kept = model.body[-1].weight.square().sum()
    return lambda output, y: F.cross_entropy(output, y) + kept


def previous(model: Any) -> LossFunction:
    """The loss holds on to the graph of its first output."""
    kept: list[Tensor] = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        kept.append(output)
        return F.cross_entropy(output, y) + F.mse_loss(output, kept[0] * 0.5)

    return loss


def first_weights(model: Any) -> LossFunction:
    """The penalty's graph hangs on the first layer's weights."""
    kept = model.first.weight.abs().sum().square() * 1e-3
    return lambda output, y: F.cross_entropy(output, y) + kept


def normed() -> nn.Module:
    """An autograd layer whose weight is an attribute with a graph, made anew before every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"))


def retain(loss: Tensor) -> None:
    loss.backward(retain_graph=True)


def evaluated(model: nn.Module, k: int) -> None:
    """BatchNorm's buffers do not move: DistributedDataParallel forbids two forwards that move them."""
    model.eval()


# "released" doubles the first layer's gradient of the pass, not that of the loss's own calls.
OWN_CALLS = ["plain", "sum", "full", "definition"]
RETAIN = r"backward=.*retain_graph=True"

ROWS = [
    *(
        Row(
            "a loss that runs the model again", name,
            agrees(net(first, Net), ["first"], loss=loss, change=evaluated, kinds=OWN_CALLS),
        )
        for name, first, loss in (
            ("logit pairing", conv, pairing),
            ("consistency, without gradients", conv, consistency),
            ("the first layer only", conv, features),
            ("logit pairing, autograd layer", lambda: nn.Sequential(conv(), nn.Tanh()), pairing),
        )
    ),
    Row(
        "a loss that runs the model again", "logit pairing in training mode",
        agrees(
            net(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())), ["first"], loss=pairing, kinds=OWN_CALLS
        ),
        settings=(EAGER, REFERENCE),
    ),
    *(
        Row(
            "a loss that runs the model again", f"{name}, a weight that a hook computes",
            agrees(net(normed), ["first"], loss=loss, change=evaluated, kinds=["plain", "sum", "full"]),
            settings=(EAGER, REFERENCE),
        )
        for name, loss in (("logit pairing", pairing), ("consistency, without gradients", consistency))
    ),
    *(
        Row("a loss that runs the model again", f"TRADES, {name}", trades_agrees(net(conv), loss=loss, change=evaluated))
        for name, loss in (("logit pairing", pairing), ("consistency", consistency))
    ),
    *(
        Row(
            "a loss that begins to run the model", name,
            agrees(net(conv), ["first"], loss=later(loss, calls), change=evaluated, steps=3, kinds=OWN_CALLS),
        )
        for name, loss, calls in (
            ("after some steps", pairing, 3),
            ("in the second pass of the first step", pairing, 1),
            ("without gradients", consistency, 2),
        )
    ),
    *(
        Row(
            "a checkpointed model inside the loss", name,
            agrees(net(conv, kind), ["first"], loss=loss, change=evaluated, kinds=["definition", "plain", "sum"]),
            settings=where,
        )
        for name, kind, loss, where in (
            ("whole model", Checkpointed, pairing, EVERYWHERE),
            ("first layer", FirstCheckpointed, pairing, EVERYWHERE),
            # Not in two processes: DistributedDataParallel forbids two reentrant checkpoints of one module.
            ("body, reentrant", BodyCheckpointed, pairing, (EAGER, REFERENCE)),
            ("first layer, begins late", FirstCheckpointed, later(pairing, 2), NOT_COMPILED),
        )
    ),
    Row(
        "a checkpointed model inside the loss", "whole model, reentrant",
        # The plain pass needs an input that wants a gradient; the perturbed input of the definition does not.
        agrees(
            net(conv, Reentrant), kinds=["plain", "sum"], first_layer="first", loss=pairing_with_leaf, change=evaluated,
            plain_input=lambda x: x.clone().requires_grad_(),
        ),
        settings=(EAGER, REFERENCE),
    ),
    *(
        Row(
            "a loss that keeps a graph", f"{name}{', graph retained' if right else ''}",
            agrees(
                net(conv), kinds=["sum"], first_layer="first", loss=loss, change=evaluated, steps=1,
                buffers_on_error=False, plain_backward=retain, **({"backward": retain} if right else {}),
            ),
            None if right else RETAIN,
        )
        for right in (False, True)
        for name, loss in (
            ("penalty of a head's weights", penalty), ("penalty of the first layer's weights", first_weights),
            ("first output", previous),
        )
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
