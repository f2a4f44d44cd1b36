"""Per-channel normalisation of the input by constants: applied, composed, recognised in a module, and fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import validation
from ..kernels.reference import constant
from ..validation import Constants


@dataclass(frozen=True)
class Normalisation:
    """(u - mean) / std with constants, scalars or one per channel; empty tuples: none."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()  # as long as mean

    @staticmethod
    def given(mean: Constants | None, std: Constants | None, channels: int) -> Normalisation:
        """The normalisation of a caller's arguments; ValueError naming the one that is wrong."""
        return Normalisation(*validation.normalisation(mean, std, channels))

    def __bool__(self) -> bool:
        return bool(self.mean)

    def __call__(self, u: Tensor) -> Tensor:
        """(u - mean) / std for u [B, C, H, W]; u itself where there is none."""
        return normalised(u, self.mean, self.std)

    def then(self, other: Normalisation) -> Normalisation:
        """This one followed by the other, as one."""
        if not (self and other):
            return other or self
        width = max(len(self.mean), len(other.mean))
        m1, s1, m2, s2 = (v * (width // len(v)) for v in (self.mean, self.std, other.mean, other.std))
        mean = tuple(a + s * b for a, s, b in zip(m1, s1, m2, strict=True))
        return Normalisation(mean, tuple(a * b for a, b in zip(s1, s2, strict=True)))


NONE = Normalisation()


def normalised(u: Tensor, mean: tuple[float, ...] | list[float], std: tuple[float, ...] | list[float]) -> Tensor:
    """(u - mean) / std, scalars or per channel; u itself where they are empty."""
    if not mean:
        return u
    if len(mean) == 1:
        return (u - mean[0]) / std[0]
    return (u - constant(list(mean), u)) / constant(list(std), u)


def normalisation_of(module: nn.Module, u: Tensor) -> Normalisation | None:
    """The constants of a module that has `mean` and `std` and, tried on `u`, does compute (u - mean) / std.

    Tried beyond u's range too: a module that clamps is something else where a perturbation leaves the bounds.
    """
    if next(module.parameters(), None) is not None or not (hasattr(module, "mean") and hasattr(module, "std")):
        return None
    try:
        u = torch.cat([u, 8 * u - 4])
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
    if not same_elements(observed, expected):
        return False
    expected = expected.reshape(observed.shape).to(observed.dtype)
    return not bool(differs(observed, expected)) if observed.numel() else True


def same_elements(observed: Tensor, expected: Tensor) -> bool:
    """Whether `observed` has the shape of `expected` [B, C, H, W], or that of it flattened, [B, C*H*W]."""
    if not observed.dtype.is_floating_point or observed.device != expected.device:
        return False
    return observed.shape in (expected.shape, (expected.shape[0], expected[0:1].numel() or expected[0].numel()))


def differs(observed: Tensor, expected: Tensor) -> Tensor:
    """Whether two tensors of one shape and dtype differ by more than rounding, as a tensor; NaN equals everything."""
    # Normalising rounds at the size of the largest values: (u - mean) / std may cancel.
    rounding = 8 * torch.finfo(observed.dtype).eps * (1 + torch.nan_to_num(expected).abs().amax())
    return ((observed - expected).abs() > rounding).any()


def sample(u: Tensor) -> Tensor:
    """A few pixels per channel of u [B, C, H, W]."""
    return u[:, :, :: max(u.shape[2] // 4, 1), :: max(u.shape[3] // 4, 1)]


_ARITHMETIC = ("Sub", "Rsub", "Add", "Mul", "Div", "Neg", "ToCopy", "Clone")
_LIMITS = ("Clamp", "ClampMin", "ClampMax", "Hardtanh", "Minimum", "Maximum", "Fmin", "Fmax")
_ARRANGEMENT = (
    "Alias", "View", "UnsafeView", "ReshapeAlias", "Expand", "Select", "Slice", "Unsqueeze", "Squeeze", "Stack", "Cat",
    "Unbind", "Split", "Contiguous", "Permute", "Transpose",
)  # fmt: skip
# Identities that hooks and fully_shard put around a module's inputs.
_MARKS = ("BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward")
_ELEMENTWISE = frozenset(
    [*_MARKS, *(f"{name}Backward{i}" for name in _ARITHMETIC + _LIMITS + _ARRANGEMENT for i in range(3))]
)


def _elementwise_since(leaf: Tensor, observed: Tensor) -> bool:
    """Whether autograd saw only arithmetic with constants between `leaf` (the model's input) and `observed`."""
    leaves, stack = set(), [observed.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        elif type(node).__name__ in _ELEMENTWISE:
            stack += [following for following, _ in node.next_functions]
        else:
            return False
    return leaves == {leaf} or observed is leaf


def fitted(observed: Tensor, given: Tensor, leaf: Tensor) -> Normalisation | None:
    """The per-channel normalisation that took `given` to `observed`, if that is all that happened between them.

    observed: what arrived at a layer. given: the values that the model was called with; they vary in every channel, so that
    the constants are determined. leaf: the tensor that autograd knows the model's input as; `observed` has no graph
    if it was computed inside a reentrant checkpoint (a view that was made there wants a gradient all the same).
    """
    if observed.grad_fn is not None and not _elementwise_since(leaf, observed):
        return None
    if matches(observed.detach(), given):
        return Normalisation()
    if not same_elements(observed, given) or observed.numel() == 0:
        return None
    observed = observed.detach().reshape(given.shape)
    with torch.no_grad():
        v = observed.double().transpose(0, 1).flatten(1)
        spread = v.amax(1) - v.amin(1)
        if not bool((spread > 8 * torch.finfo(observed.dtype).eps * (1 + v.abs().amax(1))).all()):
            return None  # constant, by a clamp for instance: what is left of rounding fits anything
        u, v = (t.double().transpose(0, 1).flatten(1) for t in (given, observed))
        u_centre, v_centre = u.mean(1, keepdim=True), v.mean(1, keepdim=True)
        std = (u - u_centre).square().sum(1, keepdim=True) / ((u - u_centre) * (v - v_centre)).sum(1, keepdim=True)
        mean = u_centre - v_centre * std
        if not bool((std > 0).all() and torch.isfinite(std).all()):
            return None
        if not matches(observed, ((u - mean) / std).view_as(given.transpose(0, 1)).transpose(0, 1)):
            return None
    return Normalisation(tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))
