"""A step of any model whose first layer can be named, written with plain autograd from its definition.

The first layer is cut by replacing its `forward` once per step: the recorded call notes the output and gives the rest of
the model a leaf, whose gradient is the costate. Every other evaluation of the first layer is a *replay*: the whole model
runs from its input up to the first layer, with buffers, attributes and random states as they were before the recorded
call, on copies that are dropped. In inner steps BatchNorm keeps the (biased) statistics of the recorded call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from cut import Cut
from torch import Tensor, nn

AMBIGUOUS = 1e-9  # a gradient this small beside the largest of its image has no certain sign


@dataclass
class Settings:
    """The arguments of a step that the definition speaks of."""

    outer_steps: int = 1
    inner_steps: int = 1
    eps: float = 0.1
    step_size: float = 0.03
    norm: str = "linf"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    mean: Any = None
    std: Any = None
    gradient: str = "paper"
    reduction: str | None = None
    train_on: str = "all"
    masked: bool | None = None  # None: for "released" only


@dataclass
class Result:
    """What a step leaves, beside `.grad` and buffers."""

    eta: Tensor
    losses: list[Tensor] = field(default_factory=list)
    output: Any = None
    ambiguous: bool = False


def _column(value: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype).reshape(-1, 1, 1)


def prepared(u: Tensor, s: Settings) -> Tensor:
    return u if s.mean is None else (u - _column(s.mean, u)) / _column(s.std, u)


def limits(x: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    if s.bounds is None:
        return torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)
    return torch.clamp(s.bounds[0] - x, max=0), torch.clamp(s.bounds[1] - x, min=0)


def _norms(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def ascend(cut: Cut, x: Tensor, result: Result, p: Tensor, s: Settings, masked: bool) -> None:
    """The inner steps of one pass."""
    lower, upper = limits(x, s)
    for i in range(s.inner_steps):
        eta = result.eta
        u = x + eta
        if masked and s.bounds is not None:
            u = torch.clamp(u, *s.bounds)
        u = u.requires_grad_()
        (g,) = torch.autograd.grad(cut.replay(prepared(u, s), True), u, p, allow_unused=True, retain_graph=True)
        g = torch.zeros_like(x) if g is None else g
        if masked and i == 0:
            g = torch.where((eta < lower) | (eta > upper), 0.0, g)
        size = g.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
        if s.norm == "linf":
            unsure = (g != 0) & (g.abs() < AMBIGUOUS * size)
            eta = torch.clamp(eta + s.step_size * g.sign(), -s.eps, s.eps)
        else:
            unsure = (size > 0) & (size < 1e-13)
            eta = eta + s.step_size * torch.where(_norms(g) > 0, g / _norms(g), 0.0)
            eta = eta * torch.clamp(s.eps / _norms(eta).clamp_min(1e-300), max=1.0)
        result.ambiguous |= bool(unsure.any()) or (s.norm == "linf" and bool(((size > 0) & (size < 1e-13)).any()))
        result.eta = torch.minimum(torch.maximum(eta, lower), upper)


@contextmanager
def untrained(*modules: nn.Module) -> Iterator[None]:
    kept = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    for p, _ in kept:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in kept:
            p.requires_grad_(flag)


def one_pass(
    cut: Cut, x: Tensor, result: Result, objective: Callable[[Any], Tensor], s: Settings, *, scale: float, gradient: str,
    masked: bool,
) -> None:  # fmt: skip
    """One full pass: gradients of the rest, the costate, what the first layer gets, and the moved perturbation."""
    cut.forget()
    cut.mode = "record"
    given = prepared(x + result.eta, s).requires_grad_()
    output = cut.model(given.clone())
    cut.mode = "off"
    loss = objective(output)
    cut.mode = "record"
    (scale * loss).backward()
    cut.mode = "off"
    p = cut.leaf.grad
    p = torch.zeros_like(cut.leaf) if p is None else p
    result.losses.append(loss.detach().reshape(()))
    result.output = output
    trains = any(q.requires_grad for q in cut.model.parameters())
    if trains and gradient in ("full", "released") and cut.output.requires_grad:
        cut.output.backward(p, retain_graph=True)
    ascend(cut, x, result, p, s, masked)
    if trains and gradient in ("paper", "released"):
        again = cut.replay(prepared(x + result.eta, s), False)
        if again.requires_grad:
            again.backward(p, retain_graph=True)


def yopo(
    model: nn.Module, layer: nn.Module, x: Tensor, y: Any, eta: Tensor, loss_fn: Callable[[Any, Any], Tensor], s: Settings,
    after_backward: Callable[[int], None] | None = None, after_pass: Callable[[int], None] | None = None,
) -> Result:  # fmt: skip
    """`yopo_step` by definition; accumulates `.grad` and moves buffers."""
    mean = s.reduction == "mean" or (s.reduction is None and s.gradient != "released" and after_pass is None)
    scale = 1.0 / s.outer_steps if mean and s.train_on == "all" else 1.0
    masked = s.gradient == "released" if s.masked is None else s.masked
    cut, result = Cut(model, layer), Result(eta)
    losses = [loss_fn] if isinstance(loss_fn, nn.Module) else []
    with cut.installed():
        for j in range(s.outer_steps):
            last = j == s.outer_steps - 1
            train = s.train_on == "all" or last
            with ExitStack() as stack:
                if not train:
                    stack.enter_context(untrained(model, *losses))
                one_pass(
                    cut, x, result, lambda out: loss_fn(out, y), s, scale=scale if train else 1.0,
                    gradient=s.gradient if train else "none", masked=masked,
                )  # fmt: skip
            if after_backward is not None:
                after_backward(j)
            if after_pass is not None and train:
                after_pass(j)
    return result


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """sum p log(p / q) / B"""
    p, q = clean.softmax(1), logits.softmax(1)
    return (p * (p.log() - q.log())).sum() / len(p)


def trades(
    model: nn.Module, layer: nn.Module, x: Tensor, y: Any, eta: Tensor, loss_fn: Callable[[Any, Any], Tensor], s: Settings,
    beta: float, bn_mode: str,
) -> tuple[Result, Tensor]:  # fmt: skip
    """`trades_yopo_step` by definition; (result, loss of the update)."""
    modes = [(m, m.training) for m in model.modules()]
    cut, result = Cut(model, layer), Result(eta)
    if bn_mode == "eval":
        model.eval()
    with cut.installed(), untrained(model):
        with torch.no_grad():
            clean = model(prepared(x, s))
        for _ in range(s.outer_steps):
            masked = bool(s.masked)
            one_pass(
                cut,
                x,
                result,
                lambda out: divergence(out, clean),
                s,
                scale=float(len(x)),
                gradient="none",
                masked=masked,
            )
    for module, mode in modes:
        module.training = mode
    clean = model(prepared(x, s))
    result.output = model(prepared(x + result.eta, s))
    loss = loss_fn(clean, y) + beta * divergence(result.output, clean)
    loss.backward()
    return result, loss.detach()


def plain(
    model: nn.Module, x: Tensor, y: Any, loss_fn: Callable[[Any, Any], Tensor], s: Settings, scale: float
) -> Tensor:
    """A plain training pass; accumulates `.grad`."""
    loss = loss_fn(model(prepared(x, s)), y)
    (scale * loss).backward()
    return loss.detach()
