"""Runs under compute-sanitizer: one affine and one non-linear update of every variant, no checks of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

for folder in ("..", "../emulated"):
    sys.path.insert(0, str((Path(__file__).parent / folder).resolve()))
from cases import make_arguments  # noqa: E402
from variants import AFFINE_PARTS, VARIANTS  # noqa: E402

from yopo_ext.kernels import ops  # noqa: E402

count = 0
for problem in VARIANTS.values():
    for activation in ("identity", "relu"):
        arguments = make_arguments(**{**problem, "batch": 2}, activation=activation, steps=2, **AFFINE_PARTS)
        ops.first_layer_update(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments))
        torch.cuda.synchronize()
        count += 1
print(f"sanitized: {count} updates")
