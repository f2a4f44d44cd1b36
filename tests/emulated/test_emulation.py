"""The emulation itself: kernels that are wrong must fail, and mma must be what the PTX manual says."""

from __future__ import annotations

import pytest
import torch
from backend import SCHEDULES, machine, native

PROBES = {
    "diverge": "diverge",
    "miss_barrier": "63 threads at the block barrier, 0 at a warp collective, 1 finished",
    "leave_warp": "62 at a warp collective, 2 finished",
    "overrun": "outside the block's 64 bytes",
    "misalign": "misaligned",
}


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wrong_kernel_fails(name, schedule):
    with machine(schedule), pytest.raises(native.Failure, match=PROBES[name]):
        native.probe(name)


def test_mma_multiplies_matrices():
    """Operands are handed to lanes by the manual's formulas for m16n8k8 with .tf32, results collected by them."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (16, 8), generator=generator).float()
    b = torch.randint(-8, 9, (8, 8), generator=generator).float()
    a_lanes, b_lanes = torch.empty(32, 4), torch.empty(32, 2)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            a_lanes[lane, i] = a[group + (8 if i in (1, 3) else 0), thread + (4 if i >= 2 else 0)]
        for i in range(2):
            b_lanes[lane, i] = b[thread + 4 * i, group]
    with machine("random"):
        d_lanes = torch.tensor(native.multiply(a_lanes.flatten().tolist(), b_lanes.flatten().tolist())).reshape(32, 4)
    d = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            d[(lane >> 2) + (8 if i >= 2 else 0), 2 * (lane % 4) + (i & 1)] = d_lanes[lane, i]
    assert torch.equal(d, a @ b)


def test_mma_sees_ten_bits_of_mantissa():
    one = [1.0] * 128
    with machine():
        exact = native.multiply([1.0 + 2**-10] * 128, one[:64])[0]
        rounded = native.multiply([1.0 + 2**-12] * 128, one[:64])[0]
    assert exact == 8 * (1 + 2**-10)
    assert rounded == 8.0
