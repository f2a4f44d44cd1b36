"""`yopo_step` against its definition in plain autograd, and its options."""

from __future__ import annotations

import copy
import gc
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from policy import assert_as_exact_as_plain
from step_oracle import Network, batch, gradients_along, network, oracle_step
from torch import Tensor, nn

from yopo_ext import yopo_step

EPS, SIGMA = 0.1, 0.03


class TwoConvs(nn.Module):
    """A first layer that only autograd knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(4)

    def forward(self, u: Tensor) -> Tensor:
        return self.b(torch.tanh(self.bn(self.a(u))))


STEMS = {
    "conv": lambda: nn.Conv2d(3, 6, 3, padding=1, bias=False),
    "conv_bias_strided": lambda: nn.Conv2d(3, 6, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    "conv_grouped": lambda: nn.Conv2d(3, 6, 3, padding="same", groups=3),
    "conv_relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True)),
    "conv_gelu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(approximate="tanh")),
    "conv_bn": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
    "conv_bn_silu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.SiLU()),
    "conv_bn_plain_relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
    "conv_bn_untracked": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
    "conv_bn_cumulative": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.LeakyReLU(0.2)
    ),
    "conv_reflect": lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
    "conv_weight_normed": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),
    "module": TwoConvs,
    "conv_twice": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Tanh()),
}
OPAQUE = {"conv_reflect", "module", "conv_twice"}


def compare(model: Network, gradient: str, *, m: int = 2, n: int = 3, tolerance: float = 1e-9, **options) -> None:
    x, y, eta = batch()
    other = copy.deepcopy(model)
    scale = 1.0 if gradient == "released" else 1.0 / m
    norm = options.get("norm", "linf")
    expected, losses = oracle_step(
        other, x, y, eta, m=m, n=n, eps=EPS, step_size=SIGMA, gradient=gradient, scale=scale, norm=norm
    )
    result = yopo_step(
        model, x, y, first_layer="first", outer_steps=m, inner_steps=n, eps=EPS, step_size=SIGMA, gradient=gradient,
        init=eta, **options,
    )  # fmt: skip
    torch.testing.assert_close(result.perturbation, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.losses, torch.stack(losses))
    torch.testing.assert_close(result.loss, losses[-1])
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=tolerance, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gradient", ["paper", "full", "released"])
@pytest.mark.parametrize("stem", STEMS)
def test_equals_the_definition(stem: str, gradient: str) -> None:
    model = network(STEMS[stem])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if stem in OPAQUE else "error")
        compare(model, gradient)


@pytest.mark.parametrize("stem", ["conv_bn_silu", "conv_bn_plain_relu", "module"])
def test_equals_the_definition_in_evaluation_mode(stem: str) -> None:
    model = network(STEMS[stem]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(model, "paper")


@pytest.mark.parametrize("gradient", ["paper", "full", "released"])
def test_linear_first_layer(gradient: str) -> None:
    model = network(lambda: nn.Linear(3 * 8 * 7, 6), flat=True)
    with pytest.warns(UserWarning, match="Linear"):
        compare(model, gradient)


@pytest.mark.parametrize("stem", ["conv", "conv_relu", "module"])
def test_l2(stem: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(network(STEMS[stem]), "paper", norm="l2")


def small() -> Network:
    return network(STEMS["conv_relu"])


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def step(model: nn.Module, **options):
    x, y, eta = batch()
    given = {"first_layer": "first", "outer_steps": 2, "eps": EPS, "step_size": SIGMA, "init": eta, "x": x, "y": y}
    given |= options
    return yopo_step(model, given.pop("x"), given.pop("y"), **given)


def test_gradients_are_accumulated_and_averaged() -> None:
    model = small()
    step(model)
    once = gradients(model)
    step(model)
    for mine, first in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(mine.grad, 2 * first)
    model.zero_grad()
    step(model, reduction="sum")
    for mine, first in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(mine.grad, 2 * first)  # m = 2


def test_train_on_last_gives_the_gradient_at_the_last_perturbation_only() -> None:
    x, y, _eta = batch()
    model, other = small(), small()
    last = step(model, outer_steps=3, train_on="last", gradient="full")
    before = step(other, outer_steps=2, gradient="full").perturbation
    other.zero_grad()
    F.cross_entropy(other(x + before), y).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    everywhere = small()
    torch.testing.assert_close(last.perturbation, step(everywhere, outer_steps=3).perturbation, rtol=0, atol=0)
    assert int(model.rest[0].num_batches_tracked) == 3


def test_train_on_last_computes_no_weight_gradient_before() -> None:
    model = small()
    seen: list[int] = []
    model.rest[2].weight.register_hook(lambda g: seen.append(1))
    step(model, outer_steps=4, train_on="last")
    assert len(seen) == 1
    assert all(p.requires_grad for p in model.parameters())


def test_after_pass_sees_complete_gradients_and_may_update() -> None:
    model, calls = small(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def after_pass(j: int) -> None:
        assert all(p.grad is not None for p in model.parameters())
        calls.append(j)
        optimizer.step()
        optimizer.zero_grad()

    weight = model.first[0].weight.detach().clone()
    result = step(model, outer_steps=3, after_pass=after_pass, reduction="sum")
    assert calls == [0, 1, 2]
    assert not torch.equal(weight, model.first[0].weight)
    assert all(p.grad is None for p in model.parameters())
    # The second pass already ran on updated weights.
    assert not torch.equal(result.losses, step(small(), outer_steps=3).losses)


def test_the_pass_after_an_update_runs_on_the_new_weights_under_autocast() -> None:
    losses = []
    x, _, eta = batch(torch.float32)
    for cache in (True, False):
        model = network(STEMS["conv_relu"], dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def after_pass(j: int, model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            losses.append(step(model, x=x, init=eta, outer_steps=4, after_pass=after_pass).losses)
            losses.append(step(model, x=x, init=eta, outer_steps=1).losses)
            optimizer.step()  # between two steps in one block
            losses.append(step(model, x=x, init=eta, outer_steps=1).losses)
    for cached, fresh in zip(losses[:3], losses[3:], strict=True):
        assert torch.equal(cached, fresh)


def test_gradients_are_not_divided_when_every_pass_is_an_update() -> None:
    seen: list[list[torch.Tensor]] = []
    for reduction in (None, "sum", "mean"):
        model, first = small(), []

        def after_pass(j: int, model: torch.nn.Module = model, first: list[torch.Tensor] = first) -> None:
            if j == 0:
                first.extend(p.grad.clone() for p in model.parameters())

        step(model, outer_steps=3, after_pass=after_pass, reduction=reduction)
        seen.append(first)
    for default, whole, mean in zip(*seen, strict=True):
        assert torch.equal(default, whole)
        torch.testing.assert_close(default, 3 * mean)


def test_after_pass_is_not_called_for_passes_that_do_not_train() -> None:
    calls: list[int] = []
    step(small(), outer_steps=3, after_pass=calls.append, train_on="last")
    assert calls == [2]


def test_backward_is_the_callers() -> None:
    model, other = small(), small()
    scaled = step(model, backward=lambda loss: (1024 * loss).backward())
    plain = step(other)
    assert torch.equal(scaled.perturbation, plain.perturbation)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, 1024 * theirs.grad)


def test_result_is_detached_and_describes_the_last_pass() -> None:
    model = small().eval()
    x, y, _ = batch()
    first = step(model, outer_steps=2)
    result = step(model, outer_steps=3)
    assert not any(t.requires_grad for t in (result.loss, result.losses, result.logits, result.perturbation))
    assert result.losses.shape == (3,)
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model(x + first.perturbation))
        torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, y))
    torch.testing.assert_close(result.losses[:2], first.losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("init", ["uniform", "zero"])
def test_ball_holds_exactly_and_bounds_to_rounding(init: str, dtype: torch.dtype) -> None:
    model = network(STEMS["conv"], dtype=dtype)
    x, y, _ = batch(dtype)
    result = step(model, x=x, y=y, init=init, outer_steps=4, eps=8 / 255, step_size=2 / 255)
    assert result.perturbation.abs().max() <= torch.tensor(8 / 255, dtype=dtype)
    assert (x + result.perturbation).min() >= -1e-7
    assert (x + result.perturbation).max() <= 1 + 1e-7
    assert result.perturbation.abs().max() > 0
    assert result.losses[-1] > result.losses[0]


def test_uniform_start_is_projected_and_follows_the_generator() -> None:
    x, _, _ = batch()
    starts = []
    for seed in (1, 1, 2):
        model = small()
        step(model, outer_steps=1)  # inspects the model
        model.first.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[0].detach() - x))
        step(model, outer_steps=1, init="uniform", generator=torch.Generator().manual_seed(seed))
        del starts[-2]  # of the inspection after the hook was put there
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert starts[0].abs().max() <= EPS + 1e-12
    assert (x + starts[0]).min() >= -1e-12
    assert (x + starts[0]).max() <= 1 + 1e-12
    assert 0.3 * EPS < starts[0].abs().mean() < 0.55 * EPS


def test_perturbation_can_be_carried_on() -> None:
    together = step(small().eval(), outer_steps=4)
    model = small().eval()
    carried = step(model, init=step(model, outer_steps=1).perturbation, outer_steps=3)
    assert torch.equal(together.perturbation, carried.perturbation)


def test_normalisation_by_the_step_equals_normalisation_in_the_first_layer() -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]

    class Normalise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64)[:, None, None])
            self.register_buffer("std", torch.tensor(std, dtype=torch.float64)[:, None, None])

        def forward(self, u: Tensor) -> Tensor:
            return (u - self.mean) / self.std

    outside = small()
    inside = copy.deepcopy(outside)
    inside.first = nn.Sequential(Normalise(), *inside.first)
    found = nn.Sequential(Normalise(), copy.deepcopy(outside))
    results = [
        step(outside, mean=mean, std=torch.tensor(std, dtype=torch.float64)),
        step(inside),
        step(found, first_layer="1.first"),
    ]
    for result in results[1:]:
        torch.testing.assert_close(result.perturbation, results[0].perturbation, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.losses, results[0].losses)
    for other in (inside, found):
        for mine, theirs in zip(outside.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-12)


def test_per_channel_constants_in_normalised_units() -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]).double(), torch.tensor([0.2, 0.25, 0.3]).double()
    x, _, eta = batch()
    plain, scaled = small(), small()
    pixel = step(plain, mean=mean, std=std)
    constants = {
        "x": (x - mean[:, None, None]) / std[:, None, None], "init": eta / std[:, None, None], "eps": EPS / std,
        "step_size": SIGMA / std, "bounds": (-mean / std, (1 - mean) / std),
    }  # fmt: skip
    result = step(scaled, **constants)
    torch.testing.assert_close(result.perturbation * std[:, None, None], pixel.perturbation, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.losses, pixel.losses)


def test_unbounded() -> None:
    x, _, _ = batch()
    result = step(small(), x=3 * x - 1, bounds=None, validate=True)
    assert result.perturbation.abs().max() == EPS


@pytest.mark.parametrize("which", ["first", "rest", "all"])
def test_frozen_parameters_get_no_gradient(which: str) -> None:
    model, free = small(), small()
    modules = {"first": [model.first], "rest": [model.rest], "all": [model]}[which]
    for module in modules:
        module.requires_grad_(False)
    result, expected = step(model, gradient="released"), step(free, gradient="released")
    assert torch.equal(result.perturbation, expected.perturbation)
    for mine, theirs in zip(model.parameters(), free.parameters(), strict=True):
        assert (mine.grad is None) == (not mine.requires_grad)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_works_under_no_grad_and_leaves_x_alone() -> None:
    x, y, _ = batch()
    kept = x.clone()
    x.requires_grad_()
    with torch.no_grad():
        step(small(), x=x, y=y)
    assert x.grad is None
    assert torch.equal(x, kept)


def test_model_is_as_before_in_every_respect() -> None:
    model = small()
    model.rest[0].eval()
    model.rest[2].bias.requires_grad_(False)
    before = [dict(vars(module)) for module in model.modules()]
    keys = list(model.state_dict())
    for train_on in ("all", "last"):
        step(model, train_on=train_on)
    assert list(model.state_dict()) == keys
    for module, old in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == old.keys()
        assert module.training == old["training"]
        assert module._forward_hooks == old["_forward_hooks"]
        assert module._forward_pre_hooks == old["_forward_pre_hooks"]
    assert not model.rest[2].bias.requires_grad


@pytest.mark.parametrize("moment", ["first", "later", "backward"])
def test_model_is_restored_when_it_raises(moment: str) -> None:
    model = small()
    if moment == "later":
        step(model)
        model.zero_grad()
    keys = [set(vars(module)) for module in model.modules()]
    flags = [(m.training) for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = model.rest[3].register_forward_hook(fail) if moment != "backward" else None
    with pytest.raises(RuntimeError, match="on purpose"):
        step(model, train_on="last", backward=fail if moment == "backward" else None)
    if handle is not None:
        handle.remove()
    assert [set(vars(module)) for module in model.modules()] == keys
    assert [m.training for m in model.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    if moment == "first":
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    step(model)


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    step(model, validate=False)

    tolist = Tensor.tolist

    def refuse(self, *_):
        if self.shape == (4, 1):  # the numbers of the threat model, which are on the host
            return tolist(self)
        raise AssertionError("a value was read back")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    step(model, validate=False, init="uniform")


class Poison(nn.Module):
    """Makes the loss NaN in the passes whose numbers are given."""

    def __init__(self, inner: nn.Module, passes: set[int]) -> None:
        super().__init__()
        self.inner, self.passes, self.count = inner, passes, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        self.count += 1
        return out * math.nan if self.count - 1 in self.passes else out


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("mode", ["ignore", "skip", "raise"])
def test_nonfinite_loss(mode: str, old: bool) -> None:
    model = Poison(small(), {1})
    if old:
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
    buffers = [b.clone() for b in model.buffers()]
    if mode == "raise":
        with pytest.raises(FloatingPointError, match="nan"):
            step(model, first_layer="inner.first", on_nonfinite=mode)
    else:
        result = step(model, first_layer="inner.first", on_nonfinite=mode)
        assert torch.isfinite(result.losses).tolist() == [True, False]
    if mode == "ignore":
        assert any(p.grad is not None and p.grad.isnan().any() for p in model.parameters())
        return
    for p in model.parameters():
        assert (p.grad is not None) == old
        assert p.grad is None or bool((p.grad == 0.5).all())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_skip_keeps_what_earlier_passes_already_handed_over() -> None:
    model, calls = Poison(small(), {1}), []

    def after_pass(j: int) -> None:
        calls.append(j)
        model.zero_grad()

    result = step(model, first_layer="inner.first", outer_steps=3, on_nonfinite="skip", after_pass=after_pass)
    assert calls == [0]
    assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(result.losses).tolist() == [True, False, False]
    assert int(model.inner.rest[0].num_batches_tracked) == 1


@pytest.mark.parametrize("stem", ["conv_bn_silu", "module", "conv"])
def test_batch_norm_moves_once_per_pass(stem: str) -> None:
    model = network(STEMS[stem])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, outer_steps=4)
    counts = [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {4}


def test_channels_last_and_strided_inputs() -> None:
    x, _y, _eta = batch()
    expected = step(small())
    for given in (
        x.to(memory_format=torch.channels_last),
        torch.cat([x, x], 3)[..., : x.shape[3]],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        result = step(small(), x=given)
        torch.testing.assert_close(result.perturbation, expected.perturbation, rtol=0, atol=0)
        torch.testing.assert_close(result.losses, expected.losses)


@pytest.mark.parametrize("stem", ["conv_relu", "conv_bn_silu", "conv_bn"])
def test_channels_last_model(stem: str) -> None:
    expected, model = (network(STEMS[stem]) for _ in range(2))
    model = model.to(memory_format=torch.channels_last)
    x, _, _ = batch()
    plain = step(expected)
    result = step(model, x=x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(result.perturbation, plain.perturbation, rtol=0, atol=0)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        assert mine.grad.stride() == mine.stride()


def test_other_losses_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    result = step(Two(), first_layer="net.first", loss_fn=lambda out, y: F.cross_entropy(out["logits"], y))
    torch.testing.assert_close(result.losses, step(small()).losses)
    assert not result.logits["logits"].requires_grad


def test_probabilities_as_labels() -> None:
    _, y, _ = batch()
    result = step(small(), y=F.one_hot(y, 5).double())
    torch.testing.assert_close(result.losses, step(small()).losses)


def test_dropout_in_an_opaque_first_layer_keeps_its_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop, self.masks = nn.Conv2d(3, 6, 3), nn.Dropout(0.5), []

        def forward(self, u: Tensor) -> Tensor:
            kept = self.drop(torch.ones(u.shape[0], 6, 1, 1, dtype=u.dtype))
            self.masks.append(kept)
            return torch.tanh(self.conv(u)) * kept

    model = network(Masked)
    with pytest.warns(UserWarning, match="Masked"):
        step(model, outer_steps=1, inner_steps=3)  # inspects the layer
    step(model, outer_steps=1, inner_steps=3)  # once more: its list has grown
    model.first.masks.clear()
    step(model, outer_steps=1, inner_steps=3)
    masks = model.first.masks
    assert len(masks) == 5  # the pass, three inner steps, the weight gradient
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    draw = torch.rand(1)
    torch.manual_seed(0)
    step(model, outer_steps=1)
    step(model, outer_steps=1)
    assert not torch.equal(model.first.masks[-1], model.first.masks[-6])
    assert draw.numel() == 1


def test_functional_noise_in_an_opaque_first_layer_is_repeated() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.noise = nn.Conv2d(3, 6, 3), []

        def forward(self, u: Tensor) -> Tensor:
            self.noise.append(torch.randn(u.shape[0], 6, 1, 1, dtype=u.dtype))
            return torch.tanh(self.conv(u) + self.noise[-1])

    model = network(Noisy)
    with pytest.warns(UserWarning, match="Noisy"):
        step(model, outer_steps=1, inner_steps=3)  # inspects the layer
    step(model, outer_steps=1, inner_steps=3)  # once more: its list has grown
    model.first.noise.clear()
    step(model, outer_steps=1, inner_steps=3)
    assert all(torch.equal(noise, model.first.noise[0]) for noise in model.first.noise)


def test_a_loss_with_weights_of_its_own_is_trained_by_the_passes_that_train() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits / self.temperature, y)[None]

    gradients = []
    for m in (1, 3):
        loss, model = Scaled(), small()
        hook = loss.temperature.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
        result = step(model, outer_steps=m, train_on="last", loss_fn=loss)
        hook.remove()
        assert result.losses.shape == (m,)
    assert len(gradients) == 2
    loss = Scaled()
    with torch.no_grad():
        loss.temperature.fill_(torch.nan)
    step(small(), loss_fn=loss, on_nonfinite="skip")
    assert loss.temperature.grad is None


def test_half_precision_model_keeps_a_full_precision_perturbation() -> None:
    model = network(STEMS["conv_bn_silu"], dtype=torch.float32)
    x, y, eta = batch(torch.float32)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.to(torch.bfloat16)

        def forward(self, u: Tensor) -> Tensor:
            return self.net(u.to(torch.bfloat16)).float()

    result = step(Cast(), x=x, y=y, init=eta, first_layer="net.first")
    assert result.perturbation.dtype == torch.float32
    assert result.perturbation.abs().max() <= torch.tensor(EPS)
    assert all(p.grad.dtype == torch.bfloat16 and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("stem", ["conv_relu", "conv_bn_silu", "module"])
def test_autocast(stem: str) -> None:
    plain = network(STEMS[stem], dtype=torch.float32)
    mixed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    again = copy.deepcopy(exact)
    x, y, eta = batch(torch.float32)
    options = {"m": 1, "n": 3, "eps": EPS, "step_size": SIGMA, "gradient": "paper"}
    oracle, losses = oracle_step(exact, x.double(), y, eta.double(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        perturbation, plain_losses = oracle_step(plain, x, y, eta, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = step(mixed, x=x, y=y, init=eta, outer_steps=1, inner_steps=3)
    assert result.logits.dtype == torch.bfloat16
    assert result.perturbation.dtype == torch.float32
    found = [("eta", result.perturbation, perturbation, oracle)]
    found += [("loss", result.losses, torch.stack(plain_losses), torch.stack(losses))]
    at_mine, at_theirs = (
        gradients_along(again, x.double(), y, [eta.double(), moved.double()])
        for moved in (result.perturbation, perturbation)
    )
    for (name, mine), theirs in zip(mixed.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        found.append((name, mine.grad, theirs.grad.double() - at_theirs[name] + at_mine[name], at_mine[name]))
    for name, mine, theirs, true in found:
        assert_as_exact_as_plain(name, mine, theirs, true, torch.bfloat16)


def test_backward_runs_outside_autocast() -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(180, 5)

        def forward(self, u: Tensor) -> Tensor:
            hidden = self.first(u).flatten(1)
            with torch.autocast("cpu", enabled=False):
                return self.last(hidden.float())

    x, y, _ = batch(torch.float32)
    model = Island()
    with torch.autocast("cpu", torch.bfloat16):
        yopo_step(model, x, y, outer_steps=1)
    gradient = model.last.weight.grad
    assert not torch.equal(gradient.bfloat16().float(), gradient)


@pytest.mark.parametrize("stem", ["conv", "conv_gelu"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_an_output_handed_from_pass_to_pass_is_that_of_a_fresh_pass(stem: str, train_on: str) -> None:
    """Also where the next layer overwrites it."""
    model = network(STEMS[stem]).eval()
    model.rest[0] = nn.Identity()  # a ReLU in place comes next
    other, (x, y, eta) = copy.deepcopy(model), batch()
    result = step(model, outer_steps=3, train_on=train_on, gradient="full", reduction="sum")
    for j in range(3):
        if train_on == "all" or j == 2:
            F.cross_entropy(other(x + eta), y).backward()
        alone = step(copy.deepcopy(other), init=eta, outer_steps=1)
        torch.testing.assert_close(result.losses[j], alone.loss)
        eta = alone.perturbation
    torch.testing.assert_close(result.perturbation, eta, rtol=0, atol=1e-12)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_weights_that_change_inside_backward_hold_for_the_next_pass() -> None:
    model = small()
    seen: list[Tensor] = []
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))

    def backward(loss: Tensor) -> None:
        loss.backward()
        with torch.no_grad():
            model.first[0].bias.add_(1.0)  # as a constraint on the weights might

    x, _, _ = batch()
    step(model, init="zero", outer_steps=2, backward=backward, eps=0.0)
    with torch.no_grad():
        model.first[0].bias.sub_(1.0)
        torch.testing.assert_close(seen[-1], model.first(x))


@pytest.mark.parametrize("stem", ["conv", "conv_relu", "conv_bn", "module"])
def test_nothing_of_a_step_outlives_it(stem: str) -> None:
    def live() -> int:
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    model = network(STEMS[stem])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model)
        step(model)  # sees gradients of a step before, which become objects of Python thereby
        gc.collect()
        gc.disable()
        try:
            before = live()
            for _ in range(3):
                step(model)
            assert live() == before
        finally:
            gc.enable()
