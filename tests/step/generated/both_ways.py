"""Takes one step of a draft: with the package, by the definition, and as plain training passes."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import definition
import numpy as np
import torch
import torch.nn.functional as F
from definition import Result
from draft import Built, Draft, Step
from networks import Output
from torch import Tensor, nn

import yopo_ext

BETA = 3.0  # of TRADES


def set_seeds(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def logits_of(output: Any) -> Tensor:
    if isinstance(output, Output):
        return output.logits
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


def _loss(step: Step, again: Callable[[], Any]) -> Any:
    if step.loss == "smoothed":
        smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
        return smoothed if step.call == "trades" else lambda output, y: smoothed(logits_of(output), y)
    if step.loss == "squares":
        return lambda output, y: (logits_of(output) - F.one_hot(y, 3)).square().mean()
    if step.loss == "calls_model":
        return lambda output, y: (
            F.cross_entropy(logits_of(output), y) + 0.1 * (logits_of(output) - logits_of(again())).square().mean()
        )
    return F.cross_entropy


def _logits_only(step: Step, draft: Draft) -> bool:
    """Whether the model is called through `forward`, which gives the logits."""
    return "forward" in step.options or (
        draft.out != "tensor" and (step.call == "trades" or step.loss == "cross_entropy")
    )


def _optimizer(built: Built) -> Callable[[int], None]:
    optimizer = torch.optim.SGD([p for p in built.net.parameters() if p.requires_grad], lr=0.02)

    def after_pass(_: int) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return after_pass


def package(draft: Draft, step: Step, mine: Built, x: Tensor, y: Tensor, eta: Tensor) -> Any:
    s = step.settings
    arguments: dict[str, Any] = {
        "first_layer": mine.argument(draft.named), "outer_steps": s.outer_steps, "inner_steps": s.inner_steps, "eps": s.eps,
        "step_size": s.step_size, "norm": s.norm, "bounds": s.bounds, "mean": s.mean, "std": s.std, "init": eta,
    }  # fmt: skip
    prepared = definition.prepared(x, s).to(next(mine.net.parameters()).dtype)
    arguments["loss_fn"] = _loss(step, lambda: mine.model(prepared))
    if _logits_only(step, draft):
        arguments["forward"] = lambda model, u: logits_of(model(u))
    if "backward" in step.options:
        arguments["backward"] = lambda loss: torch.autograd.backward([loss])
    if "skip" in step.options:
        arguments["on_nonfinite"] = "skip"
    with torch.autocast("cpu", torch.bfloat16) if draft.dtype == "autocast" else nullcontext():
        if step.call == "trades":
            return yopo_ext.trades_yopo_step(mine.model, x, y, beta=BETA, bn_mode=step.bn_mode, **arguments)
        if "after_pass" in step.options:
            arguments["after_pass"] = _optimizer(mine)
        return yopo_ext.yopo_step(
            mine.model, x, y, gradient=s.gradient, reduction=s.reduction, train_on=s.train_on, **arguments
        )


def defined(draft: Draft, step: Step, theirs: Built, layer: nn.Module, x: Tensor, y: Tensor, eta: Tensor) -> Result:
    loss = _loss(step, lambda: theirs.model(definition.prepared(x, step.settings)))
    if step.call == "trades":
        result, total = definition.trades(
            _Logits(theirs.model), layer, x, y, eta, loss, step.settings, BETA, step.bn_mode
        )
        result.losses.append(total)
        return result
    after = _optimizer(theirs) if "after_pass" in step.options else None
    model = _Logits(theirs.model) if _logits_only(step, draft) else theirs.model
    return definition.yopo(model, layer, x, y, eta, loss, step.settings, after_pass=after)


class _Logits(nn.Module):
    """A model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, u: Tensor) -> Tensor:
        return logits_of(self.model(u))


def plain_passes(draft: Draft, step: Step, theirs: Built, layer: Any, x: Tensor, y: Tensor, eta: Tensor) -> Result:
    """At eps = 0: as many training passes as the step has; the first layer's gradient twice for "released"."""
    s = step.settings
    kept = [p.grad for p in theirs.net.parameters()]
    theirs.net.zero_grad()
    result = Result(eta)
    u = definition.prepared(x, s).to(next(theirs.net.parameters()).dtype)
    loss_fn = _loss(step, lambda: theirs.model(u))
    mean = s.reduction == "mean" or (s.reduction is None and s.gradient != "released")
    for _ in range(s.outer_steps):
        with torch.autocast("cpu", torch.bfloat16) if draft.dtype == "autocast" else nullcontext():
            # A reentrant checkpoint has a backward only if its input wants one.
            result.output = theirs.model(u.detach().requires_grad_().clone())
            loss = loss_fn(logits_of(result.output) if _logits_only(step, draft) else result.output, y)
        torch.autograd.backward(loss / s.outer_steps if mean else loss)
        result.losses.append(loss.detach())
    if s.gradient == "released":
        for p in () if layer is None else layer.parameters():
            if p.grad is not None:
                p.grad *= 2
    for p, gradient in zip(theirs.net.parameters(), kept, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad + gradient
    return result
