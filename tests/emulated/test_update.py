"""Every kernel variant's source, executed on the CPU, against the fp64 oracle and against the general kernel."""

from __future__ import annotations

import math
import os

import pytest
import torch
from backend import SCHEDULES, describe, machine, native, update
from cases import LAYOUTS, cases, make_arguments
from hypothesis import HealthCheck, given, settings
from policy import NAMES, as_dict, assert_in_ball_and_box, assert_within, bounds_at, check_update
from variants import AFFINE_PARTS, VARIANTS

from yopo_ext.kernels.constants import ACTIVATIONS

EXAMPLES = int(os.environ.get("YOPO_TEST_EXAMPLES", "25"))
TF32 = 2.0**-11
# where an image must go in bands, a machine with little shared memory makes a small image a large one
LIMITS = {"fused 32 columns, bands": 50, "fused 160 columns, bands": 72}


def on_machine(variant: str, schedule: str = "forward"):
    context = machine(schedule)
    context.__enter__()
    if variant in LIMITS:
        native.set_limits(LIMITS[variant] * 1024, LIMITS[variant] * 1024 + 1024, 3)
    return context


@pytest.fixture(params=VARIANTS)
def variant(request):
    context = on_machine(request.param)
    yield request.param
    context.__exit__(None, None, None)


def arguments_of(variant: str, *, tf32: bool = False, **changes) -> tuple:
    arguments = (*make_arguments(**{**VARIANTS[variant], **changes})[:-1], tf32)
    assert describe(arguments)["variant"].startswith(variant), describe(arguments)["variant"]
    return arguments


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mask_start", [False, True])
def test_against_the_oracle(variant, activation, layout, mask_start):
    changes = {"steps": 2, "costate_layout": layout, "mask_start": mask_start, **AFFINE_PARTS}
    check_update(update, arguments_of(variant, activation=activation, **changes))


@pytest.mark.parametrize("costate_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_narrow_costates(variant, costate_dtype, layout):
    check_update(
        update,
        arguments_of(variant, activation="relu", costate_dtype=costate_dtype, costate_layout=layout, x_layout=layout),
    )


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("costate_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tf32(variant, activation, costate_dtype):
    """Operands of 11 significant bits; the general kernel has no tensor cores and stays exact."""
    arguments = arguments_of(
        variant, tf32=True, activation=activation, costate_dtype=costate_dtype, steps=2, **AFFINE_PARTS
    )
    check_update(update, arguments, None if variant == "general" else TF32)


def test_tf32_is_less_than_fp32_and_more_than_nothing():
    """Its output is within the bound of 11 bits, and outside that of 24."""
    arguments = arguments_of("fused 32 columns, one launch", steps=0)
    u = arguments[0].double() + arguments[1].double()
    bounds = {eps: bounds_at(arguments, u, eps) for eps in (torch.finfo(torch.float32).eps, TF32)}
    outputs = [update(*arguments[:-1], allow_tf32)[1] for allow_tf32 in (False, True)]
    for output, at in zip(outputs, bounds.values(), strict=True):
        assert_within("output", output, at.results[0], at.result_bounds[0])
    single = next(iter(bounds.values()))
    assert ((outputs[1] - single.results[0]).abs() > single.result_bounds[0]).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_the_order_of_threads_changes_nothing(activation, schedule):
    for name in VARIANTS:
        context = on_machine(name)
        arguments = arguments_of(name, activation=activation, steps=2, **AFFINE_PARTS)
        expected = update(*arguments)
        context.__exit__(None, None, None)
        context = on_machine(name, schedule)
        for what, actual, first in zip(NAMES, update(*arguments), expected, strict=True):
            assert torch.equal(actual, first), f"{name}: {what}"
        context.__exit__(None, None, None)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_fused_agrees_with_general(variant, activation):
    """Both are within the oracle's bounds on the same problem."""
    arguments = arguments_of(variant, activation=activation, **AFFINE_PARTS)
    check_update(update, arguments)
    with machine():
        native.set_limits(1024, 2048, 3)
        assert describe(arguments)["general"]
        check_update(update, arguments)


@pytest.mark.parametrize("size", [(1, 2), (3, 3), (1, 129), (129, 2), (16, 8), (17, 31), (32, 32)])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_sizes(size, activation):
    with machine():
        check_update(
            update, arguments_of("fused 32 columns, one launch", size=size, activation=activation, kernels=16, batch=2)
        )


@pytest.mark.parametrize("kernels", [16, 32, 80, 128, 144])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_numbers_of_kernels(kernels, activation):
    with machine():
        check_update(
            update, arguments_of("fused 32 columns, one launch", kernels=kernels, size=(6, 7), activation=activation)
        )


@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": (2, 2)}, {"dilation": (2, 3), "padding": (2, 3)}, {"padding": (0, 2)}, {"kernel": (1, 5)},
        {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}, {"channels": 2, "kernel": (3, 3), "padding": (4, 0)},
        {"kernel": (5, 5), "padding": (2, 2)}, {"channels": 16},
        {"stride": (2, 2), "size": (10, 10), "kernel": (1, 1), "padding": (0, 0)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_geometries(geometry, activation):
    with machine():
        arguments = make_arguments(
            **{"kernels": 16, "size": (9, 10), "steps": 2, **geometry}, activation=activation, **AFFINE_PARTS
        )
        assert not describe(arguments)["general"]
        check_update(update, arguments)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_was_asked_for(variant, wanted):
    for activation in ("identity", "relu"):
        changes = {"need_output": wanted[0], "need_weight_grad": wanted[1], "activation": activation}
        check_update(update, make_arguments(**{**VARIANTS[variant], **changes}))


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("mask_start", [False, True])
def test_steps(variant, steps, activation, mask_start):
    options = {"steps": steps, "activation": activation, "mask_start": mask_start, "bounds": (0.1, 0.8)}
    check_update(update, arguments_of(variant, per_channel=True, **options))


def test_views_need_no_copy(variant):
    a = as_dict(arguments_of(variant, activation="relu"))
    expected = update(*a.values())
    for name in ("x", "eta", "costate"):
        wide = torch.full((*a[name].shape[:3], 2 * a[name].shape[3] + 1), math.nan, dtype=a[name].dtype)
        wide[..., 1::2] = a[name]
        a[name] = wide[..., 1::2]
    for what, actual, first in zip(NAMES, update(*a.values()), expected, strict=True):
        assert torch.equal(actual, first), what


@pytest.mark.parametrize("where", ["costate", "weight", "x", "eta"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_the_ball_holds_whatever_the_numbers_are(variant, where, poison):
    for activation in ("identity", "relu"):
        arguments = arguments_of(variant, steps=2, activation=activation)
        as_dict(arguments)[where].flatten()[3] = poison
        a = as_dict(arguments)
        eta = update(*arguments)[0]
        if where == "x":
            a["x"] = torch.nan_to_num(a["x"], nan=0.5)
            eta.flatten()[3] = 0.0
        assert_in_ball_and_box(tuple(a.values()), eta)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000], ids=hex)
def test_a_nonfinite_costate_shows_in_the_weight_gradient(variant, activation, tf32, bits):
    """0x7FFFFFFF is the NaN that CUDA computes: rounding to tf32 by adding to its bits would make it a zero."""
    arguments = arguments_of(variant, tf32=tf32, activation=activation, bias=True)
    costate = as_dict(arguments)["costate"]
    assert not costate[0, 2, 1, 1].isnan()
    costate.view(torch.int32)[0, 2, 1, 1] = bits
    _, _, grad_weight, grad_bias, *_ = update(*arguments)
    finite = grad_weight.isfinite().flatten(1)
    assert not finite[2].all()
    assert not grad_bias[2].isfinite()
    assert finite[:2].all()
    assert finite[3:].all()


def test_a_poisoned_image_leaves_the_others_alone(variant):
    arguments = arguments_of(variant, batch=3, activation="relu", need_weight_grad=False)
    expected = update(*arguments)
    arguments[2][1] = math.nan
    results = update(*arguments)
    for i in (0, 2):
        assert torch.equal(results[0][i], expected[0][i])
        assert torch.equal(results[1][i], expected[1][i])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(max_size=9))
def test_any_geometry(case):
    with machine("random"):
        check_update(update, make_arguments(**case))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(max_size=9))
def test_any_geometry_fused(case):
    stride = 1 + case["stride"][0] % 2
    case |= {
        "groups": 1,
        "channels": 3,
        "kernels": 16,
        "norm": "linf",
        "dtype": torch.float32,
        "stride": (stride, stride),
    }
    case |= {"costate_dtype": None if case["costate_dtype"] == torch.float64 else case["costate_dtype"]}
    with machine("reverse"):
        check_update(update, make_arguments(**case))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask_start", [False, True])
def test_general_kernel(norm, activation, dtype, mask_start, schedule):
    arguments = make_arguments(
        norm=norm, activation=activation, dtype=dtype, mask_start=mask_start, steps=3, kernels=4, size=(5, 6),
        **AFFINE_PARTS,
    )  # fmt: skip
    assert describe(arguments)["general"]
    check_update(update, arguments)


def test_many_channels_with_their_own_constants(schedule):
    arguments = make_arguments(channels=40, kernels=3, size=(4, 4), batch=2, per_channel=True, normalise=True, steps=2)
    check_update(update, arguments)
