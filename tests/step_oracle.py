"""The step written with plain autograd from its definition: what `yopo_step` must equal in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """`first` may be any first layer with 6 output channels (or features)."""

    def __init__(self, first: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.first = first
        head = [nn.Flatten(), nn.LazyLinear(5)]
        body = [nn.ReLU(inplace=True)] if flat else [nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3)]
        self.flat = flat
        self.rest = nn.Sequential(*body, *head)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x.flatten(1) if self.flat else x))


def network(make: Callable[[], nn.Module], flat: bool = False, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(11)
    model = Network(make(), flat).to(dtype)
    model.eval()(torch.rand(2, 3, 8, 7, dtype=dtype))  # materialises the lazy layer
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            if module.track_running_stats:
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.train()


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(x with saturated pixels, y, an eta_0 that partly leaves the pixel bounds)."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(6, 3, 8, 7, generator=generator, dtype=torch.float64)
    x[0, :, :3], x[1, :, :3] = 0, 1
    y = torch.randint(0, 5, (6,), generator=generator)
    eta = (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1) * 0.1
    return x.to(dtype), y, eta.to(dtype)


def frozen(first: nn.Module, u: Tensor) -> nn.Module:
    """A copy of the first layer whose BatchNorms keep the (biased) statistics they have on u."""
    copied = copy.deepcopy(first)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):

            def keep(bn: nn.Module, inputs: tuple[Tensor]) -> None:
                z = inputs[0].detach()
                z = z if z.dtype == torch.float64 else z.float()  # the statistics of a bf16 layer are fp32
                bn.running_var, bn.running_mean = torch.var_mean(z, (0, 2, 3), correction=0)
                bn.track_running_stats = True
                bn.eval()

            module.register_forward_pre_hook(keep)
            with torch.no_grad():
                copied(u)
            module._forward_pre_hooks.clear()
    return copied


def oracle_step(
    model: Network, x: Tensor, y: Tensor, eta: Tensor, *, m: int, n: int, eps: float, step_size: float, gradient: str,
    norm: str = "linf", scale: float = 1.0, prepare: Callable[[Tensor], Tensor] = lambda u: u,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Accumulates `.grad`; returns the last perturbation and the losses."""
    lo, hi = bounds
    mask_start = gradient == "released"
    lower, upper = torch.clamp(lo - x, max=0), torch.clamp(hi - x, min=0)

    def first(layer: nn.Module, u: Tensor) -> Tensor:
        u = prepare(u)
        return layer(u.flatten(1) if model.flat else u)

    losses = []
    for _ in range(m):
        still = frozen(model.first, (prepare(x + eta).flatten(1) if model.flat else prepare(x + eta)))
        before = copy.deepcopy(model.first)
        hidden = first(model.first, x + eta)
        leaf = hidden.detach().requires_grad_()
        loss = F.cross_entropy(model.rest(leaf * 1.0), y)
        (scale * loss).backward()
        p = leaf.grad
        losses.append(loss.detach())
        if gradient in ("full", "released"):
            hidden.backward(p)
        for i in range(n):
            u = (torch.clamp(x + eta, lo, hi) if mask_start else x + eta).requires_grad_()
            (g,) = torch.autograd.grad(first(still, u), u, p)
            if mask_start and i == 0:
                g = torch.where((eta < lower) | (eta > upper), 0.0, g)
            if norm == "linf":
                eta = torch.clamp(eta + step_size * g.sign(), -eps, eps)
            else:
                length = g.flatten(1).norm(dim=1)[:, None, None, None]
                eta = eta + step_size * torch.where(length > 0, g / length, 0.0)
                length = eta.flatten(1).norm(dim=1)[:, None, None, None]
                eta = eta * torch.clamp(eps / length, max=1.0)
            eta = torch.minimum(torch.maximum(eta, lower), upper)
        if gradient in ("paper", "released"):
            again = first(before, x + eta)
            for parameter, g in zip(
                model.first.parameters(), torch.autograd.grad(again, list(before.parameters()), p), strict=True
            ):
                parameter.grad = g if parameter.grad is None else parameter.grad + g
    return eta, losses


def gradients_along(
    model: Network, x: Tensor, y: Tensor, etas: Sequence[Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """The gradients of a "paper" step whose perturbations are given, by the names of the model's parameters.

    A sign that flips where the gradient is almost zero moves the perturbation, and with it every gradient after it, by far
    more than rounding. A step of low precision is therefore held to the exact gradients at the perturbations it went to.
    """
    names = [name for name, _ in model.named_parameters()]
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for before, after in pairwise(etas):
        leaf = model.first(x + before).detach().requires_grad_()
        loss = scale * F.cross_entropy(model.rest(leaf * 1.0), y)
        p, *rest = torch.autograd.grad(loss, [leaf, *model.rest.parameters()])
        first = torch.autograd.grad(model.first(x + after), list(model.first.parameters()), p)
        for name, gradient in zip(names, [*first, *rest], strict=True):
            total[name] += gradient
    return total
