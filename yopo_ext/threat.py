"""The threat model: which perturbations of an image are allowed, and how far one inner step goes."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import validation
from .kernels import reference
from .kernels.constants import NORMS
from .validation import Constants

Values = list[float] | Tensor  # 1 or C numbers, or a tensor that broadcasts to x


@dataclass(frozen=True)
class ThreatModel:
    """A ball of radius eps around every image, cut with the pixel bounds, and the length of an inner step.

    Attributes:
        eps: radius, >= 0, in the units of x. A number, one per channel ([C], [C, 1, 1] or [1, C, 1, 1]), or a tensor that
            broadcasts to x [B, C, H, W]; with norm="l2" a number.
        step_size: length of an inner step, >= 0, likewise.
        norm: "linf" or "l2".
        bounds: (lo, hi), the lowest and highest pixel value, of the same forms; None: unbounded.
    """

    eps: Constants
    step_size: Constants = 0.0
    norm: str = "linf"
    bounds: tuple[Constants, Constants] | None = (0.0, 1.0)

    def around(self, x: Tensor) -> Ball:
        """The perturbations that are allowed around x [B, C, H, W].

        Raises:
            ValueError, TypeError: naming the argument, what it was and what is allowed.
        """
        return Ball(self, x)


class Ball:
    """The perturbations that a threat model allows around x [B, C, H, W].

    L-inf: one interval per element, so projecting is one clamp. L2: the ball first, then the clamp to the bounds, which
    only shortens.

    Attributes:
        numbers: (step_size, eps, lo, hi), each a list of 1 or C numbers, as the operator takes them; None if one of them is a
            tensor that varies inside a channel or between samples.
    """

    def __init__(self, threat: ThreatModel, x: Tensor) -> None:
        validation.choice("norm", threat.norm, NORMS)
        bounds = threat.bounds
        if bounds is None:
            bounds = (-math.inf, math.inf)
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise TypeError(f"bounds must be a pair (lo, hi) or None; got {bounds!r}")
        eps, step_size = values("eps", threat.eps, x), values("step_size", threat.step_size, x)
        lo, hi = (values(f"bounds[{i}]", bounds[i], x, allow_infinite=True) for i in (0, 1))
        self.x, self.norm = x, threat.norm
        self._values = (step_size, eps, lo, hi)
        self._check(bounds)
        self.numbers = None if any(isinstance(v, Tensor) for v in self._values) else self._values
        self._interval: reference.Interval | None = None

    def _check(self, bounds: Any) -> None:
        step_size, eps, lo, hi = self._values
        for name, value in (("eps", eps), ("step_size", step_size)):
            if _lowest(value) < 0:
                raise ValueError(f"{name} must be >= 0; got {_lowest(value)}")
            if self.norm == "l2" and (isinstance(value, Tensor) or len(value) > 1):
                count = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"{len(value)} values"
                raise ValueError(f"{name} must be a single number with norm='l2'; got {count}")
        if isinstance(lo, Tensor) or isinstance(hi, Tensor):
            lowest, highest = (constant(v, self.x) for v in (lo, hi))
            if self.x.device.type == "cpu" and not bool((lowest < highest).all()):
                raise ValueError("bounds must be (lo, hi) with lo < hi everywhere")
            return
        for low, high in zip(lo * (len(hi) // len(lo) or 1), hi * (len(lo) // len(hi) or 1), strict=True):
            if not low < high:
                raise ValueError(f"bounds must be (lo, hi) with lo < hi; got lo={low}, hi={high}")
        if self.norm == "linf" and min(lo) >= 0.0 and max(hi) <= 1.0:
            for name, value in (("eps", eps), ("step_size", step_size)):
                largest = _highest(value)
                if largest >= 1.0:
                    raise ValueError(
                        f"{name} must be in the units of x, which bounds={bounds!r} puts in [0, 1]; got {largest}, which "
                        f"looks like 0..255 units: use {largest:g}/255"
                    )

    @property
    def step_size(self) -> Tensor:
        """Length of an inner step, a tensor that broadcasts to x."""
        return constant(self._values[0], self.x)

    @property
    def eps(self) -> Tensor:
        """Radius, a tensor that broadcasts to x."""
        return constant(self._values[1], self.x)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest pixel value, tensors that broadcast to x."""
        return constant(self._values[2], self.x), constant(self._values[3], self.x)

    @property
    def bounds_as_given(self) -> tuple[Values, Values]:
        """Lowest and highest pixel value: 1 or C numbers, or tensors that broadcast to x."""
        return self._values[2], self._values[3]

    @property
    def operator_constants(self) -> tuple[Values, ...]:
        """step_size, eps, lo, hi as `kernels.reference.first_layer_update` takes them: numbers or broadcasting tensors."""
        return self._values

    @property
    def table(self) -> Tensor:
        """`numbers` as a CPU tensor [4, 1 or C], for compiled graphs: numbers in a graph would be constants of it."""
        assert self.numbers is not None
        return _table(*map(tuple, self.numbers))

    @property
    def interval(self) -> reference.Interval:
        """The allowed perturbations element by element, see `kernels.reference.admissible_interval`."""
        if self._interval is None:
            radius = self.eps if self.norm == "linf" else torch.full_like(self.eps, math.inf)
            self._interval = reference.admissible_interval(self.x, radius, *self.bounds)
        return self._interval

    def without_bounds(self) -> Ball:
        """The same ball, of pixels without bounds."""
        other = copy.copy(self)
        step_size, eps, _, _ = self._values
        other._values, other._interval = (step_size, eps, [-math.inf], [math.inf]), None
        other.numbers = None if isinstance(step_size, Tensor) or isinstance(eps, Tensor) else other._values
        return other

    def subset(self, index: Tensor) -> Ball:
        """The ball of the samples at `index` [b]."""
        part = copy.copy(self)
        part.x = self.x[index]
        part._values = tuple(  # type: ignore[assignment]
            v[index] if isinstance(v, Tensor) and v.dim() == self.x.dim() and v.shape[0] > 1 else v
            for v in self._values
        )
        part.numbers = None if self.numbers is None else part._values
        part._interval = reference.Interval(*(bound[index] for bound in self.interval))
        return part

    def project(self, eta: Tensor) -> Tensor:
        """The allowed perturbation next to eta, in x's shape."""
        if self.norm == "linf":
            return reference.project_linf(eta, self.interval)
        return reference.project_l2(eta, self.eps, self.interval)

    def ascend(self, eta: Tensor, gradient: Tensor, step_size: Tensor | float | None = None) -> Tensor:
        """One projected step of steepest ascent; eta stays allowed and unmoved where the gradient is NaN or zero.

        step_size: instead of the threat model's.
        """
        length = self.step_size if step_size is None else step_size
        if self.norm == "linf":
            return self.project(eta + length * torch.nan_to_num(gradient, nan=0.0).sign_())
        return self.project(eta + length * reference.l2_direction(gradient))

    def uniform(self, generator: torch.Generator | None = None) -> Tensor:
        """A uniform draw from the ball (L2: uniform direction, radius by the volume law), projected, like x."""
        x = self.x
        if self.norm == "linf":
            noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            return self.project(noise.mul_(2.0).sub_(1.0).mul_(self.eps))
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        radius = torch.rand(x.shape[0], dtype=x.dtype, device=x.device, generator=generator)
        radius = self.eps * radius.pow_(1.0 / max(math.prod(x.shape[1:]), 1))
        return self.project(reference.l2_direction(noise) * radius.reshape(-1, *[1] * (x.dim() - 1)))


def values(name: str, value: Constants, x: Tensor, *, allow_infinite: bool = False) -> Values:
    """`value` as 1 or C numbers, or as a tensor that broadcasts to x [B, C, H, W]; ValueError or TypeError if it is neither."""
    if not isinstance(value, Tensor) or per_channel_shape(value, x.shape[1]):
        return validation.constants(name, value, x.shape[1], allow_infinite=allow_infinite)
    fits = value.dim() == x.dim() or (1 < value.dim() < x.dim())
    if not fits or any(v not in (1, s) for v, s in zip(reversed(value.shape), reversed(x.shape), strict=False)):
        raise ValueError(
            f"{name} must be a number, one value per channel [{x.shape[1]}] or [{x.shape[1]}, 1, 1], or a tensor that "
            f"broadcasts to x {list(x.shape)}; got a tensor of shape {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device ({x.device}); got {value.device}")
    value = value.detach().to(x.dtype)
    if x.device.type == "cpu" and bool((value.isnan() | (value.isinf() & (not allow_infinite))).any()):
        raise ValueError(f"{name} must be finite; got a tensor with other values")
    return value


def per_channel_shape(value: Tensor, channels: int) -> bool:
    """Whether a tensor holds one number, or one per channel."""
    return value.numel() == 1 or value.shape in ((channels,), (channels, 1, 1), (1, channels, 1, 1))


def constant(value: Values, x: Tensor) -> Tensor:
    """`value` in x's dtype, on its device; one number as a scalar, one per channel as [C, 1, 1]."""
    if isinstance(value, Tensor):
        return value
    return reference.constant(value, x)


@functools.lru_cache(maxsize=64)  # of a schedule; all steps with one threat model share the tensor
def _table(*rows: tuple[float, ...]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row * (width // len(row)) for row in rows], dtype=torch.float64, device="cpu")


def _lowest(value: Values) -> float:
    if isinstance(value, Tensor):  # values on an accelerator are not looked at: reading them waits
        return float(value.min()) if value.device.type == "cpu" and value.numel() else 0.0
    return min(value)


def _highest(value: Values) -> float:
    if isinstance(value, Tensor):
        return float(value.max()) if value.device.type == "cpu" and value.numel() else 0.0
    return max(value)


def broadcast(value: Constants, x: Tensor) -> Tensor:
    """`value` in x's dtype, on its device: one number as a scalar, one per channel as [C, 1, 1]."""
    plain: Any = value.detach().flatten().tolist() if isinstance(value, Tensor) else value
    return reference.constant([float(v) for v in plain] if isinstance(plain, Iterable) else [float(plain)], x)
