"""The first-layer operation as products of PyTorch's library with the package's own steps between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .constants import ACTIVATIONS
from .costs import are_patches


class _Patches(reference._FirstLayer):
    """A convolution whose patches do not overlap, as products of matrices [B * OH * OW, C * R * S]."""

    def _shape(self, u: Tensor) -> tuple[int, ...]:
        """(B, C, OH, R, OW, S)"""
        rows, cols = self.weight.shape[2:]
        return (*u.shape[:2], u.shape[2] // rows, rows, u.shape[3] // cols, cols)

    def _patches(self, u: Tensor) -> Tensor:
        _, _, height, rows, width, cols = shape = self._shape(u)
        inside = u[:, :, : height * rows, : width * cols]
        return inside.reshape(shape).permute(0, 2, 4, 1, 3, 5).reshape(-1, shape[1] * rows * cols)

    def convolve(self, u: Tensor) -> Tensor:
        batch, _, height, _, width, _ = self._shape(u)
        z = torch.nn.functional.linear(self._patches(self.normalise(u)), self.weight.flatten(1), self.bias)
        return z.reshape(batch, height, width, -1).permute(0, 3, 1, 2)

    def products_backward(self, u: Tensor, gz: Tensor, mask: list[bool]):
        by_pixel = gz.permute(0, 2, 3, 1).reshape(-1, gz.shape[1])
        g = grad_weight = grad_bias = None
        if mask[0]:
            batch, channels, height, rows, width, cols = self._shape(u)
            g = (by_pixel @ self.weight.flatten(1)).reshape(batch, height, width, channels, rows, cols)
            g = g.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height * rows, width * cols)
            g = torch.nn.functional.pad(g, (0, u.shape[3] - width * cols, 0, u.shape[2] - height * rows))
        if mask[1]:
            grad_weight = (by_pixel.T @ self._patches(u)).reshape(self.weight.shape)
        if mask[2]:
            grad_bias = by_pixel.sum(0)
        return g, grad_weight, grad_bias


def _steps(x: Tensor, eta: Tensor, g: Tensor, steps: int, numbers: tuple[Any, ...], mask_start: bool) -> Tensor:
    """`steps` inner steps along g by the operator's kernel: for it, an identity layer with costate g."""
    ones = x.new_ones(x.shape[1], 1, 1, 1)
    layer: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], x.shape[1], ACTIVATIONS["identity"], 0.0)
    update = torch.ops.yopo_ext.first_layer_update.default
    return update(
        x, eta, g, ones, None, None, None, [], [], *layer, steps, *numbers, mask_start, False, False, False
    )[0]  # fmt: skip


def _inner_steps(
    f0: Any, x: Tensor, eta: Tensor, p: Tensor, steps: int, numbers: tuple[Any, ...], box: tuple[Tensor, Tensor] | None
) -> Tensor:
    if f0.affine and steps > 0:  # the collapse: one gradient for every step
        return _steps(x, eta, f0.input_gradient(x, p), steps, numbers, box is not None)
    for i in range(steps):
        u = x + eta if box is None else torch.clamp(x + eta, *box)
        eta = _steps(x, eta, f0.input_gradient(u, p), 1, numbers, box is not None and i == 0)
    return eta


def first_layer_update(*arguments: Any) -> reference.Outputs:
    """As `reference.first_layer_update`, in whose definition these products and steps are put."""
    x, _, costate, weight = arguments[:4]
    patches = are_patches(weight.shape[2:], x.shape[2:], costate.shape[2:], *arguments[9:13])
    layer = _Patches if patches else reference._FirstLayer
    return reference.first_layer_update(*arguments, layer=layer, inner_steps=_inner_steps)
