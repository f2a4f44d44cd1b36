"""The enumerations that Python, the operator schema and the C++ kernels share.

The integers are part of the operator schema: `csrc/core/params.h` holds the same ones.
"""

from __future__ import annotations

ACTIVATIONS: dict[str, int] = {
    "identity": 0,
    "relu": 1,
    "leaky_relu": 2,
    "gelu": 3,  # x * Phi(x), by erf
    "gelu_tanh": 4,  # the tanh approximation
    "silu": 5,
}

NORMS: dict[str, int] = {"linf": 0, "l2": 1}
