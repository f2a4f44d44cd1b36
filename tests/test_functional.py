"""The public functions: results, None fields, errors that name the argument, before anything runs."""

from __future__ import annotations

import re

import pytest
import torch

import yopo_ext

X = torch.rand(2, 3, 8, 8)
ETA = torch.zeros_like(X)
W = torch.randn(5, 3, 3, 3)
P = torch.randn(2, 5, 8, 8)
GOOD = {"padding": 1, "step_size": 2 / 255, "eps": 8 / 255}


def test_fields_that_were_not_asked_for_are_none():
    bias = torch.randn(5)
    update = yopo_ext.first_layer_update(X, ETA, P, W, bias, **GOOD)
    assert update.grad_scale is None
    assert update.grad_shift is None
    assert update.grad_bias.shape == (5,)
    update = yopo_ext.first_layer_update(X, ETA, P, W, bias, need_output=False, need_weight_grad=False, **GOOD)
    assert update[1:] == (None,) * 5


def test_adversary_steps_is_the_update_alone():
    update = yopo_ext.first_layer_update(X, ETA, P, W, steps=3, activation="relu", **GOOD)
    assert torch.equal(yopo_ext.adversary_steps(X, ETA, P, W, steps=3, activation="relu", **GOOD), update.eta)


def test_narrow_parameters_are_widened_and_their_gradients_narrowed():
    update = yopo_ext.first_layer_update(X, ETA, P, W.bfloat16(), **GOOD)
    assert update.grad_weight.dtype == torch.bfloat16
    wide = yopo_ext.first_layer_update(X, ETA, P, W.bfloat16().float(), **GOOD)
    torch.testing.assert_close(update.grad_weight, wide.grad_weight.bfloat16())


def test_nothing_carries_a_graph():
    update = yopo_ext.first_layer_update(X, ETA, P, W.clone().requires_grad_(), **GOOD)
    assert not any(t.requires_grad for t in update if t is not None)


def test_explain_names_backend_and_reason():
    text = yopo_ext.explain(X, ETA, P, W, **GOOD)
    if text.startswith("native cpu"):
        assert re.match(r"native cpu, (avx512|avx2|baseline): ", text)
    assert text.startswith(("native cpu", "reference"))
    assert "collapsed" in text
    assert "iterated" in yopo_ext.explain(X, ETA, P, W, activation="relu", steps=3, **GOOD)


def test_build_info_lists_what_there_is():
    info = yopo_ext.build_info()
    assert info["version"] == yopo_ext.__version__
    assert "silu" in info["activations"]
    assert "bfloat16" in info["costate_dtypes"]


BAD = {
    "x not a tensor": (TypeError, "x", {"x": [1.0]}),
    "integer images": (TypeError, "x", {"x": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}),
    "bf16 x": (TypeError, "x", {"x": X.bfloat16()}),
    "x shape": (ValueError, "x", {"x": X[0]}),
    "eta shape": (ValueError, "eta", {"eta": ETA[:1]}),
    "eta dtype": (TypeError, "eta", {"eta": ETA.double()}),
    "costate shape": (ValueError, "costate", {"costate": P[..., :7]}),
    "costate dtype": (TypeError, "costate", {"costate": P.double()}),
    "weight channels": (ValueError, "weight", {"weight": W[:, :2]}),
    "groups": (ValueError, "groups", {"groups": 2}),
    "groups type": (TypeError, "groups", {"groups": 1.0}),
    "bias shape": (ValueError, "bias", {"bias": torch.zeros(4)}),
    "scale shape": (ValueError, "scale", {"scale": torch.zeros(5, 1)}),
    "stride": (ValueError, "stride", {"stride": 0}),
    "stride triple": (ValueError, "stride", {"stride": (1, 1, 1)}),
    "padding": (ValueError, "padding", {"padding": -1}),
    "kernel too large": (ValueError, "weight", {"x": X[..., :1, :1], "eta": ETA[..., :1, :1], "padding": 0}),
    "mean without std": (ValueError, "mean", {"mean": 0.5}),
    "std zero": (ValueError, "std", {"mean": 0.5, "std": 0.0}),
    "std count": (ValueError, "std", {"mean": 0.5, "std": [1.0, 1.0]}),
    "eps negative": (ValueError, "eps", {"eps": -0.1}),
    "eps in 0..255 units": (ValueError, "0..255", {"eps": 8.0}),
    "eps nan": (ValueError, "eps", {"eps": float("nan")}),
    "eps text": (TypeError, "eps", {"eps": "8/255"}),
    "eps per channel with l2": (ValueError, "eps", {"eps": [0.1, 0.1, 0.1], "norm": "l2"}),
    "eps count": (ValueError, "eps", {"eps": [0.1, 0.1]}),
    "step_size negative": (ValueError, "step_size", {"step_size": -1.0}),
    "steps": (ValueError, "steps", {"steps": -1}),
    "steps type": (TypeError, "steps", {"steps": 2.0}),
    "bounds order": (ValueError, "bounds", {"bounds": (1.0, 0.0)}),
    "bounds type": (TypeError, "bounds", {"bounds": 1.0}),
    "norm": (ValueError, "norm", {"norm": "l1"}),
    "activation": (ValueError, "activation", {"activation": "tanh"}),
    "device": (ValueError, "eta", {"eta": ETA.to("meta")}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    error, name, change = BAD[case]
    arguments = {"x": X, "eta": ETA, "costate": P, "weight": W, **GOOD, **change}
    for function in (yopo_ext.first_layer_update, yopo_ext.adversary_steps, yopo_ext.explain):
        with pytest.raises(error, match=name):
            function(**arguments)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="step"):
        yopo_ext.adversary_steps(X, ETA, P, W, step=1, **GOOD)


def test_l2_eps_may_exceed_one():
    assert yopo_ext.adversary_steps(X, ETA, P, W, padding=1, norm="l2", eps=2.0, step_size=0.5).abs().max() > 0
