"""Training steps that `yopo_step` is measured against, each as its best PyTorch user would write it.

Each accumulates `.grad` for one batch and returns the last perturbation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yopo_ext import attacks


def _outer_pass(model: nn.Module, first: nn.Module, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
    """One full pass with all weight gradients; returns the costate."""
    kept: list[Tensor] = []
    hook = first.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        loss = F.cross_entropy(model(x + eta), y)
    finally:
        hook.remove()
    costates: list[Tensor] = []
    kept[0].register_hook(costates.append)
    loss.backward()
    return costates[0]


def released_step(
    model: nn.Module, first: nn.Module, x: Tensor, y: Tensor, eta: Tensor, *, m: int, n: int, eps: float, step: float
) -> Tensor:
    """The step of the paper's released code, without its forward for the progress bar."""
    for _ in range(m):
        p = -_outer_pass(model, first, x, y, eta)
        for _ in range(n):
            moved = x + eta
            inside = (moved >= 0) & (moved <= 1)
            u = moved.clamp(0, 1).requires_grad_()
            (g,) = torch.autograd.grad((first(u) * p).sum(), u)
            eta = (eta - step * torch.sign(g * inside)).clamp(-eps, eps)
            eta = (x + eta).clamp(0, 1) - x
        (-(first((x + eta).clamp(0, 1)) * p).sum()).backward()
    return eta


def collapsed_step(
    model: nn.Module, first: nn.Module, x: Tensor, y: Tensor, eta: Tensor, *, m: int, n: int, eps: float, step: float
) -> Tensor:
    """The same gradients with the inner loop written by hand: one input gradient for an affine layer, no graph for conv + ReLU."""
    conv, relu = (first, False) if isinstance(first, nn.Conv2d) else (first[0], True)  # type: ignore[index]
    geometry = (conv.stride, conv.padding, conv.dilation, False, [0, 0], 1)
    a, b = torch.clamp(-x, min=-eps), torch.clamp(1 - x, max=eps)

    def backward(u: Tensor, q: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(q, u, conv.weight, [conv.out_channels], *geometry, mask)

    def hidden_gradient(u: Tensor, p: Tensor) -> Tensor:
        return p * (F.conv2d(u, conv.weight, conv.bias, conv.stride, conv.padding) > 0) if relu else p

    for _ in range(m):
        p = _outer_pass(model, first, x, y, eta)
        with torch.no_grad():
            for j in range(n):
                if relu or j == 0:
                    u = (x + eta).clamp(0, 1)
                    s = step * backward(u, hidden_gradient(u, p), [True, False, False])[0].sign()
                outside = (eta < -x) | (eta > 1 - x)
                moved = eta + (torch.where(outside, 0.0, s) if j == 0 else s)
                eta = torch.minimum(torch.maximum(moved, a), b)
            u = x + eta
            grads = backward(u, hidden_gradient(u, p), [False, True, conv.bias is not None])
            conv.weight.grad += grads[1]
            if conv.bias is not None:
                conv.bias.grad += grads[2]
    return eta


def pgd_step(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, eps: float, step: float) -> Tensor:
    """PGD adversarial training: the attack in eval mode, without weight gradients, then one update."""
    eta = attacks.pgd(model, x, y, eps=eps, step_size=step, steps=steps).perturbation
    F.cross_entropy(model(x + eta), y).backward()
    return eta


def fgsm_rs_step(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step: float) -> Tensor:
    """FGSM with a random start: one input gradient, one update."""
    start = torch.empty_like(x).uniform_(-eps, eps).clamp(-x, 1 - x).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x + start), y), start)
    eta = torch.minimum(torch.maximum((start.detach() + step * g.sign()).clamp(-eps, eps), -x), 1 - x)
    F.cross_entropy(model(x + eta), y).backward()
    return eta


def plain_passes(model: nn.Module, x: Tensor, y: Tensor, *, m: int) -> Tensor:
    """m forward/backward passes: what a step cannot cost less than."""
    for _ in range(m):
        F.cross_entropy(model(x), y).backward()
    return torch.zeros_like(x)


def gradients(model: nn.Module, step: Callable[[], Tensor]) -> list[Tensor]:
    """The gradients one step leaves behind."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
