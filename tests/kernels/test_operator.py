"""The operator as PyTorch sees it: opcheck, fake tensors, torch.compile."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, make_arguments

import yopo_ext
from yopo_ext.kernels import ops


@pytest.mark.parametrize(
    "op",
    [ops.first_layer_update, ops.first_layer_update_reference, ops.first_layer_update_library],
    ids=["dispatched", "reference", "library"],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck(op, layout, wanted):
    arguments = make_arguments(
        steps=2, activation="relu", bias=True, scale=True, shift=True, need_output=wanted, need_weight_grad=wanted,
        costate_dtype=torch.bfloat16, x_layout=layout, costate_layout=layout,
    )  # fmt: skip
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_opcheck_dynamic_shapes():
    torch.library.opcheck(ops.first_layer_update, make_arguments(bias=True), test_utils=("test_aot_dispatch_dynamic",))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_does_not_recompile(backend):
    arguments = make_arguments(batch=4, activation="relu")
    x, eta, costate, weight = arguments[:4]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def step(x, eta, costate, weight):
        update = yopo_ext.first_layer_update(
            x, eta * 0.5, costate, weight, padding=1, activation="relu", steps=2, step_size=2 / 255, eps=8 / 255
        )
        return update.eta + 1, update.output, update.grad_weight * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counting, fullgraph=True)
    for i in range(3):
        eta = eta.roll(i)
        for actual, expected in zip(compiled(x, eta, costate, weight), step(x, eta, costate, weight), strict=True):
            torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1
