"""The first-layer update on every backend of this machine, against the fp64 oracle."""

from __future__ import annotations

import os

import pytest
import torch
from cases import LAYOUTS, cases, make_arguments
from hypothesis import HealthCheck, given, settings
from policy import as_dict, assert_as_exact_as_plain, assert_in_ball_and_box, check_update

from yopo_ext.kernels import ops
from yopo_ext.kernels.constants import ACTIVATIONS

EXAMPLES = int(os.environ.get("YOPO_TEST_EXAMPLES", "60"))


def backends() -> list:
    native_missing = ops.native_status.why_not_cpu
    return [
        pytest.param(ops.first_layer_update_reference, id="reference"),
        pytest.param(ops.first_layer_update_library, id="library"),
        pytest.param(
            ops.first_layer_update,
            id="native",
            marks=pytest.mark.skipif(bool(native_missing), reason=str(native_missing)),
        ),
    ]


@pytest.fixture(params=backends())
def update(request):
    return request.param


# What a stem looks like in the wild; odd sizes on purpose.
STEMS = {
    "cifar": {"kernels": 64, "size": (32, 32), "batch": 3},
    "wide-resnet": {"kernels": 16, "size": (31, 33), "batch": 2},
    "mnist": {"channels": 1, "kernels": 32, "size": (28, 28), "padding": (0, 0), "bias": True, "activation": "relu"},
    "digits": {"channels": 1, "kernels": 16, "size": (8, 8), "bias": True, "activation": "relu", "batch": 17},
    "imagenet-7x7/2": {"kernels": 9, "size": (37, 41), "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "3x3/2": {"kernels": 24, "size": (33, 32), "stride": (2, 2), "activation": "silu", "scale": True, "shift": True},
    "patch": {"kernels": 20, "size": (32, 48), "kernel": (16, 16), "stride": (16, 16), "padding": (0, 0), "bias": True},
    "convnext": {"kernels": 10, "size": (19, 18), "kernel": (4, 4), "stride": (4, 4), "padding": (0, 0)},
    "stride beyond kernel": {"kernel": (2, 1), "stride": (3, 4), "size": (14, 15), "padding": (0, 1)},
    "one pixel": {"size": (1, 1), "kernel": (1, 1), "padding": (0, 0), "batch": 1, "channels": 1, "kernels": 1},
    "depthwise": {"channels": 4, "kernels": 8, "groups": 4, "activation": "gelu"},
}


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("mask_start", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_stems(update, stem, norm, mask_start, layout):
    options = {"steps": 3, "norm": norm, "mask_start": mask_start, "x_layout": layout, "costate_layout": layout}
    check_update(update, make_arguments(**STEMS[stem], **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("costate_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_activations_and_dtypes(update, activation, dtype, costate_dtype):
    if costate_dtype == torch.float64 and dtype == torch.float32:
        pytest.skip("fp64 costates go with fp64 inputs")
    check_update(
        update,
        make_arguments(
            activation=activation, dtype=dtype, costate_dtype=costate_dtype, steps=2, bias=True, scale=True, shift=True,
            normalise=True,
        ),
    )  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_geometry(update, case):
    check_update(update, make_arguments(**case))


@pytest.mark.parametrize("mask_start", [False, True])
@pytest.mark.parametrize("steps", range(1, 11))
def test_the_collapse_is_bitwise_the_iterated_definition(update, steps, mask_start):
    """Saturated pixels, images at the bounds and perturbations outside the interval included."""
    arguments = make_arguments(
        steps=steps, saturated=0.6, step_size=0.013, eps=0.05, kernels=16, size=(16, 16), batch=4, mask_start=mask_start
    )
    arguments[0][0], arguments[0][1] = 0.0, 1.0
    a = as_dict(arguments)
    eta = a["eta"]
    lo, hi, eps, sigma = (torch.tensor(a[k]) for k in ("lo", "hi", "eps", "step_size"))
    one = {**a, "steps": 1, "need_output": False, "need_weight_grad": False, "step_size": [1.0], "eps": [2.0]}
    one["mask_start"] = False
    # the gradient's sign, read off one long unbounded step of the same backend
    probe = update(*{**one, "eta": torch.zeros_like(eta), "lo": [-9.0], "hi": [9.0]}.values())[0]
    lower, upper = torch.clamp(lo - a["x"], max=0), torch.clamp(hi - a["x"], min=0)
    for i in range(steps):
        masked = ((eta < lower) | (eta > upper)) & (mask_start and i == 0)
        g = torch.where(masked, 0.0, torch.sign(probe))
        eta = torch.minimum(torch.maximum(eta + sigma * g, torch.maximum(-eps, lower)), torch.minimum(eps, upper))
    assert torch.equal(update(*arguments)[0], eta)


def test_results_do_not_depend_on_threads_or_runs(update):
    arguments = make_arguments(batch=23, kernels=16, size=(16, 17), activation="relu", bias=True, steps=2)
    before = torch.get_num_threads()
    expected = update(*arguments)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(2):
                for name, actual, first in zip(
                    ("eta", "output", "weight", "bias"), update(*arguments), expected, strict=False
                ):
                    if (
                        update is ops.first_layer_update or name == "eta"
                    ):  # PyTorch's own convolutions make no such promise
                        assert torch.equal(actual, first), name
    finally:
        torch.set_num_threads(before)


def test_a_sample_does_not_depend_on_its_batch(update):
    arguments = make_arguments(batch=9, kernels=16, activation="relu", steps=2)
    a = as_dict(arguments)
    whole = update(*arguments)
    for i in (0, 8):
        alone = update(*{**a, **{k: a[k][i : i + 1] for k in ("x", "eta", "costate")}}.values())
        assert torch.equal(alone[0], whole[0][i : i + 1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["costate", "weight", "x", "eta"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_the_ball_holds_whatever_the_numbers_are(update, norm, poison, where, activation):
    arguments = make_arguments(norm=norm, steps=2, activation=activation)
    as_dict(arguments)[where].flatten()[3] = poison
    a = as_dict(arguments)
    eta = update(*arguments)[0]
    if where == "x":
        eta, a["x"] = eta.clone(), torch.nan_to_num(a["x"], nan=0.5)
        eta.flatten()[3] = 0.0
    assert_in_ball_and_box(tuple(a.values()), eta)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_l2_direction_at_any_scale_of_the_costate(update, scale):
    """As exact as at scale 1: the direction does not depend on the scale."""
    plain = update(*make_arguments(norm="l2", steps=2))[0]
    scaled = update(*make_arguments(norm="l2", steps=2, costate_scale=scale))[0]
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in make_arguments(norm="l2", steps=2)]
    exact = ops.first_layer_update_reference(*double)[0]
    assert_as_exact_as_plain("eta", scaled, plain, exact, torch.float32)


def test_zero_gradients_move_nothing(update):
    for norm in ("linf", "l2"):
        a = as_dict(make_arguments(norm=norm, steps=3, saturated=0.0))
        a["costate"].zero_()
        a["eta"].mul_(0.01)
        torch.testing.assert_close(update(*a.values())[0], a["eta"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("empty", ["batch", "steps"])
def test_empty_batches_and_no_steps(update, empty):
    arguments = make_arguments(**{empty: 0}, bias=True)
    results = check_update(update, arguments)
    if empty == "batch":
        assert results[0].shape[0] == 0
        assert torch.equal(results[2], torch.zeros_like(results[2]))


def test_views_need_no_copy(update):
    a = as_dict(make_arguments(steps=2, activation="relu"))
    expected = update(*a.values())
    for name in ("x", "eta", "costate"):
        wide = torch.full((*a[name].shape[:3], 2 * a[name].shape[3]), float("nan"), dtype=a[name].dtype)
        wide[..., ::2] = a[name]
        a[name] = wide[..., ::2]
    for actual, first in zip(update(*a.values()), expected, strict=True):
        torch.testing.assert_close(actual, first)


def test_inputs_are_left_alone(update):
    arguments = make_arguments(steps=3, activation="relu", bias=True)
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
    update(*arguments)
    for before, after in zip(copies, arguments, strict=True):
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
