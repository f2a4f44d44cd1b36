"""Starts outside the bounds: only "released" leaves out their first inner step (`mask_start`, DESIGN section 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fault_oracle import EPS, SIGMA, Make, agrees, batch, conv, net, same, same_model
from fault_rows import AS_EXPECTED, EAGER, EVERYWHERE, INDUCTOR, REFERENCE, TWO_PROCESSES, Row, Setting, cells
from torch import Tensor, nn

from yopo_ext import trades_yopo_step

STEMS = {
    "affine": net(conv),
    "non-linear": net(lambda: nn.Sequential(conv(), nn.SiLU())),
    "BatchNorm": net(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())),
    "autograd layer": net(lambda: nn.Sequential(conv(), nn.Tanh())),
    "affine autograd layer": net(lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
}
NOT_COMPILED = (EAGER, TWO_PROCESSES, REFERENCE)
SIZES = {"linf": {"eps": EPS, "step_size": SIGMA}, "l2": {"eps": 0.9, "step_size": 0.4}}


def saturated(x: Tensor, k: int) -> Tensor:
    """Many pixels are 0 and 1."""
    return torch.where((x < 0.3) | (x > 0.7), x.round(), x)


def outside(x: Tensor, eta: Tensor) -> Tensor:
    """A start that leaves the bounds, and the ball, in places."""
    generator = torch.Generator().manual_seed(4)
    return (torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1) * 1.3 * EPS


def trades(make: Make, steps: int):
    """TRADES' published update from its own start, which is projected on nothing."""
    eps, step_size, beta = 8 / 255, 2 / 255, 6.0

    def run(setting: Setting) -> None:
        ours, theirs = make(), make()
        x, y, _ = batch(0, setting.rank)
        x = saturated(x, 0)
        start = 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(8), dtype=x.dtype)
        result = trades_yopo_step(
            setting.wrap(ours), x, y, first_layer="first", beta=beta, outer_steps=steps, inner_steps=1, eps=eps,
            step_size=step_size, init=start,
        )  # fmt: skip
        theirs.eval()
        attacked = x + start
        for _ in range(steps):
            attacked.requires_grad_()
            clean = F.softmax(theirs(x), dim=1)
            divergence = F.kl_div(F.log_softmax(theirs(attacked), dim=1), clean, reduction="sum")
            (g,) = torch.autograd.grad(divergence, attacked)
            attacked = attacked.detach() + step_size * torch.sign(g)
            attacked = torch.clamp(torch.min(torch.max(attacked, x - eps), x + eps), 0, 1)
        theirs.train()
        logits = theirs(x)
        divergence = F.kl_div(F.log_softmax(theirs(attacked), dim=1), F.softmax(logits, dim=1), reduction="batchmean")
        loss = F.cross_entropy(logits, y) + beta * divergence
        loss.backward()
        with setting.together():
            same("perturbation", result.perturbation, attacked - x, 0, 1e-12)
            same("loss", result.loss, loss.detach(), 0, 1e-12)
        same_model(setting, ours, theirs, buffers=False, rtol=0, atol=1e-12)

    return run


ROWS = [
    *(
        Row(
            f"a start outside the bounds, {gradient}", f"{norm}, {stem}",
            agrees(
                make, ["first"], kinds=["definition"], images=saturated, start=outside, gradient=gradient, norm=norm,
                compare={"reduction": "sum"}, reduction="sum", **SIZES[norm],
            ),
            settings=(*EVERYWHERE, INDUCTOR) if stem == "affine" and norm == "linf"
            else EVERYWHERE if gradient == "paper" else NOT_COMPILED,
        )
        for gradient in ("paper", "full", "released")
        for norm in ("linf", "l2")
        for stem, make in STEMS.items()
    ),
    *(
        Row("TRADES from its own start", f"{stem}, {steps} step{'s' * (steps > 1)}", trades(STEMS[stem], steps))
        for stem in ("affine", "non-linear", "autograd layer")
        for steps in (1, 5)
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
