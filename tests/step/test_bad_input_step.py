"""Misuse of `yopo_step` and `trades_yopo_step`: an error that names the argument, before anything has changed."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from step_oracle import network
from torch import nn

from yopo_ext import trades_yopo_step, yopo_step

X = torch.rand(4, 3, 8, 7, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 4])


def with_pixel(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


def over_two_devices() -> nn.Module:
    """nn.DataParallel as it is on a machine with two of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = nn.DataParallel(nn.Conv2d(3, 6, 3))
    wrapped.device_ids = [0, 1]
    return wrapped


CASES: list[tuple[dict, type[Exception], str]] = [
    # images
    ({"x": X[0]}, ValueError, r"x must have shape \[any, any, any, any\]; got \[3, 8, 7\]"),
    ({"x": X.numpy()}, TypeError, "x must be a torch.Tensor; got ndarray"),
    ({"x": (X * 255).to(torch.uint8)}, TypeError, "x must be one of float32, float64; got uint8: scale integer images"),
    ({"x": X.half()}, TypeError, "x must be one of float32, float64; got float16"),
    ({"x": with_pixel(float("nan"))}, ValueError, "x must be finite"),
    ({"x": with_pixel(float("inf")), "bounds": None}, ValueError, "x must be finite"),
    ({"x": with_pixel(1.01)}, ValueError, r"x must lie in bounds, \(0, 1\); got values from .* to 1.01"),
    ({"x": 255 * X}, ValueError, "x must lie in bounds"),
    ({"x": X.to("meta")}, ValueError, r"(x|y) must be on .* device"),
    ({"x": X[:, :2]}, ValueError, "x must have as many channels as first_layer takes, 3; got 2"),
    # labels
    ({"y": Y[:3]}, ValueError, r"y must have shape \[4\], one label per image of x; got \[3\]"),
    ({"y": torch.tensor([0, 1, 2, 5])}, ValueError, r"y must hold labels in \[0, 4\]; got 5"),
    ({"y": torch.tensor([0, 1, 2, -1])}, ValueError, r"y must hold labels in \[0, 4\]; got -1"),
    ({"y": Y.int()}, TypeError, "y must be int64 class labels .*; got int32"),
    ({"y": Y[:, None]}, ValueError, r"y must have shape \[4\] for this model's 5 classes; got \[4, 1\]"),
    ({"y": torch.rand(4, 3)}, ValueError, r"y must have shape \[4, 5\] for this model's 5 classes; got \[4, 3\]"),
    ({"eps": None}, TypeError, "eps must be a number or a sequence of numbers; got None"),
    ({"y": Y.float()}, ValueError, r"y must have shape \[4, classes\]"),
    ({"y": [0, 1, 2, 3]}, TypeError, "y must be a torch.Tensor; got list"),
    ({"y": Y.to("meta")}, ValueError, r"y must be on x's device \(cpu\); got meta"),
    # threat model
    ({"eps": 8}, ValueError, "eps must be in the units of x.*0..255 units: use 8/255"),
    ({"eps": -0.1}, ValueError, "eps must be >= 0; got -0.1"),
    ({"eps": float("nan")}, ValueError, "eps must be finite"),
    ({"eps": "8/255"}, TypeError, "eps must be a number"),
    ({"eps": [0.1, 0.2]}, ValueError, r"eps must be a number or have one value per input channel \(3\); got 2"),
    ({"eps": [0.1, 0.2, 0.3], "norm": "l2"}, ValueError, "eps must be a single number with norm='l2'"),
    ({"step_size": -1 / 255}, ValueError, "step_size must be >= 0"),
    ({"norm": "l1"}, ValueError, "norm must be one of 'linf', 'l2'; got 'l1'"),
    ({"bounds": (1.0, 0.0)}, ValueError, "bounds must be .* lo < hi"),
    ({"bounds": 1.0}, TypeError, r"bounds must be a pair \(lo, hi\) or None"),
    ({"mean": 0.5}, ValueError, "mean and std must be given together"),
    ({"mean": 0.5, "std": 0.0}, ValueError, "std must be > 0"),
    ({"mean": [0.5, 0.5], "std": 1.0}, ValueError, "mean must be a number or have one value per input channel"),
    # steps and choices
    ({"outer_steps": 0}, ValueError, "outer_steps must be an integer >= 1; got 0"),
    ({"inner_steps": 0}, ValueError, "inner_steps must be an integer >= 1; got 0"),
    ({"inner_steps": 2.0}, TypeError, "inner_steps must be an integer >= 1; got 2.0"),
    ({"gradient": "papers"}, ValueError, "gradient must be one of 'paper', 'released', 'full'; got 'papers'"),
    ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'"),
    ({"train_on": "first"}, ValueError, "train_on must be one of 'all', 'last'"),
    ({"on_nonfinite": "warn"}, ValueError, "on_nonfinite must be one of"),
    ({"init": "normal"}, ValueError, "init must be 'uniform', 'zero' or a tensor like x; got 'normal'"),
    ({"init": torch.zeros(3, 8, 7)}, ValueError, r"init must have shape \[4, 3, 8, 7\]"),
    ({"init": torch.zeros_like(X).double()}, TypeError, "init must be one of float32; got float64"),
    ({"init": torch.zeros_like(X, device="meta")}, ValueError, "init must be on x's device"),
    ({"validate": 1}, TypeError, "validate must be True, False or None"),
    ({"generator": 0}, TypeError, "generator must be a torch.Generator or None; got 0"),
    ({"loss_fn": "ce"}, TypeError, "loss_fn must be callable"),
    ({"loss_fn": lambda out, y: F.cross_entropy(out, y, reduction="none")}, ValueError, "loss_fn must return a scalar"),
    ({"loss_fn": lambda out, y: 1.0}, ValueError, "loss_fn must return a scalar tensor; got float"),
    ({"backward": 1}, TypeError, "backward must be callable"),
    ({"after_pass": "x"}, TypeError, "after_pass must be callable"),
    # first layer and model
    ({"first_layer": "second"}, ValueError, "first_layer must name a submodule of model; got 'second'"),
    ({"first_layer": nn.Conv2d(3, 6, 3)}, ValueError, "first_layer must be a submodule of model"),
    ({"first_layer": 0}, TypeError, "first_layer must be a module, its dotted name, a sequence of these or None"),
    ({"first_layer": "rest.2"}, ValueError, "first_layer must take the model's input"),
    ({"first_layer": "unused"}, ValueError, "first_layer must be a layer that the model runs; 'unused' did not run"),
    ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module; got function"),
    ({"model": over_two_devices()}, TypeError, r"model must not be a DataParallel over 2 devices: give model\.module"),
]  # fmt: skip


def model_under_test() -> nn.Module:
    model = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32)
    model.unused = nn.Conv2d(3, 6, 3)
    return model


def refuse(step, changes: dict, error: type[Exception], message: str, used_before: bool) -> None:
    model = model_under_test()
    if used_before:
        step(model, X, Y, outer_steps=1)
        model.zero_grad()
    buffers = [b.clone() for b in model.buffers()]
    options = {"model": model, "x": X, "y": Y, "outer_steps": 2} | changes
    with pytest.raises(error, match=message):
        step(options.pop("model"), options.pop("x"), options.pop("y"), **options)
    assert all(p.grad is None for p in model.parameters())
    # What only the output shows, after a forward pass, is taken back in the first call alone.
    if not (used_before and "must return a scalar" in message):
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_yopo_step_refuses(changes: dict, error: type[Exception], message: str, used_before: bool) -> None:
    refuse(yopo_step, changes, error, message, used_before)


NOT_IN_TRADES = {"gradient", "reduction", "train_on", "init", "after_pass", "loss_fn"}
TRADES_CASES = [
    *[case for case in CASES if not NOT_IN_TRADES & case[0].keys() and "takes, 3" not in case[2]],
    (
        {"x": X[:, :2], "first_layer": "first"},
        ValueError,
        "x must have as many channels as first_layer takes, 3; got 2",
    ),
    ({"init": "zero"}, ValueError, "init must be 'normal' or a tensor like x; got 'zero' .*no gradient"),
    ({"init": torch.zeros_like(X)}, ValueError, "init must not be all zero"),
    ({"beta": -1.0}, ValueError, "beta must be a finite number >= 0; got -1.0"),
    ({"beta": "6"}, TypeError, "beta must be a number >= 0"),
    ({"bn_mode": "frozen"}, ValueError, "bn_mode must be one of 'eval', 'train'; got 'frozen'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), TRADES_CASES)
def test_trades_yopo_step_refuses(changes: dict, error: type[Exception], message: str) -> None:
    refuse(trades_yopo_step, changes, error, message, used_before=False)


def test_validation_can_be_switched() -> None:
    model = model_under_test()
    yopo_step(model, with_pixel(1.5), Y, outer_steps=1, validate=False)
    with pytest.raises(ValueError, match="x must lie in bounds"):
        yopo_step(model, with_pixel(1.5), Y, outer_steps=1, validate=True)
    yopo_step(model, with_pixel(1 + 5e-7), Y, outer_steps=1, validate=True)


def test_other_losses_take_other_labels() -> None:
    yopo_step(model_under_test(), X, None, loss_fn=lambda out, y: out.square().mean(), outer_steps=1)
    yopo_step(
        model_under_test(), X, torch.tensor([0, 1, -7, 4]), loss_fn=nn.CrossEntropyLoss(ignore_index=-7), outer_steps=1
    )


def test_empty_batch() -> None:
    model = model_under_test().eval()
    result = yopo_step(
        model, X[:0], Y[:0], outer_steps=2, loss_fn=lambda out, y: F.cross_entropy(out, y, reduction="sum")
    )
    assert result.perturbation.shape == (0, 3, 8, 7)
    assert result.losses.tolist() == [0, 0]


def test_batch_norm_needs_more_than_one_value() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, (8, 7)), nn.BatchNorm2d(6)), nn.Flatten())
    with pytest.raises(ValueError, match="x must give BatchNorm more than one value per channel"):
        yopo_step(model, X[:1], Y[:1], first_layer="0", outer_steps=1)
    assert torch.equal(model[0][1].running_var, torch.ones(6))
