"""Units of the arguments, and what a result promises."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fault_oracle import Make, Net, agrees, batch, conv, net, same, trades_agrees
from fault_rows import AS_EXPECTED, EAGER, ONE_PROCESS, REFERENCE, TWO_PROCESSES, Row, Setting, cells
from torch import Tensor

from yopo_ext import yopo_step

HERE = (EAGER, REFERENCE)
NOT_COMPILED = (EAGER, TWO_PROCESSES, REFERENCE)


@dataclass
class Record:
    logits: Tensor
    features: list[Tensor]


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    inner: Record


class Plain:
    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.features = logits, {"of the body": features}


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


class ModelOutput(OrderedDict):  # as Hugging Face's
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda z: Record(z, [z * 2]),
    "frozen dataclass with a dataclass in it": lambda z: Frozen(z, Record(z + 1, [z * 2])),
    "plain object": lambda z: Plain(z, z * 2),
    "object with slots": lambda z: Slots(z),
    "named tuple (guard)": lambda z: Pair(z, z * 2),
    "mapping with attributes": lambda z: ModelOutput(logits=z, features=[z * 2]),
}


def returning(make: Callable[[Tensor], Any]) -> Make:
    class Returning(Net):
        def forward(self, u: Tensor) -> Any:
            return make(super().forward(u))

    return net(conv, Returning)


def tensors(output: Any) -> list[Tensor]:
    """Every tensor that a result reaches."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        held = [*output.values(), *getattr(output, "__dict__", {}).values()]
        return [t for value in held for t in tensors(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in tensors(value)]
    names = [*getattr(output, "__dict__", {}), *getattr(type(output), "__slots__", ())]
    return [t for name in names for t in tensors(getattr(output, name))]


def detached(make: Callable[[Tensor], Any]):
    """The result holds the model's output, of its type, with its values and without its graph."""

    def run(setting: Setting) -> None:
        ours, theirs = returning(make)(), returning(make)()
        x, y, _ = batch(0, setting.rank)
        result = yopo_step(
            setting.wrap(ours), x, y, first_layer="first", outer_steps=1, eps=0.0, step_size=0.0,
            loss_fn=lambda output, y: F.cross_entropy(output.logits, y),
        )  # fmt: skip
        expected: Any = theirs(x)
        with setting.together():
            assert type(result.logits) is type(expected)
            found, wanted = tensors(result.logits), tensors(expected)
            assert len(found) == len(wanted) > 0
            for i, (mine, other) in enumerate(zip(found, wanted, strict=True)):
                same(f"tensor {i}", mine.detach(), other.detach())
            kept = [i for i, t in enumerate(found) if t.requires_grad]
            assert not kept, f"tensors {kept} of {len(found)} keep their graph"

    return run


def in_inference_mode(inside: bool):
    """A step has gradients whatever the caller's mode is, or says why it cannot."""

    def run(setting: Setting) -> None:
        def step(setting: Setting = setting) -> None:
            agrees(net(conv), ["first"], kinds=["plain"], images=lambda x, k: x.clone() if inside else x)(setting)

        with torch.inference_mode():
            if inside:
                step()
                return
        model = net(conv)()
        x, y, _ = batch(0)
        with torch.inference_mode():
            yopo_step(model, x, y, first_layer="first", outer_steps=1, eps=0.0, step_size=0.0)
        assert all(p.grad is not None for p in model.parameters())

    return run


STEP_SIZE = r"\bstep_size\b"
BOTH: dict[str, Any] = {"yopo_step": agrees, "trades_yopo_step": trades_agrees}
WIDE = {"bounds": (0.0, 255.0), "eps": 8.0, "step_size": 2.0}

ROWS = [
    *(
        Row("step_size in units of 0..255", f"{name}, {kind}",
            checked(net(conv), first_layer="first", eps=8 / 255, step_size=value), STEP_SIZE,
            settings=NOT_COMPILED if kind == "a number" else HERE)
        for name, checked in BOTH.items()
        for kind, value in (
            ("a number", 2), ("per channel", [2.0, 2.0, 2.0]), ("one channel", [2 / 255, 2 / 255, 2.0]),
            ("a tensor", torch.tensor(2.0)),
        )
    ),
    *(
        Row("eps in units of 0..255 (guard)", name, checked(net(conv), first_layer="first", eps=8, step_size=2 / 255), r"\beps\b",
            settings=HERE)
        for name, checked in BOTH.items()
    ),
    Row("step_size that fits wider bounds (guard)", "bounds of 0..255",
        agrees(net(conv), ["first"], kinds=["definition"], images=lambda x, k: 255 * x,
               start=lambda x, eta: torch.clamp(x + 80 * eta, 0, 255) - x, **WIDE), settings=HERE),
    Row("step_size that fits wider bounds (guard)", "unbounded",
        agrees(net(conv), ["first"], kinds=["definition"], bounds=None, eps=4.0, step_size=2.0,
               compare={"bounds": (-1e9, 1e9)}), settings=HERE),
    Row("step_size that fits wider bounds (guard)", "L2",
        agrees(net(conv), ["first"], kinds=["definition"], norm="l2", eps=3.0, step_size=2.0), settings=HERE),
    *(
        Row("a result is detached", name, detached(make), settings=ONE_PROCESS if "dataclass" in name else HERE)
        for name, make in OUTPUTS.items()
    ),
    *(
        Row("under inference_mode", name, in_inference_mode(inside),
            r"\bx\b|\bmodel\b|inference_mode", or_equal=True, settings=HERE)
        for name, inside in (("all of it", True), ("only the step", False))
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
