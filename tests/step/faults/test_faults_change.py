"""A model that is changed between its steps, or inside one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fault_oracle import Make, Net, Normalised, agrees, batch, conv, net, trades_agrees
from fault_rows import AS_EXPECTED, EAGER, EVERYWHERE, INDUCTOR, REFERENCE, TWO_PROCESSES, Row, Setting, cells
from torch import Tensor, nn

from yopo_ext import yopo_step

FIRST = r"\bfirst_layer\b"


def at(step: int, what: Callable[[Any], Any]) -> Callable[[nn.Module, int], Any]:
    """Does `what` to the model before this step."""
    return lambda model, k: what(model) if k == step else None


class Growing(Net):
    """Begins to use its input beside the first layer."""

    second = False
    box: list[bool] = []  # noqa: RUF012

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.box = []

    def forward(self, u: Tensor) -> Tensor:
        logits = super().forward(u)
        return logits + u.mean((1, 2, 3))[:, None] if self.second or self.box else logits


class CalledOften(Net):
    """Begins to call its first layer twice."""

    often = False

    def forward(self, u: Tensor) -> Tensor:
        logits = super().forward(u)
        return logits + self.first(u).mean() if self.often else logits


def hooked(model: Any) -> None:
    model.register_forward_hook(lambda module, inputs, output: output + inputs[0].mean((1, 2, 3))[:, None])


def rewired(model: Any) -> None:
    before = model.forward
    model.forward = lambda u: before(u) + u.amax((1, 2, 3))[:, None]


class Floats(Net):
    """Normalises with numbers."""

    mean, std = 0.5, 0.25

    def forward(self, u: Tensor) -> Tensor:
        return super().forward((u - self.mean) / self.std)


def fill(model: Any) -> None:
    model.norm.mean.fill_(0.3)
    model.norm.std.mul_(1.5)


def assign(model: Any) -> None:
    model.norm.mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)


def data(model: Any) -> None:
    model.norm.std.data.mul_(2.0)


def numbers(model: Any) -> None:
    model.mean, model.std = 0.4, 0.5


def replaced(model: Any) -> None:
    model.norm.forward = lambda u: (u - 0.3) / 0.6


def found(make: Make, change: Callable[[Any], Any], **options: Any):
    """The normalisation before "first" is found, and changed before the second step."""
    return agrees(make, ["norm", "first"], first_layer="first", change=at(1, change), steps=3, **options)


def dark(kind: str) -> Callable[[Tensor, int], Tensor]:
    def images(x: Tensor, k: int) -> Tensor:
        if k > 0:
            return x
        if kind == "one channel":
            x = x.clone()
            x[:, 1] = 0
            return x
        return {"zeros": 0 * x, "constant": 0 * x + 0.5, "dark": 1e-4 * x}[kind]

    return images


def weights_in_hook(first: Callable[[], nn.Module], where: str) -> Make:
    """Halves the first convolution's weights through `.data` inside the backward pass."""
    plain = net(first)

    def make() -> nn.Module:
        model: Any = plain()
        weight = next(model.first.parameters())

        def halve(*_: Any) -> None:
            weight.data.mul_(0.5)

        if where == "after its gradient":
            weight.register_post_accumulate_grad_hook(halve)
        elif where == "with its gradient":
            weight.register_hook(halve)
        else:
            model.body[2].register_full_backward_hook(halve)
        return model

    return make


class Shifting(Net):
    """Changes its input from its second call on."""

    calls = 0

    def forward(self, u: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(u if self.calls == 1 else u + 0.1 * u.square())


class Clamping(Net):
    """Clamps its input to [0, 1]."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u.clamp(0, 1))


def other_bounds(setting: Setting) -> None:
    model = setting.wrap(net(conv, Clamping)())
    x, y, eta = batch(0)
    for bounds in ((0.0, 1.0), (-0.5, 1.5)):
        yopo_step(
            model, x, y, first_layer="first", init=0.1 * eta, outer_steps=1, eps=0.2, step_size=0.2, bounds=bounds
        )


ROWS = [
    Row(
        "a model that changes inside a step", "its input, in the second pass",
        agrees(net(conv, Shifting), kinds=["sum"], first_layer="first", buffers_on_error=False), FIRST,
        settings=(EAGER, REFERENCE),
    ),
    Row("the bounds change", "of a model that clamps to the ones before", other_bounds, FIRST, settings=(EAGER, REFERENCE)),
    Row(
        "a second way from the input appears after the first step", "TRADES",
        trades_agrees(
            net(conv, Growing), change=at(1, lambda model: setattr(model, "second", True)), refused_from=1,
            buffers_on_error=False,
        ),
        FIRST,
    ),
    Row(
        "constants of a normalisation in the model change", "TRADES",
        trades_agrees(net(conv, Normalised), change=at(1, fill), steps=3),
    ),
    Row(
        "a first batch that does not show the normalisation", "TRADES, zeros",
        trades_agrees(net(conv, Normalised), images=dark("zeros"), steps=3, init=0.001 * batch(0)[2]),
    ),
    *(
        Row(
            "a second way from the input appears after the first step", name,
            agrees(net(conv, kind), ["first"], change=at(1, what), refused_from=1, buffers_on_error=False), FIRST,
        )
        for name, kind, what in (
            ("attribute", Growing, lambda model: setattr(model, "second", True)),
            ("inside a container", Growing, lambda model: model.box.append(True)),
            ("hook on the model", Net, hooked),
            ("forward replaced", Net, rewired),
            ("the layer is called twice", CalledOften, lambda model: setattr(model, "often", True)),
        )
    ),
    *(
        Row("constants of a normalisation in the model change", name, found(net(conv, Normalised), what), settings=where)
        for name, what, where in (
            ("in place", fill, (*EVERYWHERE, INDUCTOR)),
            ("assigned", assign, EVERYWHERE),
            ("through .data", data, EVERYWHERE),
            ("forward replaced", replaced, EVERYWHERE),
        )
    ),
    Row(
        "constants of a normalisation in the model change", "numbers",
        agrees(net(conv, Floats), kinds=["plain", "sum"], first_layer="first", change=at(1, numbers), steps=3),
    ),
    Row(
        "constants of a normalisation in the model change", "found without a name",
        agrees(net(conv, Normalised), ["norm", "first"], first_layer=None, change=at(1, fill), steps=3),
    ),
    *(
        Row(
            "a first batch that does not show the normalisation", kind,
            agrees(net(conv, Normalised), ["norm", "first"], first_layer="first", images=dark(kind), steps=3,
                   kinds=["plain", "released", "definition"]),
        )
        for kind in ("zeros", "constant", "dark", "one channel")
    ),
    *(
        Row(
            "weights changed through .data inside backward", name,
            agrees(weights_in_hook(first, where), kinds=["sum", "plain"], first_layer="first"),
            FIRST if non_linear else None, or_equal=True, settings=settings,
        )
        for name, first, where, non_linear, settings in (
            ("after its gradient", conv, "after its gradient", False, EVERYWHERE),
            ("before its gradient is there", conv, "with its gradient", False, (EAGER, TWO_PROCESSES, REFERENCE)),
            ("by a hook of the body", conv, "in the body", False, (EAGER, TWO_PROCESSES, REFERENCE)),
            ("by a hook of the body, convolution and SiLU", lambda: nn.Sequential(conv(), nn.SiLU()), "in the body",
             True, (EAGER, TWO_PROCESSES, REFERENCE)),
        )
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
