"""Which geometries take the package's kernels and which the library's products, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import make_arguments
from policy import as_dict, check_update

import yopo_ext
from yopo_ext.kernels import costs, dispatch, ops

needs_native = pytest.mark.skipif(not ops.native_status.cpu, reason=str(ops.native_status.why_not_cpu))

CIFAR = {"batch": 64, "kernels": 64, "size": (32, 32)}
MNIST = {"batch": 64, "channels": 1, "kernels": 32, "size": (28, 28), "padding": (0, 0)}
PATCH = {"batch": 8, "kernels": 192, "size": (224, 224), "kernel": (16, 16), "stride": (16, 16), "padding": (0, 0)}
WHOLE = {**MNIST, "kernel": (28, 28)}
IMAGENET = {"batch": 4, "kernels": 64, "size": (224, 224), "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}
DIGITS = {"batch": 64, "channels": 1, "kernels": 10, "size": (8, 8)}


def problem(allow_tf32: bool = True, **case) -> costs.Problem:
    """The sizes of a case, whose tensors are never made."""
    arguments = make_arguments(**{**case, "batch": 1})
    small = dispatch._problem(arguments[0], *arguments[2:4], (*arguments[7:-1], allow_tf32))
    return costs.Problem(**{**vars(small), "batch": case["batch"]})


@pytest.mark.parametrize(
    "case",
    [
        CIFAR, MNIST, IMAGENET, DIGITS, {**CIFAR, "activation": "relu"}, {**CIFAR, "norm": "l2"}, {**CIFAR, "kernels": 10},
        {**CIFAR, "batch": 1}, {**CIFAR, "batch": 512}, {**CIFAR, "kernel": (1, 1), "padding": (0, 0)},
        {**CIFAR, "kernel": (9, 9), "padding": (4, 4)}, {**CIFAR, "channels": 32, "groups": 32},
        {**CIFAR, "kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_stems_take_the_cpu_kernels(case):
    assert costs.why_library(problem(**case), "cpu") is None


@pytest.mark.parametrize(
    "case",
    [
        WHOLE, {**WHOLE, "activation": "relu"}, {**CIFAR, "kernel": (31, 31), "padding": (0, 0)}, PATCH,
        {**CIFAR, "kernel": (32, 32), "stride": (32, 32), "padding": (0, 0)},
        {**CIFAR, "kernel": (24, 24), "padding": (0, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_kernels_as_large_as_the_image_take_library_products(case):
    assert "times as long" in costs.why_library(problem(**case), "cpu")


@pytest.mark.parametrize(
    "case", [CIFAR, IMAGENET, PATCH, {**CIFAR, "activation": "relu"}, {**MNIST, "activation": "relu"}, DIGITS], ids=str
)
def test_stems_take_the_cuda_kernels(case):
    assert costs.why_library(problem(**case), "cuda") is None


@pytest.mark.parametrize(
    "case",
    [
        {"norm": "l2"}, {"kernels": 10}, {"groups": 3, "kernels": 48}, {"stride": (3, 3)}, {"dtype": torch.float64},
        {"kernel": (9, 9)}, {"stride": (2, 1)}, {"norm": "l2", "activation": "relu"},
    ],
    ids=str,
)  # fmt: skip
def test_what_only_the_general_cuda_kernel_takes_goes_to_the_library(case):
    assert costs.why_library(problem(**{**CIFAR, "batch": 256, **case}), "cuda") is not None


def test_nothing_to_do_goes_nowhere():
    for device in ("cpu", "cuda", "meta"):
        assert costs.why_library(problem(**{**WHOLE, "batch": 0}), device) is None


@needs_native
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_the_operator_runs_what_explain_says(monkeypatch, activation):
    """Through the public function, whose results are the library's to the bit."""
    arguments = make_arguments(**{**WHOLE, "batch": 5, "kernels": 64}, activation=activation, steps=2)
    a = as_dict(arguments)
    options = {"steps": 2, "activation": activation, "step_size": a["step_size"], "eps": a["eps"]}
    text = yopo_ext.explain(a["x"], a["eta"], a["costate"], a["weight"], **options)
    assert text.startswith("library, its products and the kernels' steps")
    assert "times as long" in text
    update = yopo_ext.first_layer_update(a["x"], a["eta"], a["costate"], a["weight"], **options)
    expected = ops.first_layer_update_library(*arguments)
    for actual, other in zip((update.eta, update.output, update.grad_weight), expected, strict=False):
        assert torch.equal(actual, other)


@pytest.mark.parametrize(
    "case",
    [
        {**WHOLE, "batch": 4, "kernels": 6, "size": (9, 7), "kernel": (9, 7)},
        {**WHOLE, "batch": 4, "kernels": 6, "size": (9, 7), "kernel": (9, 7), "stride": (2, 3)},
        {"kernels": 6, "size": (13, 11), "kernel": (4, 5), "stride": (4, 5), "padding": (0, 0)},
        {"kernels": 6, "size": (9, 11), "kernel": (9, 5), "stride": (1, 5), "padding": (0, 0)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patches_as_matrix_products(case, activation, layout):
    parts = {"bias": True, "scale": True, "shift": True, "normalise": True}
    arguments = make_arguments(**case, **parts, activation=activation, steps=2, x_layout=layout, costate_layout=layout)
    assert dispatch._problem(arguments[0], *arguments[2:4], arguments[7:]).patches
    check_update(ops.first_layer_update_library, arguments)
