"""One small problem per kernel variant, odd where it can be; shared by the emulated and the device tests."""

from __future__ import annotations

STEM = {"kernels": 16, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}
VARIANTS = {
    "fused 16 columns, one launch": {"channels": 1, "kernels": 32, "size": (14, 14), "padding": (0, 0), "batch": 4},
    "fused 32 columns, one launch": {"kernels": 48, "size": (9, 11), "batch": 4},
    "fused 160 columns, one launch": {"size": (15, 18), **STEM},
    "fused 32 columns, bands": {"kernels": 16, "size": (49, 30), "batch": 1},
    "fused 160 columns, bands": {"size": (41, 44), **STEM, "batch": 1},
    "general": {"kernels": 6, "size": (7, 9), "batch": 4, "groups": 3},
}  # fmt: skip
AFFINE_PARTS = {"bias": True, "scale": True, "shift": True, "normalise": True}
