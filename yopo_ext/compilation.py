"""What torch.compile must not trace, marked without importing torch._dynamo.

`torch.compiler`'s own decorators import it, which takes 1.5 CPU seconds, in every program that imports the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def not_traced(function: Function) -> Function:
    """`torch.compiler.disable(function)`, which imports torch._dynamo in the first call and not in the decoration.

    `torch._disable_dynamo` is how PyTorch itself decorates its optimizers. It is not public: where it is missing,
    `torch.compiler.disable` does the same at once.
    """
    return cast(Function, getattr(torch, "_disable_dynamo", torch.compiler.disable)(function))


def constant_when_compiled(function: Function) -> Function:
    """`torch.compiler.assume_constant_result(function)`, which does nothing but set this attribute (torch 2.10 to 2.15)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
