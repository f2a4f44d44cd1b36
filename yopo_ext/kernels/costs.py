"""What an update costs by the package's kernels and by the library's products: estimates from shapes alone.

The unit is one multiply-add of a core (CPU), one second (CUDA). Constants are ratios of a machine's rates, the same for
every machine; the comparison is what counts, so a factor that both sides share is left out. What the kernels do is
known exactly and counted; what the library does is estimated in its favour, for its compositions were written and
tuned by others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def are_patches(
    kernel: Sequence[int], size: Sequence[int], output: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> bool:  # fmt: skip
    """Whether no input pixel lies under two positions of the kernel, so that the convolution is a matrix product.

    True for patch embeddings and for a kernel that takes the whole image, whatever its stride.
    """
    apart = all(s == k or (o == 1 and k == n) for k, n, o, s in zip(kernel, size, output, stride, strict=True))
    return apart and groups == 1 and tuple(padding) == (0, 0) and tuple(dilation) == (1, 1)


@dataclass(frozen=True)
class Problem:
    """The sizes of one update."""

    batch: int
    channels: int
    size: tuple[int, ...]
    kernels: int
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    affine: bool
    linf: bool
    steps: int
    need_output: bool
    need_weight_grad: bool
    element: int  # bytes of x
    costate_element: int  # bytes of the costate
    allow_tf32: bool = False

    @property
    def products(self) -> int:
        """(channel, tap) pairs of one output channel."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def patches(self) -> bool:
        """Whether the library's products are matrix products."""
        return are_patches(self.kernel, self.size, self.output, self.stride, self.padding, self.dilation, self.groups)

    @property
    def contractions(self) -> tuple[int, int, int]:
        """(forwards, input gradients, weight gradients)."""
        moves = min(self.steps, 1) if self.affine else self.steps
        masks = self.need_weight_grad and not self.affine
        forwards = (0 if self.affine else self.steps) + (self.need_output or masks)
        return forwards, moves, int(self.need_weight_grad)

    @property
    def multiply_adds(self) -> int:
        """Of one contraction of one image."""
        return self.kernels * self.products * self.output[0] * self.output[1]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# --- CPU ---

LANES = 16  # of the widest vectors
KERNEL_RATE = 0.5  # of a core's multiply-adds, as the kernels run on the shapes that they are written for
FORWARD_RATE = MATRIX_RATE = 0.6  # of the library's convolutions, and of its products of large matrices
GRADIENT_RATE, GRADIENT_RATE_OF_FEW = 0.4, 0.225  # the latter for less than PREFERRED_CHANNELS input channels
GROUPED = 3.0  # times longer: convolutions with groups
PREFERRED_CHANNELS = 8
SECOND_LEVEL = 512 * 1024  # bytes: what is read again for every image stays in a core's cache
NEAR, FAR = 0.5, 4.0  # multiply-adds in the time of a byte from the second-level cache, and from beyond it
CLEARLY = 1.5  # times slower: less is within what is known of the library's convolutions
CALL = 2e6  # of one operation of the library, in multiply-adds


def cpu_kernel(p: Problem) -> float:
    """The contractions as csrc/core/geometry.h lays them out: flat planes, a column of zeros for every tap beyond."""
    forwards, gradients, sums = p.contractions
    row = p.output[1] + (p.kernel[1] - 1) * p.dilation[1] // p.stride[1]
    rows = min(-(-p.size[0] // p.stride[0]), p.output[0] + (p.kernel[0] - 1) * p.dilation[0] // p.stride[0])
    flat = _round_up(p.output[0] * row, LANES)
    weights = p.kernels * p.products
    executed = weights * ((forwards + sums) * flat + gradients * _round_up(rows * row, LANES))
    # Weights are read for every image, weight gradients summed lane by lane.
    moved = weights * p.element * (forwards + gradients + 2 * LANES * sums)
    per_byte = NEAR if weights * p.element * LANES < SECOND_LEVEL else FAR
    return p.batch * (executed / KERNEL_RATE + moved * per_byte)


def cpu_library(p: Problem) -> float:
    """The collapsed composition of library products, or for a non-linear f0 one product each way in every step."""
    forwards, gradients, sums = p.contractions
    if p.patches:
        forward_rate = gradient_rate = MATRIX_RATE
    else:
        few = p.channels // p.groups < PREFERRED_CHANNELS
        forward_rate, gradient_rate = FORWARD_RATE, GRADIENT_RATE_OF_FEW if few else GRADIENT_RATE
    products = p.multiply_adds * (forwards / forward_rate + (gradients + sums) / gradient_rate)
    if p.groups > 1:
        products *= GROUPED
    outputs = p.kernels * p.output[0] * p.output[1] * p.element
    inputs = p.channels * p.size[0] * p.size[1] * p.element
    widened = outputs if p.costate_element < p.element else 0
    pointwise = 0 if p.affine else 3 * outputs * (gradients + sums)  # slopes, and their products with the costate
    moved = outputs * (forwards + gradients + sums) + widened + pointwise + 6 * inputs * gradients
    copies = 3 * inputs * (forwards + gradients + sums) if p.patches else 0  # a patch's row at a time
    calls = forwards + gradients + sums + p.steps * (0 if p.affine else 3) + 2
    return p.batch * (products + moved * NEAR + copies * FAR) + calls * CALL


# --- CUDA: an H200 ---

ISSUE = 132 * 4 * 1.755e9  # warp instructions a second
LAUNCH = 4e-6  # seconds, of one operation after another
BANDWIDTH = 2e12  # bytes a second, of operations that follow each other
LIBRARY_FLOPS = {"tf32": 25e12, "fp32": 15e12, "fp64": 15e12}
FEW_CHANNELS = 4.0  # times longer: gradients of 3 channels, which fill a fraction of a tile
GENERAL = 50.0  # warp instructions of the general kernel for 32 multiply-adds, counted: 44 and 49 (docs/kernels.md)


def cuda_general(p: Problem) -> float:
    """The general kernel's issue floor, and its launches."""
    instructions = GENERAL * p.multiply_adds / 32 * sum(p.contractions)
    return p.batch * instructions / ISSUE + 2 * LAUNCH


def cuda_library(p: Problem) -> float:
    """The library's products, their traffic and their launches, with the steps by the kernels."""
    forwards, gradients, sums = p.contractions
    flops = LIBRARY_FLOPS["fp64" if p.element == 8 else "tf32" if p.allow_tf32 else "fp32"]
    narrow = FEW_CHANNELS if p.channels // p.groups < PREFERRED_CHANNELS and not p.patches else 1.0
    work = 2 * p.multiply_adds * (forwards + (gradients + sums) * narrow) * (GROUPED if p.groups > 1 else 1.0) / flops
    outputs = p.kernels * p.output[0] * p.output[1] * p.element
    inputs = p.channels * p.size[0] * p.size[1] * p.element
    moved = outputs * (forwards + gradients + sums) * (1 if p.affine else 4) + inputs * 8 * max(gradients, 1)
    launches = 2 * (forwards + gradients + sums) + (4 if p.affine else 8 * p.steps) + 4
    return p.batch * (work + moved / BANDWIDTH) + launches * LAUNCH


FUSED_COLUMNS = 160


def cuda_has_fast_kernel(p: Problem) -> bool:
    """Whether `select_kernel` (csrc/cuda/select.cu) or `takes_patches` finds more than the general kernel."""
    fp32 = p.element == 4 and p.costate_element < 8 and p.linf and p.groups == 1
    patches = p.kernel == p.stride and p.padding == (0, 0) and p.dilation == (1, 1) and p.affine and p.products >= 32
    fused = (
        p.stride in ((1, 1), (2, 2)) and p.kernels % 16 == 0 and p.products + 1 <= FUSED_COLUMNS and p.output[1] >= 2
    )  # fmt: skip
    return fp32 and (fused or patches)


def why_library(p: Problem, device: str) -> str | None:
    """Why the library's products are expected to be faster than the package's kernels; None: they are not."""
    if not p.batch or not p.multiply_adds:
        return None
    if device == "cpu":
        kernel, library = cpu_kernel(p), cpu_library(p)
        if kernel <= (1.0 if p.patches else CLEARLY) * library:
            return None
    elif device == "cuda":
        if cuda_has_fast_kernel(p):
            return None
        kernel, library = cuda_general(p), cuda_library(p)
        if kernel <= library:  # a floor against a time
            return None
    else:
        return None
    times = kernel / library
    return f"for these sizes the kernels are estimated to take {times:.1f} times as long as the library's products"
