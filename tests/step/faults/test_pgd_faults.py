"""`attacks.pgd` in situations that published code brings: equal to plain autograd in fp64, or an error by name."""

from __future__ import annotations

import copy
import re
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import yopo_ext
from yopo_ext.attacks import pgd

EPS, SIGMA, STEPS, CLASSES = 0.1, 0.03, 4, 4
SIZES = {"linf": {"eps": EPS, "step_size": SIGMA}, "l2": {"eps": 0.8, "step_size": 0.3}}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(180, CLASSES)
    ).to(dtype)  # fmt: skip


def segmenter() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, CLASSES, 1)).double()


def images(batch: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, 3, 8, 7, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, CLASSES, (batch,), generator=generator)


def start(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    eta = (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1).to(x.dtype) * EPS
    return torch.clamp(x + eta, 0, 1) - x


def plain(
    call: Callable[[Tensor], Tensor], x: Tensor, y: Any, loss: Callable[..., Tensor], eta: Tensor, *, norm: str = "linf",
    steps: int = STEPS,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Every iterate of PGD with its loss per sample, by autograd."""
    eps, step_size = SIZES[norm]["eps"], SIZES[norm]["step_size"]
    iterates, losses = [eta], []
    for _ in range(steps):
        leaf = eta.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(call(x + leaf), y).sum(), leaf)
        if norm == "linf":
            eta = torch.clamp(eta + step_size * g.sign(), -eps, eps)
        else:
            eta = eta + step_size * g / g.flatten(1).norm(dim=1)[:, None, None, None]
            eta = eta * torch.clamp(eps / eta.flatten(1).norm(dim=1)[:, None, None, None], max=1)
        eta = torch.clamp(x + eta, 0, 1) - x
        iterates.append(eta)
    with torch.no_grad():
        losses = [loss(call(x + eta), y) for eta in iterates]
    return iterates, losses


def best_of(iterates: list[Tensor], losses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Per sample the perturbation of the largest loss."""
    stacked = torch.stack(losses)
    index = stacked.argmax(0)
    return torch.stack(iterates)[index, torch.arange(len(index))], stacked.amax(0)


def own(error: Exception, argument: str) -> bool:
    """Whether the package raised the error itself, and names the argument."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(yopo_ext.__file__).parent)
    return (
        isinstance(error, TypeError | ValueError)
        and frames[-1].filename.startswith(package)
        and re.search(rf"\b({argument})\b", str(error)) is not None
    )


def or_named(argument: str, attack: Callable[[], Any]) -> Any:
    """What the attack returns; None where the package refused the argument by name. Other errors are faults."""
    try:
        return attack()
    except Exception as error:
        if not own(error, argument):
            raise
        return None


# --- a callable loss is judged by the loss alone ---


def toward(logits: Tensor, target: Tensor) -> Tensor:
    """A targeted attack."""
    return -F.cross_entropy(logits, target, reduction="none")


def away(logits: Tensor, y: Tensor) -> Tensor:
    """An untargeted loss whose largest value need not be where the prediction is wrong."""
    return (logits.logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)).sqrt()


def to_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    return -F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)


CALLABLES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "integer targets": (toward, lambda y: (y + 1) % CLASSES),
    "integer targets, untargeted": (away, lambda y: y),
    "the same target for all": (toward, torch.zeros_like),
    "probabilities (guard)": (to_probabilities, lambda y: F.one_hot(y, CLASSES).double() * 0.6 + 0.1),
}


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_best_iterate_of_a_callable_loss(name: str, norm: str) -> None:
    loss, make_target = CALLABLES[name]
    model = network().eval()
    x, y = images()
    target = make_target(y)
    found = pgd(model, x, target, steps=STEPS, loss=loss, keep="best", init=start(x), norm=norm, **SIZES[norm])
    perturbation, losses = best_of(*plain(model, x, target, loss, start(x), norm=norm))
    torch.testing.assert_close(found.loss, losses)
    torch.testing.assert_close(found.perturbation, perturbation, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("keep", ["last", "best"])
def test_restarts_of_a_callable_loss(name: str, keep: str) -> None:
    loss, make_target = CALLABLES[name]
    model = network().eval()
    x, y = images()
    options: dict[str, Any] = {"steps": STEPS, "loss": loss, "keep": keep, **SIZES["linf"]}
    generator = torch.Generator().manual_seed(0)
    found = pgd(model, x, make_target(y), restarts=3, generator=generator, **options)
    generator = torch.Generator().manual_seed(0)  # the starts of three single runs are the same draws
    runs = [pgd(model, x, make_target(y), generator=generator, **options).perturbation for _ in range(3)]
    with torch.no_grad():
        losses = [loss(model(x + eta), make_target(y)) for eta in runs]
    perturbation, best = best_of(runs, losses)
    torch.testing.assert_close(found.loss, best)
    torch.testing.assert_close(found.perturbation, perturbation, rtol=0, atol=1e-12)


def hits(model: nn.Module, x: Tensor, eta: Tensor, target: Tensor) -> int:
    with torch.no_grad():
        return int((model(x + eta).argmax(1) == target).sum())


# --- targeted=True ---


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_targeted_lowers_the_loss_of_the_target(loss: str, norm: str) -> None:
    losses: dict[str, Callable[..., Tensor]] = {
        "ce": toward,
        "margin": lambda logits, y: -yopo_ext.attacks.margin(logits, y),
    }
    model = network().eval()
    x, y = images()
    target = (y + 1) % CLASSES
    found = pgd(
        model, x, target, targeted=True, loss=loss, steps=STEPS, init=start(x), norm=norm, **SIZES[norm]
    )  # fmt: skip
    iterates, _ = plain(model, x, target, losses[loss], start(x), norm=norm)
    torch.testing.assert_close(found.perturbation, iterates[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("restarts", "keep"), [(1, "best"), (3, "last"), (3, "best")])
def test_targeted_keeps_what_hits(restarts: int, keep: str) -> None:
    model = network().eval()
    x, y = images(64)
    target = (y + 1) % CLASSES

    def run(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pgd(
            model, x, target, targeted=True, steps=6, generator=generator, eps=0.04, step_size=0.01, **options
        ).perturbation  # fmt: skip

    single = run()
    assert 0 < hits(model, x, single, target) < len(x)
    more = run(restarts=restarts, keep=keep)
    with torch.no_grad():
        hit = model(x + single).argmax(1) == target
        assert (model(x + more).argmax(1) == target)[hit].all()


def test_targeted_is_a_bool_for_labels() -> None:
    x, y = images(2)
    with pytest.raises((TypeError, ValueError), match="targeted"):
        pgd(network(), x, y, targeted="yes", steps=1, **SIZES["linf"])


# --- under inference_mode ---


@pytest.mark.parametrize("inside", ["the call", "the images", "the model"])
@pytest.mark.parametrize("options", [{}, {"keep": "best"}, {"restarts": 2}], ids=str)
def test_under_inference_mode(inside: str, options: dict[str, Any]) -> None:
    x, y = images(4)
    model = network().eval()

    def attack() -> Any:
        return pgd(model, x, y, steps=STEPS, generator=torch.Generator().manual_seed(0), **SIZES["linf"], **options)

    expected = attack()
    argument = "model"
    with torch.inference_mode():
        if inside == "the images":
            x, y, argument = x.clone(), y.clone(), "x"
        if inside == "the model":
            model = network().eval()
        found = or_named(argument, attack) if inside != "the call" else attack()
    if found is not None:
        torch.testing.assert_close(found.perturbation.clone(), expected.perturbation, rtol=0, atol=1e-12)


# --- segmentation ---


def per_image(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none").mean((1, 2))


@pytest.mark.parametrize("loss", ["callable", "ce", "margin"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_segmentation(loss: str, keep: str) -> None:
    x, _ = images(4)
    y = torch.randint(0, CLASSES, (4, 8, 7), generator=torch.Generator().manual_seed(1))
    model = segmenter().eval()
    given: Any = per_image if loss == "callable" else loss
    found = or_named(
        "y|loss" if loss != "callable" else "-",
        lambda: pgd(model, x, y, steps=STEPS, init=start(x), keep=keep, loss=given, **SIZES["linf"]),
    )
    if found is not None and loss != "margin":
        iterates, losses = plain(model, x, y, per_image, start(x))
        expected = iterates[-1] if keep == "last" else best_of(iterates, losses)[0]
        torch.testing.assert_close(found.perturbation, expected, rtol=0, atol=1e-12)


def test_segmentation_with_restarts() -> None:
    x, _ = images(4)
    y = torch.randint(0, CLASSES, (4, 8, 7), generator=torch.Generator().manual_seed(1))
    model = segmenter().eval()
    options: dict[str, Any] = {"steps": STEPS, "loss": per_image, **SIZES["linf"]}
    generator = torch.Generator().manual_seed(0)
    found = pgd(model, x, y, restarts=3, generator=generator, **options)
    generator = torch.Generator().manual_seed(0)
    runs = [pgd(model, x, y, generator=generator, **options).perturbation for _ in range(3)]
    with torch.no_grad():
        expected, _ = best_of(runs, [per_image(model(x + eta), y) for eta in runs])
    torch.testing.assert_close(found.perturbation, expected, rtol=0, atol=1e-12)


# --- a loss that is not per sample ---


@pytest.mark.parametrize("reduction", ["mean", "sum", "[B, 1]"])
@pytest.mark.parametrize("options", [{"init": "zero"}, {"keep": "best", "init": "zero"}, {"restarts": 2}], ids=str)
def test_a_loss_that_is_not_per_sample(reduction: str, options: dict[str, Any]) -> None:
    x, y = images(4)
    model = network().eval()

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(logits, y, reduction="none")
        return {"mean": each.mean(), "sum": each.sum(), "[B, 1]": each[:, None]}[reduction]

    def attack(loss: Any) -> Any:
        return pgd(
            model, x, y, loss=loss, steps=STEPS, generator=torch.Generator().manual_seed(0), **SIZES["linf"], **options
        )  # fmt: skip

    found = or_named("loss", lambda: attack(loss))
    if found is not None:
        expected = attack(lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
        torch.testing.assert_close(found.perturbation, expected.perturbation, rtol=0, atol=1e-12)


# --- outputs that are no tensor ---


class ModelOutput(OrderedDict):  # as Hugging Face's
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Record:
    logits: Tensor


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda z: (z, None), lambda out: out[0]),
    "dict": (lambda z: {"logits": z}, lambda out: out["logits"]),
    "Hugging Face": (lambda z: ModelOutput(logits=z), lambda out: out.logits),
    "dataclass": (Record, lambda out: out.logits),
}


class Returning(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.make = network(), make

    def forward(self, u: Tensor) -> Any:
        return self.make(self.inner(u))


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("keep", ["last", "best"])
def test_outputs_that_are_no_tensor(name: str, keep: str) -> None:
    make, logits_of = OUTPUTS[name]
    model = Returning(make).eval()
    x, y = images(4)
    options: dict[str, Any] = {"steps": STEPS, "init": start(x), "keep": keep, **SIZES["linf"]}
    expected = pgd(model.inner, x, y, **options)
    found = or_named("model|forward", lambda: pgd(model, x, y, **options))
    if found is not None:
        torch.testing.assert_close(found.perturbation, expected.perturbation, rtol=0, atol=1e-12)
    found = pgd(model, x, y, forward=lambda model, u: logits_of(model(u)), **options)
    torch.testing.assert_close(found.perturbation, expected.perturbation, rtol=0, atol=1e-12)


def test_forward_with_other_inputs_and_normalisation() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, pixel_values: Tensor, shift: Tensor) -> Tensor:
            return self.inner(pixel_values) + shift

    model, shift = Two().eval(), torch.linspace(0, 2, CLASSES, dtype=torch.float64)
    x, y = images(4)
    found = pgd(
        model, x, y, steps=STEPS, init=start(x), mean=0.5, std=0.25, **SIZES["linf"],
        forward=lambda model, u: model(pixel_values=u, shift=shift),
    )  # fmt: skip
    iterates, _ = plain(
        lambda u: model((u - 0.5) / 0.25, shift), x, y, lambda z, y: F.cross_entropy(z, y, reduction="none"), start(x)
    )
    torch.testing.assert_close(found.perturbation, iterates[-1], rtol=0, atol=1e-12)


def test_forward_is_callable() -> None:
    x, y = images(2)
    with pytest.raises(TypeError, match=r"forward must"):
        pgd(network(), x, y, steps=1, forward="logits", **SIZES["linf"])


# --- x of another dtype than the model ---


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize(
    ("model_dtype", "x_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_x_of_another_dtype_than_the_model(model_dtype: torch.dtype, x_dtype: torch.dtype, keep: str) -> None:
    model = network(model_dtype).eval()
    x, y = images(4, x_dtype)
    found = or_named("x", lambda: pgd(model, x, y, steps=1, init=start(x), keep=keep, **SIZES["linf"]))
    if found is None:
        return
    assert found.perturbation.dtype == x_dtype
    leaf = start(x).requires_grad_()
    loss = F.cross_entropy(model((x + leaf).to(model_dtype)).float(), y, reduction="sum")
    (g,) = torch.autograd.grad(loss, leaf)
    moved = torch.clamp(torch.clamp(start(x) + SIGMA * g.sign(), -EPS, EPS) + x, 0, 1) - x
    if keep == "last":
        near = (found.perturbation - moved).abs() < 1e-6
        assert near.double().mean() > 0.97  # a gradient near zero may round to another sign


# --- what it shares with the steps ---


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1)], ids=str)
def test_constants_that_broadcast(shape: tuple[int, ...]) -> None:
    x, y = images(4)
    model = network().eval()
    values = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "eps": [0.05, 0.1, 0.2], "step_size": [0.01, 0.02, 0.05]}
    as_lists = pgd(model, x, y, steps=STEPS, init="zero", **values)
    tensors: dict[str, Any] = {name: torch.tensor(v, dtype=torch.float64).reshape(shape) for name, v in values.items()}
    as_tensors = pgd(model, x, y, steps=STEPS, init="zero", **tensors)
    torch.testing.assert_close(as_tensors.perturbation, as_lists.perturbation, rtol=0, atol=1e-12)


def test_eps_of_each_sample() -> None:
    x, y = images(4)
    model = network().eval()
    sizes = [0.02, 0.05, 0.1, 0.3]
    eps: Any = torch.tensor(sizes, dtype=torch.float64)[:, None, None, None]
    found = pgd(model, x, y, steps=STEPS, init="zero", eps=eps, step_size=SIGMA)
    for i, size in enumerate(sizes):
        one = pgd(model, x[i : i + 1], y[i : i + 1], steps=STEPS, init="zero", eps=size, step_size=SIGMA)
        torch.testing.assert_close(found.perturbation[i : i + 1], one.perturbation, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step_size", [2, [2.0, 2.0, 2.0], torch.tensor(2.0)], ids=str)
def test_step_size_in_units_of_0_to_255(step_size: Any) -> None:
    x, y = images(2)
    with pytest.raises(ValueError, match="step_size"):
        pgd(network(), x, y, eps=8 / 255, step_size=step_size, steps=1)


@pytest.mark.parametrize("devices", [[], [0], [0, 1]], ids=str)
def test_data_parallel(devices: list[int]) -> None:
    x, y = images(4)
    model = network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = nn.DataParallel(copy.deepcopy(model))
    wrapped.device_ids = devices
    if len(devices) == 1:  # what one device does, without the device
        wrapped.forward = lambda u: wrapped.module(u)
    options: dict[str, Any] = {"steps": STEPS, "init": start(x), **SIZES["linf"]}
    if len(devices) > 1:
        with pytest.raises((TypeError, ValueError), match=r"model\.module"):
            pgd(wrapped, x, y, **options)
        return
    found, expected = pgd(wrapped, x, y, **options), pgd(model, x, y, **options)
    torch.testing.assert_close(found.perturbation, expected.perturbation, rtol=0, atol=1e-12)
