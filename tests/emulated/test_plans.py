"""Shared-memory plans on every architecture, and what ptxas made of the kernels."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from backend import ARCHITECTURES, describe, machine, native
from binaries import ROOT
from cases import make_arguments
from policy import as_dict

STEMS = {
    "cifar": {"kernels": 64, "size": (32, 32)},
    "cifar narrow": {"kernels": 16, "size": (32, 32)},
    "cifar relu": {"kernels": 64, "size": (32, 32), "activation": "relu"},
    "mnist": {"channels": 1, "kernels": 32, "size": (28, 28), "padding": (0, 0), "activation": "relu"},
    "tiny imagenet": {"kernels": 64, "size": (64, 64)},
    "tiny imagenet relu": {"kernels": 64, "size": (64, 64), "activation": "relu"},
    "imagenet 7x7/2": {"kernels": 64, "size": (224, 224), "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "batch": 1},
    "imagenet 7x7/2 relu": {
        "kernels": 64, "size": (224, 224), "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "batch": 1, "activation": "relu",
    },
    "imagenet 3x3/2": {"kernels": 32, "size": (224, 224), "stride": (2, 2), "batch": 1, "activation": "silu"},
}  # fmt: skip
RESIDENT = {"cifar", "cifar narrow", "cifar relu", "mnist"}
EXCEPTIONS: set[tuple[str, str]] = {
    ("imagenet 7x7/2 relu", a) for a in ("sm_86", "sm_89", "sm_120")
}  # see docs/kernels.md


def plan_of(batch: int = 2, need_output: bool = True, **shape) -> dict:
    """The plan for a batch whose memory nobody reads or writes: a plan depends on shapes alone."""
    a = as_dict(make_arguments(**{**shape, "batch": 1, "need_output": need_output}))
    for name in ("x", "eta", "costate"):
        a[name] = torch.empty(batch, *a[name].shape[1:], dtype=a[name].dtype)
    return describe(tuple(a.values()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", STEMS)
def test_common_stems_run_fast_everywhere(architecture, stem):
    with machine(architecture=architecture, processors=100):
        plan = plan_of(**STEMS[stem])
        if (stem, architecture) in EXCEPTIONS:
            assert plan["general"], "an exception that is none any more"
            return
        assert not plan["general"], plan["variant"]
        assert max(plan["shared_bytes"]) <= ARCHITECTURES[architecture][0] * 1024
        if stem in RESIDENT:
            assert plan["resident"]


@pytest.mark.parametrize(
    ("stem", "blocks"), [("cifar", 100), ("cifar relu", 100), ("mnist", 200), ("tiny imagenet", 100)]
)
def test_blocks_fill_the_processors(stem, blocks):
    with machine(processors=100):
        assert plan_of(**{**STEMS[stem], "batch": 256, "need_output": False})["blocks"][0] == blocks


def test_every_row_has_a_reason():
    assert all(len(reason) > 20 for _, _, reason in native.tuning_table())
    assert [columns for _, columns, _ in native.tuning_table()] == sorted(
        columns for _, columns, _ in native.tuning_table()
    )


SPILL = 8  # bytes: two registers, kept over a whole loop; more would be inside one


def reports() -> list[Path]:
    return sorted(Path(os.environ.get("YOPO_PTXAS_REPORTS", ROOT / "build" / "native")).rglob("*.ptxas.txt"))


@pytest.mark.skipif(
    not (reports() or os.environ.get("YOPO_NEEDS_PTXAS_REPORTS")), reason="the CUDA kernels were not compiled here"
)
def test_fast_variants_do_not_spill():
    """Registers, spills and stack as ptxas reported them when the library was built."""
    seen, spilling = 0, []
    for path in reports():
        function = None
        for line in path.read_text().splitlines():
            if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
                function = match.groups()
            elif function and "fused_kernel" in function[0] and (match := re.search(r"(\d+) bytes spill stores", line)):
                seen += 1
                if int(match[1]) > SPILL:
                    spilling.append((path.name, *function, int(match[1])))
    assert seen > 0, "no fused kernel in the reports"
    assert not spilling, spilling
