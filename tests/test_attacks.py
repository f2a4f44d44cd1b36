import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from yopo_ext.attacks import cross_entropy, margin, pgd
from yopo_ext.threat import ThreatModel


class Linear(nn.Module):
    """Logits [B, 2] = (0, <w, x>): label 0's loss rises along w, label 1's along -w."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        score = (x * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def small_net(seed=0, channels=3, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, classes)
    )


def data(seed=0, batch=5, channels=3, classes=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, channels, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (batch,), generator=generator)


def assert_admissible(x, eta, eps, norm, bounds=(0.0, 1.0)):
    if norm == "linf":
        assert (eta.abs() <= torch.tensor(eps, dtype=eta.dtype)).all()
    else:
        assert (eta.flatten(1).norm(dim=1) <= eps * (1 + 1e-5)).all()
    assert (x + eta >= bounds[0] - 1e-6).all()
    assert (x + eta <= bounds[1] + 1e-6).all()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    eps=st.floats(0, 0.99),
    step_size=st.floats(0, 0.99),
    steps=st.integers(0, 4),
    restarts=st.integers(1, 3),
    norm=st.sampled_from(["linf", "l2"]),
    loss=st.sampled_from(["ce", "margin"]),
    keep=st.sampled_from(["last", "best"]),
    bn_mode=st.sampled_from(["eval", "train"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    saturated=st.booleans(),
)
def test_result_is_admissible(seed, eps, step_size, steps, restarts, norm, loss, keep, bn_mode, dtype, saturated):
    x, y = data(seed, dtype=dtype)
    if saturated:
        x = x.round()
    model = small_net().to(dtype)
    found = pgd(
        model, x, y, eps=eps, step_size=step_size, steps=steps, restarts=restarts, norm=norm, loss=loss, keep=keep,
        bn_mode=bn_mode,
    )  # fmt: skip
    assert found.perturbation.shape == x.shape
    assert found.perturbation.dtype == dtype
    assert not found.perturbation.requires_grad
    assert_admissible(x, found.perturbation, eps, norm)
    if bn_mode == "eval" and found.loss is not None:
        model.eval()
        with torch.no_grad():
            logits = model(x + found.perturbation)
        assert torch.equal(found.misclassified, logits.argmax(1) != y)
        torch.testing.assert_close(found.loss, {"ce": cross_entropy, "margin": margin}[loss](logits, y))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), eps=st.floats(0.01, 0.9), label=st.integers(0, 1))
def test_linf_reaches_the_brute_force_optimum_of_a_linear_model(seed, eps, label):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 2, 3, generator=generator, dtype=torch.float64)
    model = Linear(torch.randn(1, 2, 3, generator=generator, dtype=torch.float64))
    y = torch.tensor([label])
    ball = ThreatModel(eps).around(x).interval
    corners = [
        torch.where(torch.tensor(bits).view(1, 1, 2, 3), ball.b, ball.a)
        for bits in itertools.product([False, True], repeat=6)
    ]
    best = max(cross_entropy(model(x + corner), y).item() for corner in corners)
    found = pgd(model, x, y, eps=eps, step_size=eps / 2, steps=6)
    assert cross_entropy(model(x + found.perturbation), y).item() == pytest.approx(best, rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), eps=st.floats(0.01, 3), scale=st.sampled_from([1e-18, 1.0, 1e18]))
def test_l2_reaches_the_optimum_of_a_linear_model(seed, eps, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 2, 3, generator=generator)
    weight = torch.randn(1, 2, 3, generator=generator)
    y = torch.zeros(3, dtype=torch.int64)
    found = pgd(
        Linear(weight * scale),
        x,
        y,
        eps=eps,
        step_size=eps,
        steps=60,
        norm="l2",
        bounds=None,
        loss="margin",
        init="zero",
    )
    torch.testing.assert_close(
        found.perturbation, (eps * weight / weight.norm()).expand(3, 1, 2, 3), rtol=1e-3, atol=1e-4 * eps
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_and_best_iterate_only_make_it_worse_for_the_model(norm):
    x, y = data(3, batch=64)
    model = small_net().eval()
    model(x)
    options = {"eps": 0.1, "step_size": 0.1, "steps": 3, "norm": norm}

    def run(**more):
        found = pgd(model, x, y, generator=torch.Generator().manual_seed(5), **options, **more)
        with torch.no_grad():
            logits = model(x + found.perturbation)
        return logits.argmax(1) != y, cross_entropy(logits, y)

    wrong, loss = run()
    best_wrong, best_loss = run(keep="best")
    more_wrong, more_loss = run(restarts=4)
    assert (best_wrong >= wrong).all()
    assert (more_wrong >= wrong).all()
    same = best_wrong == wrong
    assert (best_loss[same] >= loss[same] - 1e-5).all()
    same = more_wrong == wrong
    assert (more_loss[same] >= loss[same] - 1e-5).all()


def test_attack_changes_predictions_where_noise_does_not():
    x, y = data(1, batch=200)
    model = small_net().eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    noise = pgd(model, x, y, eps=0.1, step_size=0.0, steps=0).perturbation
    found = pgd(model, x, y, eps=0.1, step_size=0.025, steps=10, restarts=2)
    assert (model(x + noise).argmax(1) != y).float().mean() < 0.3
    assert found.misclassified.float().mean() > 0.9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_uniform_start_fills_the_ball(norm):
    x = torch.full((2000, 1, 1, 2), 0.5)
    eta = ThreatModel(0.2, norm=norm).around(x).uniform(torch.Generator().manual_seed(0))
    assert_admissible(x, eta, 0.2, norm)
    inner = (eta.abs().amax((1, 2, 3)) if norm == "linf" else eta.flatten(1).norm(dim=1)) < 0.1
    # In two dimensions half the radius holds a quarter of the volume, in either norm.
    assert inner.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert eta.mean((0, 1, 2)).abs().max() < 0.01


def test_init():
    x, y = data()
    model = small_net()
    given = torch.full_like(x, 0.01)
    options = {"eps": 0.1, "step_size": 0.1, "steps": 0}
    assert torch.equal(pgd(model, x, y, init=given, **options).perturbation, given)
    assert not pgd(model, x, y, init="zero", **options).perturbation.any()
    draws = [pgd(model, x, y, generator=torch.Generator().manual_seed(s), **options).perturbation for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nan_gradients_leave_the_perturbation_admissible(norm):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([(x.flatten(1).sum(1) - 1e9).sqrt(), x.flatten(1).sum(1)], 1)

    x, y = data(classes=2)
    found = pgd(Broken(), x, y, eps=0.1, step_size=0.05, steps=3, norm=norm, init="zero")
    assert not found.perturbation.any()
    assert_admissible(x, pgd(Broken(), x, y, eps=0.1, step_size=0.05, steps=3, norm=norm).perturbation, 0.1, norm)


def test_eps_per_channel():
    x, y = data()
    x = x * 0.5 + 0.25
    eps = [0.1, 0.0, 0.05]
    eta = pgd(small_net(), x, y, eps=eps, step_size=torch.tensor(eps), steps=3).perturbation
    assert (eta.abs().amax((0, 2, 3)) <= torch.tensor(eps)).all()
    assert eta[:, 0].abs().max() > 0.09
    assert eta[:, 2].abs().max() > 0.04


def test_normalisation_is_applied_in_the_model_and_eps_stays_in_pixels():
    class Normalised(nn.Module):
        def __init__(self, model, mean, std):
            super().__init__()
            self.model, self.mean, self.std = model, mean, std

        def forward(self, x):
            return self.model((x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1))

    x, y = data()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    model = small_net()
    options = {"eps": 0.1, "step_size": 0.03, "steps": 4}
    ours = pgd(model, x, y, mean=mean, std=std, generator=torch.Generator().manual_seed(0), **options)
    wrapped = pgd(Normalised(model, mean, std), x, y, generator=torch.Generator().manual_seed(0), **options)
    torch.testing.assert_close(ours.perturbation, wrapped.perturbation)


class CountConvolutions(TorchDispatchMode):
    """Forwards, input gradients and weight gradients of the convolution whose weight has this shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.counts = shape, [0, 0, 0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function._overloadpacket
        if packet is torch.ops.aten.convolution and args[1].shape == self.shape:
            self.counts[0] += 1
        if packet is torch.ops.aten.convolution_backward and args[2].shape == self.shape:
            self.counts[1] += args[-1][0]
            self.counts[2] += args[-1][1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "forwards", "input_grads"),
    [
        ({"steps": 5}, 5, 5),
        ({"steps": 0}, 0, 0),
        ({"steps": 5, "keep": "best"}, 6, 5),
        ({"steps": 5, "restarts": 2, "bn_mode": "train"}, 12, 10),
    ],
)
def test_cost_is_what_the_docstring_says(options, forwards, input_grads):
    x, y = data()
    model = small_net()
    model(x)
    with CountConvolutions(model[0].weight.shape) as counter:
        pgd(model, x, y, eps=0.1, step_size=0.03, **options)
    assert counter.counts == [forwards, input_grads, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    x, y = data()
    model = small_net()
    model(x)
    model[1].eval()
    model[0].bias.requires_grad_(False)
    if fails:
        model[5].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError))
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with torch.no_grad():  # the caller's grad mode must not matter
            pgd(model, x, y, eps=0.1, step_size=0.03, steps=2)
    except KeyError:
        assert fails
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())


def test_bn_mode():
    x, y = data(batch=16)
    model = small_net()
    model(x)
    before = model[1].num_batches_tracked.item()
    pgd(model, x, y, eps=0.1, step_size=0.03, steps=3, bn_mode="train")
    assert model[1].num_batches_tracked.item() == before + 3
    pgd(model, x, y, eps=0.1, step_size=0.03, steps=3, bn_mode="eval")
    assert model[1].num_batches_tracked.item() == before + 3


def test_callable_loss_with_any_targets():
    x, _ = data()
    model = small_net().eval()
    target = torch.rand(5, 4)
    found = pgd(
        model, x, target, eps=0.1, step_size=0.05, steps=5, keep="best",
        loss=lambda logits, t: -(logits - t).square().sum(1),
    )  # fmt: skip
    with torch.no_grad():
        assert (found.loss >= -(model(x) - target).square().sum(1) - 0.2).all()


def test_labels_beyond_the_classes_are_named():
    with pytest.raises(ValueError, match=r"y must hold labels in \[0, 3\]; got 9"):
        pgd(small_net(), X, torch.full_like(Y, 9), eps=0.1, step_size=0.05, steps=1)


def test_margin_is_positive_exactly_where_misclassified():
    logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(100) % 5
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


X, Y = data()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must be >= 0; got -0.1"),
        ({"eps": 8}, ValueError, "eps .* looks like 0..255 units: use 8/255"),
        ({"eps": math.nan}, ValueError, "eps must be finite"),
        ({"eps": [0.1, 0.2]}, ValueError, "eps must be a number or have one value per input channel"),
        ({"eps": "0.1"}, TypeError, "eps"),
        ({"step_size": -1}, ValueError, "step_size must be >= 0"),
        ({"steps": -1}, ValueError, "steps must be an integer >= 0; got -1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"restarts": 0}, ValueError, "restarts must be an integer >= 1"),
        ({"restarts": 2, "init": "zero"}, ValueError, "restarts must be 1 unless init='uniform'"),
        ({"norm": "l1"}, ValueError, "norm must be one of 'linf', 'l2'; got 'l1'"),
        ({"norm": "l2", "eps": [0.1, 0.1, 0.1]}, ValueError, "eps must be a single number"),
        ({"loss": "mse"}, ValueError, "loss must be one of 'ce', 'margin'; got 'mse'"),
        ({"init": "random"}, ValueError, "init must be 'uniform', 'zero' or a tensor like x; got 'random'"),
        ({"init": torch.zeros(1)}, ValueError, "init must have shape"),
        ({"bn_mode": "off"}, ValueError, "bn_mode must be one of 'eval', 'train'"),
        ({"keep": "first"}, ValueError, "keep must be one of 'last', 'best'"),
        ({"bounds": (1, 0)}, ValueError, "bounds must be"),
        ({"mean": 0.5}, ValueError, "mean and std must be given together"),
        ({"mean": 0.5, "std": 0.0}, ValueError, "std must be > 0"),
        ({"x": X.mul(255).byte()}, TypeError, "x must be one of float32, float64; got uint8"),
        ({"x": X * 255}, ValueError, "x must lie in bounds"),
        ({"x": torch.full_like(X, math.nan)}, ValueError, "x must be finite"),
        ({"x": X[0]}, ValueError, "x must have shape"),
        ({"y": Y[:3]}, ValueError, "y must have shape"),
        ({"y": Y.float()}, TypeError, "y must be int64"),
        ({"y": Y - 10}, ValueError, "y must hold labels >= 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    calls = []
    model = small_net()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    arguments = {"x": X, "y": Y, "eps": 0.1, "step_size": 0.05, "steps": 2} | change
    with pytest.raises(error, match=message):
        pgd(model, **arguments)
    assert not calls
