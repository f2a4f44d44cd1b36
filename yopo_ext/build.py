"""What this installation holds."""

from __future__ import annotations

import torch

from . import validation
from ._version import __version__
from .kernels import ops
from .kernels.constants import ACTIVATIONS, NORMS


def build_info() -> dict[str, object]:
    """Versions, native libraries (or why one is missing), CUDA architectures, dtypes and activations, as plain data."""
    status = ops.native_status

    def names(dtypes: tuple[torch.dtype, ...]) -> list[str]:
        return [str(d).removeprefix("torch.") for d in dtypes]

    return {
        "version": __version__,
        "torch": torch.__version__,
        "cpu_kernels": status.cpu,
        "cpu_kernels_reason": status.why_not_cpu,
        "cuda_kernels": status.cuda,
        "cuda_kernels_reason": status.why_not_cuda,
        "input_dtypes": names(validation.X_DTYPES),
        "costate_dtypes": names((*validation.COSTATE_DTYPES, torch.float64)),
        "activations": list(ACTIVATIONS),
        "norms": list(NORMS),
        "build": status.build,
    }
