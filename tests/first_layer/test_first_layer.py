"""Finding, recognising and refusing first layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from step_oracle import batch, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yopo_ext import yopo_step
from yopo_ext.first_layer import inspect
from yopo_ext.first_layer.describe import AutogradLayer, FusedLayer, describe, resolve
from yopo_ext.first_layer.normalisation import fitted
from yopo_ext.first_layer.watch import FirstLayer
from yopo_ext.training.torchvision_import import import_torchvision

U = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, **options):
    x, y, _ = batch(torch.float32)
    return yopo_step(model, x, y, **{"outer_steps": 2, "eps": 0.1, "step_size": 0.05} | options)


def layer_used(model: nn.Module) -> nn.Module:
    (module,) = verdict(model).modules
    return module()


def verdict(model: nn.Module) -> FirstLayer:
    """The one verdict that is kept of a model."""
    ((_, found),) = inspect._known[model].verdicts.values()
    return found


# --- detection ---


def zoo() -> dict[str, tuple]:
    torchvision = import_torchvision(required=False)
    timm = pytest.importorskip("timm") if torchvision is not None else None
    models = {}
    if torchvision is not None:
        for name in ("resnet18", "resnet50"):
            models[f"torchvision {name}"] = (getattr(torchvision.models, name), "conv1")
    if timm is not None:
        for name, layer in (
            ("resnet18", "conv1"), ("resnet50", "conv1"), ("vit_tiny_patch16_224", "patch_embed.proj"),
            ("convnext_atto", "stem.0"),
        ):  # fmt: skip
            options = {"img_size": 32} if name.startswith("vit") else {}
            models[f"timm {name}"] = (
                lambda num_classes, n=name, o=options: timm.create_model(n, num_classes=num_classes, **o),
                layer,
            )
    return models


@pytest.mark.parametrize(
    "name",
    ["torchvision resnet18", "torchvision resnet50"]
    + [f"timm {n}" for n in ("resnet18", "resnet50", "vit_tiny_patch16_224", "convnext_atto")],
)
def test_finds_the_first_layer_of_known_models_and_raises_their_loss(name: str) -> None:
    models = zoo()
    if name not in models:
        pytest.skip("torchvision or timm is not installed")
    make, layer = models[name]
    torch.manual_seed(0)
    model = make(num_classes=10).eval()
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([1, 7])
    result = yopo_step(model, x, y, outer_steps=3, eps=8 / 255, step_size=4 / 255, init="zero", train_on="last")
    assert layer_used(model) is model.get_submodule(layer)
    assert result.losses[2] > result.losses[0] + 1e-4
    assert model.get_submodule(layer).weight.grad.abs().max() > 0


def test_finds_the_layer_that_runs_first_not_the_one_defined_first() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.side, self.stem = nn.Linear(6, 5), nn.Linear(4, 6), nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.side(torch.ones(len(x), 4))  # runs first, but not on the input
            return self.head((self.stem(x).mean((2, 3)) + bias).relu())

    model = Backwards()
    step(model)
    assert layer_used(model) is model.stem


def test_finds_a_linear_layer_on_flattened_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 7, 6), nn.ReLU(), nn.Linear(6, 5))
    with pytest.warns(UserWarning, match="it is a Linear layer"):
        step(model)
    assert layer_used(model) is model[1]


def test_finds_a_layer_behind_normalisation() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x[:, :1] * 2, (x[:, 1:2] - 0.5) / 0.25, x[:, 2:] + 1], 1)
            return self.net(x)

    model = Scaled()
    step(model)
    assert layer_used(model) is model.net.first
    known = verdict(model)
    assert known.inner.mean == pytest.approx((0, 0.5, -1), abs=1e-5)
    assert known.inner.std == pytest.approx((0.5, 0.25, 1), abs=1e-5)
    step(model)


@pytest.mark.parametrize("change", ["blur", "batch_norm", "clamp"])
def test_refuses_a_layer_behind_anything_else(change: str) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            if change == "blur":
                return self.net(F.avg_pool2d(x, 3, 1, 1))
            return self.net(self.norm(x) if change == "batch_norm" else x.clamp(0.2, 0.8))

    model = Changed()
    buffers = [b.clone() for b in model.buffers()]
    with pytest.raises(ValueError, match=r"first_layer.*model's input"):
        step(model)
    with pytest.raises(ValueError, match="first_layer must take the model's input"):
        step(model, first_layer="net.first")
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_constants_that_change_between_steps_are_found_anew(compiled: bool) -> None:
    class Drifting(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.net, self.shift = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32).eval(), shift

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + self.shift)

    model, fresh = Drifting(0.0), Drifting(0.25)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    step(called)
    model.shift = 0.25
    model.zero_grad()
    results = [step(m, init="zero").perturbation for m in (called, fresh)]
    torch.testing.assert_close(*results, rtol=0.0, atol=1e-6)
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_notices_in_a_pass_that_the_input_no_longer_arrives() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.box = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32), {"shift": [0.0]}

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + self.box["shift"][0])

    model = Drifting()
    step(model)
    model.box["shift"][0] = 0.25  # which the fingerprint does not see
    with pytest.raises(ValueError, match="first_layer must take the model's input"):
        step(model)


def test_a_replaced_first_layer_is_found_anew() -> None:
    model = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32)
    step(model)
    model.first = nn.Conv2d(3, 6, 3)
    step(model)
    assert layer_used(model) is model.first
    assert model.first.weight.grad is not None


def _new_convolution(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.first[0] = nn.Conv2d(3, 6, 3)


def _new_activation(model: nn.Module) -> None:
    model.first[2] = nn.SiLU()


def _other_statistics(model: nn.Module) -> None:
    model.first[1] = nn.GroupNorm(2, 6)


def _appended(model: nn.Module) -> None:
    model.first.append(nn.Tanh())


def _padding_mode(model: nn.Module) -> None:
    model.first[0].padding_mode = "reflect"


def _slope(model: nn.Module) -> None:
    model.first[2].negative_slope = 0.7


def _hook(model: nn.Module) -> None:
    model.first[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def _forward(model: nn.Module) -> None:
    forward = model.first[0].forward
    model.first[0].forward = lambda u: forward(u) - 1


def _pruned(model: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(model.first[0], "weight", amount=0.5)


def _normalised_before(model: nn.Module) -> None:
    model.first = nn.Sequential(Standardise(), *model.first)


def _longer(model: nn.Module) -> None:
    model.first = nn.Sequential(model.first, nn.Sigmoid())


class Standardise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3])[:, None, None])
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.2])[:, None, None])

    def forward(self, u: Tensor) -> Tensor:
        return (u - self.mean) / self.std


@pytest.mark.parametrize("name", ["first", None])
@pytest.mark.parametrize(
    "change",
    [
        _new_convolution, _new_activation, _other_statistics, _appended, _padding_mode, _slope, _hook, _forward, _pruned,
        _normalised_before, _longer,
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the first layer runs through autograd")
def test_a_layer_that_was_changed_after_a_step_is_described_anew(change, name) -> None:
    """The first step must leave nothing behind that a model without it would not have."""
    results = []
    for stepped in (False, True):
        make = lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2))  # noqa: E731
        model = network(make, dtype=torch.float32).eval()
        if stepped:
            step(model, first_layer=name)
            model.zero_grad()
        change(model)
        torch.manual_seed(2)
        result = step(model, first_layer=name)
        results.append((result.loss, result.perturbation, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore:the first layer runs through autograd")
def test_new_statistics_of_a_normalisation_in_the_layer_are_noticed() -> None:
    model = network(lambda: nn.Sequential(Standardise(), nn.Conv2d(3, 6, 3), nn.ReLU()), dtype=torch.float32)
    step(model, first_layer="first")
    model.first[0].mean.fill_(0.1)
    other = copy.deepcopy(model)
    torch.testing.assert_close(
        *(step(m, first_layer="first", init="zero").perturbation for m in (model, other)), rtol=0.0, atol=0.0
    )


def test_trained_arguments_of_the_layer_are_refused() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shift = Shifted(), nn.Parameter(torch.zeros(6, 1, 1))
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 6 * 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x, self.shift))

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.conv(x) + shift

    with pytest.raises(ValueError, match="first_layer must depend on no trained tensors but its own parameters"):
        step(Embedded(), first_layer="first")


def test_the_cache_keeps_no_model_alive() -> None:
    import gc
    import weakref

    model = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32)
    step(model)
    whole = nn.Sequential(nn.Conv2d(3, 5, (8, 7)), nn.Flatten())
    with pytest.warns(UserWarning, match="goes on with a Flatten"):
        step(whole, first_layer=whole)
    references = [weakref.ref(model), weakref.ref(whole)]
    del model, whole
    gc.collect()
    assert all(reference() is None for reference in references)


def test_models_with_a_known_first_layer_are_copied_and_saved_as_before(tmp_path) -> None:
    model = network(lambda: nn.Conv2d(3, 6, 3), dtype=torch.float32)
    step(model)
    torch.save(model, tmp_path / "model.pt")
    step(copy.deepcopy(model))
    step(torch.load(tmp_path / "model.pt", weights_only=False))


# --- description ---


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(3, 6, 3, **options)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Normalise(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.mean, self.std, self.wrong = [0.5, 0.5, 0.5], (0.25, 0.25, 0.25), wrong

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25 + self.wrong


def hooked() -> nn.Sequential:
    layer = nn.Sequential(conv(), nn.ReLU())
    layer[0].register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (conv, None),
        (lambda: conv(padding="same", dilation=2), None),
        (lambda: conv(padding="valid"), None),
        (lambda: nn.utils.parametrizations.spectral_norm(conv()), None),
        (lambda: nn.utils.parametrizations.weight_norm(conv()), None),
        (lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), None),
        (lambda: nn.Sequential(nn.Sequential(Normalise(), nn.Identity()), nn.Sequential(conv(), nn.GELU())), None),
        (lambda: nn.Sequential(Normalise(wrong=True), conv()), "starts with a Normalise"),
        (lambda: conv(padding_mode="circular"), "padding_mode is 'circular'"),
        (lambda: nn.Conv2d(3, 6, 2, padding="same"), "not symmetric"),
        (lambda: Scaled(3, 6, 3), "it is a Scaled"),
        (lambda: nn.Sequential(conv(), nn.Softplus()), "goes on with a Softplus"),
        (lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(6)), "goes on with a BatchNorm2d"),
        (lambda: nn.Sequential(conv(), nn.SyncBatchNorm(6)), "goes on with a SyncBatchNorm"),
        (lambda: nn.Sequential(nn.ReLU(), conv()), "starts with a ReLU"),
        (lambda: nn.Sequential(Scaled(3, 6, 3)), "does not start with a plain Conv2d"),
        (hooked, "hooks"),
        (lambda: nn.Linear(8, 3), "it is a Linear"),
        (nn.Sequential, "does not start"),
    ],
)
def test_description(make, reason: str | None) -> None:
    plan = describe([make()], U)
    if reason is None:
        assert isinstance(plan, FusedLayer)
    else:
        assert isinstance(plan, AutogradLayer)
        assert reason in plan.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.spectral_norm(conv()),
        lambda: nn.utils.weight_norm(conv()),
        lambda: Scaled(3, 6, 3),
        lambda: nn.Sequential(conv(), nn.InstanceNorm2d(6)),
    ],
)
def test_unusual_layers_get_the_gradients_of_autograd(make) -> None:
    """At n = 1 and gradient="full" every parameter gets what a plain backward gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = network(make)
        x, y, eta = batch()
        other = copy.deepcopy(model) if not hasattr(model.first, "weight_g") else network(make)
        yopo_step(
            model, x, y, first_layer="first", outer_steps=1, gradient="full", init=eta, bounds=None, validate=False
        )
    F.cross_entropy(other(x + eta), y).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_hooks_on_the_first_layer_still_fire() -> None:
    model, seen = network(conv), []
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    x, y, _ = batch()
    yopo_step(model, x, y, outer_steps=2)
    assert seen == [(2, 6, 6, 5)] + [(6, 6, 6, 5)] * 2  # the inspection, and two passes


@pytest.mark.filterwarnings("ignore:the first layer runs through autograd")
@pytest.mark.parametrize("affine", [False, True])
def test_opaque_layers_may_overwrite_input_and_output(affine: bool) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, u: Tensor) -> Tensor:
            return self.conv(u.mul_(2.0)).relu_()

    class Reflect(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.first, self.head = layer, nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x.clone()))

    x, y, eta = batch(torch.float32)
    model = Reflect(conv(padding_mode="reflect", padding=1) if affine else InPlace())
    model(x)
    other = copy.deepcopy(model)
    options = {"outer_steps": 1, "gradient": "full", "init": eta, "bounds": None, "validate": False}
    yopo_step(model, x, y, first_layer="first", **options)
    if affine:
        F.cross_entropy(other(x + eta), y).backward()
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    result = step(model, first_layer="first")
    assert result.losses[1] > result.losses[0]


@pytest.mark.filterwarnings("ignore:the first layer runs through autograd")
def test_layers_called_with_keywords() -> None:
    class Powered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, u: Tensor, power: float, negate: bool = False) -> Tensor:
            return self.conv(input=u).tanh() ** power * (-1 if negate else 1)

    model = Wired(lambda model, x: model.net.rest(model.net.first(x, 2.0, negate=True)))
    model.net.first = Powered()
    other = copy.deepcopy(model)
    x, y, eta = batch(torch.float32)
    options = {"outer_steps": 1, "gradient": "full", "init": eta, "bounds": None, "validate": False}
    yopo_step(model, x, y, first_layer="net.first", **options)
    F.cross_entropy(other(x + eta), y).backward()
    for mine, theirs in zip(model.net.parameters(), other.net.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_opaque_layers_are_announced_once() -> None:
    model = network(lambda: Scaled(3, 6, 3), dtype=torch.float32)
    with pytest.warns(UserWarning, match="at eager speed: it is a Scaled"):
        step(model, first_layer="first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, first_layer="first")


# --- one way through the model ---


class Wired(nn.Module):
    """A network whose forward is the test's."""

    def __init__(self, wire, training: bool = True) -> None:
        super().__init__()
        self.net = network(conv, dtype=torch.float32)
        self.extra = nn.Conv2d(3, 6, 3)
        self.wire = wire
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        return self.wire(self, x)


def skip_connection(model: Wired, x: Tensor) -> Tensor:
    return model.net(x) + x.mean((1, 2, 3))[:, None]


def second_stem(model: Wired, x: Tensor) -> Tensor:
    return model.net.rest(model.net.first(x) + model.extra(x))


def used_twice(model: Wired, x: Tensor) -> Tensor:
    return model.net(x) + model.net.first(x).mean((1, 2, 3))[:, None]


def output_unused(model: Wired, x: Tensor) -> Tensor:
    model.net.first(x)
    return model.net.rest(model.extra(torch.ones_like(x)))


def never_run(model: Wired, x: Tensor) -> Tensor:
    return model.net.rest(model.extra(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (skip_connection, "only way from the input"),
        (second_stem, "only way from the input"),
        (used_twice, "ran 2 times"),
        (output_unused, "must lead to the loss"),
        (never_run, "'net.first' did not run"),
    ],
)
def test_refuses_other_paths_before_anything_changes(wire, message: str, training: bool) -> None:
    model = Wired(wire, training)
    buffers = [b.clone() for b in model.buffers()]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"first_layer .*{message}"):
            step(model, first_layer="net.first")
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_a_path_that_only_training_uses_is_refused_when_training_starts() -> None:
    def wire(model: Wired, x: Tensor) -> Tensor:
        return skip_connection(model, x) if model.training else model.net(x)

    model = Wired(wire, training=False)
    step(model, first_layer="net.first")
    model.train()
    with pytest.raises(ValueError, match="only way from the input"):
        step(model, first_layer="net.first")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["first", "all"])
def test_checkpointing_is_not_a_second_use(part: str, reentrant: bool) -> None:
    def wire(model: Wired, x: Tensor) -> Tensor:
        if part == "all":
            return checkpoint(model.net, x, use_reentrant=reentrant)
        return model.net.rest(checkpoint(model.net.first, x, use_reentrant=reentrant))

    def stem() -> nn.Module:
        return nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())

    plain, checkpointed = Wired(lambda model, x: model.net(x)), Wired(wire)
    plain.net, checkpointed.net = (network(stem, dtype=torch.float32) for _ in range(2))
    x, y, eta = batch(torch.float32)
    for _ in range(2):
        for train_on in ("all", "last"):
            expected, result = (
                yopo_step(model, x, y, first_layer="net.first", init=eta, outer_steps=2, train_on=train_on)
                for model in (plain, checkpointed)
            )
            torch.testing.assert_close(result.perturbation, expected.perturbation, rtol=0, atol=0)
    for mine, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(checkpointed.net.first.buffers(), plain.net.first.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_another_path_inside_a_reentrant_checkpoint_is_an_error() -> None:
    model = Wired(lambda model, x: checkpoint(skip_connection, model, x, use_reentrant=True))
    with pytest.raises(RuntimeError, match="another path inside a reentrant checkpoint"):
        step(model, first_layer="net.first")


def test_resolving_names() -> None:
    model = network(conv)
    assert resolve(model, "first", [model]) == [model.first]
    assert resolve(model, model.rest, [model]) == [model.rest]
    with pytest.raises(
        ValueError, match=r"first_layer must name a submodule of model; got 'stem', the model has first"
    ):
        resolve(model, "stem", [model])
    with pytest.raises(ValueError, match="first_layer must be a submodule of model"):
        resolve(model, nn.Conv2d(3, 6, 3), [model])
    with pytest.raises(TypeError, match="first_layer must be a module"):
        resolve(model, 3, [model])


def test_a_constant_is_no_normalisation_of_the_input() -> None:
    given = torch.rand(2, 1, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in range(20):
        mean, leaf = 0.3 + 0.01 * i, given.clone().requires_grad_()
        assert fitted((leaf.clamp(2, 3) - mean) / 0.21, given, leaf) is None
        assert fitted((leaf.clamp(0, 1) - mean) / 0.21, given, leaf) is not None
