"""The CUDA library's glue on the emulated kernels: arguments, workspaces, matrix products of patch embeddings."""

from __future__ import annotations

import binaries
import pytest
import torch
from cases import LAYOUTS, make_arguments
from policy import as_dict, check_update
from variants import AFFINE_PARTS, VARIANTS

from yopo_ext.kernels import ops

PATCHES = {"kernels": 24, "size": (17, 12), "kernel": (4, 4), "stride": (4, 4), "padding": (0, 0), "batch": 3}


@pytest.fixture(scope="module")
def operators():
    binaries.build_emulated("emulated_glue")
    library = torch.library.Library("yopo_ext_emulated", "DEF")
    library.define("first_layer_update" + ops.SCHEMA)
    library.define("first_layer_variant" + ops.VARIANT_SCHEMA)
    torch.ops.load_library(str(binaries.EMULATED / "libemulated_glue.so"))
    yield torch.ops.yopo_ext_emulated
    library._destroy()


@pytest.fixture
def update(operators):
    return operators.first_layer_update.default


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "fused 32 columns, one launch, 3 x tf32"),
        ({"kernels": 24}, "general (the number of output channels is no multiple of 16)"),
        (PATCHES, "patches as matrix products"),
        ({"batch": 0}, "nothing to launch"),
    ],
)
def test_the_variant_in_words(operators, changes, text):
    shape = {"kernels": 64, "size": (32, 32), "batch": 2}
    arguments = make_arguments(**{**shape, **changes})
    assert operators.first_layer_variant.default(*arguments) == text
    if "3 x" in text:
        rounded = {**as_dict(arguments), "allow_tf32": True}
        assert operators.first_layer_variant.default(*rounded.values()) == text.replace("3 x ", "")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_variants(update, variant, activation):
    check_update(update, make_arguments(**VARIANTS[variant], activation=activation, steps=2, **AFFINE_PARTS))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("costate_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("steps", "mask_start"), [(0, False), (1, True), (3, False), (3, True)])
def test_patches(update, layout, costate_dtype, steps, mask_start):
    """One row and no column of pixels lies in no patch."""
    arguments = make_arguments(
        **PATCHES,
        steps=steps,
        mask_start=mask_start,
        costate_layout=layout,
        x_layout=layout,
        costate_dtype=costate_dtype,
        per_channel=True,
        **AFFINE_PARTS,
    )
    check_update(update, arguments)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_patches_only_what_was_asked_for(update, wanted):
    check_update(update, make_arguments(**PATCHES, need_output=wanted[0], need_weight_grad=wanted[1]))


def test_patches_in_bf16_products(update):
    a = as_dict(make_arguments(**PATCHES, costate_dtype=torch.bfloat16, **AFFINE_PARTS))
    rounded = check_update(update, tuple({**a, "allow_tf32": True}.values()), eps=torch.finfo(torch.bfloat16).eps)
    assert not torch.equal(update(*a.values())[2], rounded[2])


def test_patches_with_many_channels(update):
    changes = {"channels": 36, "kernel": (2, 2), "stride": (2, 2), "size": (6, 6)}
    check_update(update, make_arguments(**{**PATCHES, **changes}, per_channel=True, normalise=True, steps=2))


def test_a_weight_of_other_strides(update):
    a = as_dict(make_arguments(**VARIANTS["fused 32 columns, one launch"]))
    expected = update(*a.values())
    results = update(*{**a, "weight": a["weight"].contiguous(memory_format=torch.channels_last)}.values())
    assert results[2].stride() == a["weight"].contiguous(memory_format=torch.channels_last).stride()
    assert torch.equal(results[2], expected[2])


def test_nothing_to_do(update):
    results = check_update(update, make_arguments(batch=0, kernels=16, bias=True))
    assert torch.equal(results[2], torch.zeros_like(results[2]))


def test_errors_name_the_operator(update):
    a = as_dict(make_arguments())
    with pytest.raises(RuntimeError, match=r"first_layer_update.*fit together"):
        update(*{**a, "groups": 2}.values())
