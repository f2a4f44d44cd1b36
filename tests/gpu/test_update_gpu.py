"""Every kernel variant on the device against the fp64 oracle; the same problems as in the emulation, and full-size stems."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, cases, make_arguments
from hypothesis import HealthCheck, given, settings
from policy import NAMES, _check_step, as_dict, assert_in_ball_and_box, assert_within, bounds_at, check_update
from variants import AFFINE_PARTS, VARIANTS

from yopo_ext.kernels import ops
from yopo_ext.kernels.constants import ACTIVATIONS

from .device import update

TF32 = 2.0**-11
FULL_SIZE = {
    "cifar 3->64": {"kernels": 64, "size": (32, 32), "batch": 3},
    "cifar 3->16": {"kernels": 16, "size": (32, 32), "batch": 140},
    "mnist": {"channels": 1, "kernels": 32, "size": (28, 28), "padding": (0, 0), "batch": 5},
    "tiny imagenet": {"kernels": 64, "size": (64, 64), "batch": 2},
    "imagenet 7x7/2": {"kernels": 64, "size": (224, 224), "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "batch": 1},
    "imagenet 3x3/2": {"kernels": 32, "size": (224, 224), "stride": (2, 2), "batch": 1},
    "patch 16": {"kernels": 48, "size": (64, 64), "kernel": (16, 16), "stride": (16, 16), "padding": (0, 0), "batch": 2},
    "convnext": {"kernels": 96, "size": (64, 64), "kernel": (4, 4), "stride": (4, 4), "padding": (0, 0), "batch": 2},
}  # fmt: skip


def check_tf32(arguments: tuple) -> None:
    a = as_dict(arguments)
    results = update(*arguments)
    assert_in_ball_and_box(arguments, results[0])
    one = {**a, "steps": 1, "need_output": False, "need_weight_grad": False}
    eta = a["eta"]
    for _ in range(a["steps"]):
        before, eta = eta, update(*{**one, "eta": eta}.values())[0]
        _check_step(arguments, before, eta, TF32)
    assert torch.equal(results[0], eta)
    at = bounds_at(arguments, a["x"].double() + results[0].double(), TF32)
    for name, actual, value, bound in zip(NAMES[1:], results[1:], at.results, at.result_bounds, strict=True):
        if actual.numel():
            assert_within(name, actual, value, bound)


def test_the_library_is_loaded():
    assert ops.native_status.cuda, ops.native_status.why_not_cuda


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_against_the_oracle(variant, activation, layout):
    check_update(
        update,
        make_arguments(**VARIANTS[variant], activation=activation, steps=2, costate_layout=layout, **AFFINE_PARTS),
    )


@pytest.mark.parametrize("stem", FULL_SIZE)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(
    ("costate_dtype", "layout"),
    [(torch.float32, LAYOUTS[0]), (torch.bfloat16, LAYOUTS[1])],
    ids=["fp32-nchw", "bf16-nhwc"],
)
def test_full_size(stem, activation, costate_dtype, layout):
    changes = {"costate_layout": layout, "x_layout": layout, "costate_dtype": costate_dtype, "steps": 2}
    arguments = make_arguments(**FULL_SIZE[stem], **changes, activation=activation)
    check_update(update, arguments)
    check_tf32((*arguments[:-1], True))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_and_norms(norm, activation, dtype):
    check_update(
        update, make_arguments(norm=norm, activation=activation, dtype=dtype, kernels=16, steps=2, **AFFINE_PARTS)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_geometry(case):
    check_update(update, make_arguments(**case))


@pytest.mark.parametrize("empty", ["batch", "steps"])
def test_empty_batches_and_no_steps(empty):
    check_update(update, make_arguments(**{empty: 0}, bias=True, kernels=16))
