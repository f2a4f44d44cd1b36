"""Per-channel input normalisation: composed, recognised in a module, and found between two tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normalisation:
    """(u - mean) / std with constants, scalars or one per channel; empty tuples: none."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()  # as long as mean

    def then(self, other: Normalisation) -> Normalisation:
        """This one followed by the other, as one."""
        if not (self.mean and other.mean):
            return other if other.mean else self
        width = max(len(self.mean), len(other.mean))
        m1, s1, m2, s2 = (v * (width // len(v)) for v in (self.mean, self.std, other.mean, other.std))
        mean = tuple(a + s * b for a, s, b in zip(m1, s1, m2, strict=True))
        return Normalisation(mean, tuple(a * b for a, b in zip(s1, s2, strict=True)))


def normalisation_of(module: nn.Module, u: Tensor) -> Normalisation | None:
    """The constants of a module that has `mean` and `std` and, tried on `u`, does compute (u - mean) / std."""
    if next(module.parameters(), None) is not None or not (hasattr(module, "mean") and hasattr(module, "std")):
        return None
    try:
        mean, std = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in (module.mean, module.std))
        width = max(mean.numel(), std.numel())
        if not {mean.numel(), std.numel()} <= {1, u.shape[1]}:
            return None
        with torch.no_grad():
            expected = (u.double() - mean.to(u.device)[:, None, None]) / std.to(u.device)[:, None, None]
            computed = module(u)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(computed, Tensor) or not matches(computed, expected.to(computed.dtype)):
        return None
    return Normalisation(tuple(mean.expand(width).tolist()), tuple(std.expand(width).tolist()))


def matches(observed: Tensor, expected: Tensor) -> bool:
    """Whether two inputs are the same values up to the rounding of `observed`'s dtype and a flattening."""
    if observed is expected:
        return True
    if observed.numel() == 0:
        return observed.shape == expected.shape
    if observed.numel() != expected.numel() or observed.shape[:1] != expected.shape[:1]:
        return False
    if not observed.dtype.is_floating_point or observed.device != expected.device:
        return False
    if observed.shape != expected.shape and observed.shape[1:] != (expected[0:1].numel(),):
        return False
    expected = expected.reshape(observed.shape).to(observed.dtype)
    # Normalising rounds at the size of the largest values: (u - mean) / std may cancel.
    rounding = 4 * torch.finfo(observed.dtype).eps * float(torch.nan_to_num(expected).abs().amax())
    return bool(torch.isclose(observed, expected, rtol=0, atol=rounding, equal_nan=True).all())


_ARITHMETIC = ("Sub", "Rsub", "Add", "Mul", "Div", "Neg", "ToCopy", "Clone")
_ARRANGEMENT = (
    "Alias",
    "View",
    "UnsafeView",
    "Expand",
    "Select",
    "Slice",
    "Unsqueeze",
    "Stack",
    "Cat",
    "Unbind",
    "Split",
)
_ELEMENTWISE = frozenset(f"{name}Backward0" for name in _ARITHMETIC + _ARRANGEMENT)


def _elementwise_since_input(observed: Tensor) -> bool:
    """Whether autograd saw only arithmetic with constants between a leaf (the model's input) and `observed`."""
    leaves, stack = set(), [observed.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(node)
        elif type(node).__name__ in _ELEMENTWISE:
            stack += [following for following, _ in node.next_functions]
        else:
            return False
    return len(leaves) == 1


def fitted_normalisation(observed: Tensor, given: Tensor) -> Normalisation | None:
    """The per-channel normalisation that took `given` to `observed`, if that is all that happened between them."""
    if observed.shape != given.shape or observed.numel() == 0 or not _elementwise_since_input(observed):
        return None
    with torch.no_grad():
        u, v = (t.double().transpose(0, 1).flatten(1) for t in (given, observed))
        low, high = u.argmin(1, keepdim=True), u.argmax(1, keepdim=True)
        std = (u.gather(1, high) - u.gather(1, low)) / (v.gather(1, high) - v.gather(1, low))
        mean = u.gather(1, low) - v.gather(1, low) * std
        if not bool((std > 0).all() and torch.isfinite(std).all()):
            return None
        if not matches(observed, ((u - mean) / std).view_as(given.transpose(0, 1)).transpose(0, 1)):
            return None
    return Normalisation(tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))
