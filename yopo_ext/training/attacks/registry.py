"""The attacks of an evaluation: name, cost and how each is run; `SUITES` lists what is tried when."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from yopo_ext import attacks
from yopo_ext.training.attacks.apgd import apgd
from yopo_ext.training.attacks.image_wise import Starts
from yopo_ext.training.methods.base import ThreatModel
from yopo_ext.training.numbers import parse_number


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """What is tried on a model; `samples`: only on the first so many images of the split (None: on all)."""

    whole_batches: ClassVar[bool] = False  # whether an image's result depends on the others of its batch

    samples: int | None = None

    @property
    def name(self) -> str:
        """How it is written on the command line: "pgd-20", "autoattack@1000"."""
        return self.kind if self.samples is None else f"{self.kind}@{self.samples}"

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name, without the number of images."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Forwards and input gradients per image."""

    @abstractmethod
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, starts: Starts) -> Tensor:
        """The perturbation found, [B, C, H, W]."""

    def count(self, images: int) -> int:
        """How many of a split's `images` it is tried on."""
        return images if self.samples is None else min(images, self.samples)


@dataclass(frozen=True)
class PgdAttack(Attack):
    """PGD as an evaluation runs it: uniform start, step eps / 4 unless given, last iterate, worst of the restarts."""

    steps: int = 20
    restarts: int = 1
    loss: Literal["ce", "margin"] = "ce"
    step_size: float | None = None

    @property
    def kind(self) -> str:
        name = {"ce": "pgd", "margin": "cw"}[self.loss]
        restarts = f"-{self.restarts}" if self.restarts > 1 else ""
        return f"{name}-{self.steps}{restarts}" + (f":{self.step_size:.10g}" if self.step_size is not None else "")

    @property
    def passes(self) -> int:
        return 2 * self.steps * self.restarts + (self.restarts if self.restarts > 1 else 0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, starts: Starts) -> Tensor:
        eta, left = torch.zeros_like(x), torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            eta[left] = attacks.pgd(
                model,
                x[left],
                y[left],
                eps=threat.eps,
                step_size=threat.eps / 4 if self.step_size is None else self.step_size,
                steps=self.steps,
                loss=self.loss,
                norm=threat.norm,
                bounds=threat.bounds,
                init=starts.draw()[left],
                mean=threat.mean,
                std=threat.std,
            ).perturbation
            if self.restarts > 1:
                left = left[is_correct(model, (x + eta)[left], y[left], threat)]
            if len(left) == 0:
                break
        return eta


@dataclass(frozen=True)
class Apgd(Attack):
    """APGD with 100 steps: on cross-entropy, or on the targeted DLR loss against the nine most likely other classes."""

    targeted: bool = False
    steps: int = 100
    targets: int = 9

    @property
    def kind(self) -> str:
        return "apgd-t" if self.targeted else "apgd-ce"

    @property
    def passes(self) -> int:
        return (self.targets if self.targeted else 1) * 2 * (self.steps + 1)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, starts: Starts) -> Tensor:
        targets = self.targets if self.targeted else None
        return apgd(pixel_model(model, threat), x, y, starts.ball, starts.draw, steps=self.steps, targets=targets)


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The ensemble of Croce and Hein, or its Square attack alone, from the package `pyautoattack` or `autoattack`."""

    whole_batches: ClassVar[bool] = True
    square: bool = False

    @property
    def kind(self) -> str:
        return "square" if self.square else "autoattack"

    @property
    def passes(self) -> int:
        return 5000 if self.square else 5000 + 202 + 2 * 1818

    def require(self) -> None:
        """Raise ModuleNotFoundError if neither package is installed."""
        if find_spec("pyautoattack") is None and find_spec("autoattack") is None:
            raise ModuleNotFoundError(f"attack {self.name!r} needs a package: pip install pyautoattack")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, starts: Starts) -> Tensor:
        self.require()
        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        options = {"norm": norm, "eps": threat.eps, "seed": starts.seed % 2**31, "device": x.device}
        chosen = ["square"] if self.square else ["apgd-ce", "apgd-t", "fab-t", "square"]
        wrapped, x = pixel_model(model, threat), x.contiguous()  # it fails on channels_last inputs
        if find_spec("pyautoattack") is not None:
            from pyautoattack import AutoAttack as Ensemble

            ensemble = Ensemble(wrapped, version="custom", attacks=chosen, **options)
            _as_in_the_standard_version(ensemble)
            attacked, _ = ensemble.run_standard_evaluation(x, y, batch_size=max(len(x), 1))
        else:
            from autoattack import AutoAttack as Ensemble

            ensemble = Ensemble(wrapped, version="custom", attacks_to_run=chosen, verbose=False, **options)
            _as_in_the_standard_version(ensemble)
            attacked = ensemble.run_standard_evaluation(x, y, bs=max(len(x), 1))
        return starts.ball.project(attacked - x)


def _as_in_the_standard_version(ensemble: Any) -> None:
    ensemble.apgd.n_restarts = ensemble.fab.n_restarts = ensemble.apgd_targeted.n_restarts = 1
    ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = 9
    ensemble.square.n_queries = 5000


SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("pgd-20",),  # while developing
    "standard": ("pgd-20", "pgd-50-10", "cw-50-10"),  # what papers on fast training report
    # before claiming anything
    "full": ("pgd-20", "pgd-50-10", "cw-50-10", "apgd-ce", "apgd-t", "square", "autoattack"),
}


def parse_attack(text: str) -> Attack:
    """The attack written as "pgd-STEPS[-RESTARTS]", "cw-STEPS[-RESTARTS]" (PGD on the margin loss) or by its name.

    ":STEP_SIZE" after PGD's numbers sets its step (default: eps / 4), and "@IMAGES" at the end limits any attack to the
    first so many images: "pgd-40:0.01", "autoattack@1000".

    Raises:
        ValueError: for anything else.
    """
    named: dict[str, Attack] = {a.kind: a for a in (Apgd(), Apgd(targeted=True), AutoAttack(square=True), AutoAttack())}
    found = re.fullmatch(r"((pgd|cw)-([1-9]\d*)(-[1-9]\d*)?(:[^@]+)?|[a-z-]+)(@[1-9]\d*)?", text.strip())
    if found is None or not (found[2] or found[1] in named):
        raise ValueError(
            "attack must look like pgd-20, pgd-50-10 (steps, restarts), cw-50-10 or pgd-40:0.01 (step size), or be one of "
            f"{', '.join(named)}, with @1000 after it for the first 1000 images only; got {text!r}"
        )
    name, kind, steps, restarts, step_size, images = found.groups()
    if kind is None:
        attack = named[name]
    else:
        size = None if step_size is None else parse_number(step_size[1:], f"step size in attack {text!r}")
        if size is not None and not size > 0.0:
            raise ValueError(f"step size in attack {text!r} must be > 0")
        attack = PgdAttack(int(steps), int((restarts or "-1")[1:]), "ce" if kind == "pgd" else "margin", size)
    return attack if images is None else dataclasses.replace(attack, samples=int(images[1:]))


def parse_attacks(texts: Sequence[str]) -> list[Attack]:
    """The attacks, all of which can be run here.

    Raises:
        ValueError: for an unknown attack.
        ModuleNotFoundError: for one whose package is not installed.
    """
    found = [parse_attack(text) for text in texts]
    if not found or len({attack.name for attack in found}) < len(found):
        raise ValueError(f"attacks must be a list without repetitions, at least one long; got {list(texts)}")
    for attack in found:
        if isinstance(attack, AutoAttack):
            attack.require()
    return found


def passes(attack_list: Sequence[Attack], images: int) -> int:
    """Forwards and input gradients that `evaluate` spends on a split of so many images, all of them attacked."""
    return images + sum(attack.count(images) * (1 + attack.passes) for attack in attack_list)


def pixel_model(model: nn.Module, threat: ThreatModel) -> nn.Module:
    """The model as a function of pixels."""
    return model if threat.mean is None else _Normalised(model, threat)


@torch.no_grad()
def is_correct(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Whether the model predicts y, [B] bool."""
    return pixel_model(model, threat)(x).argmax(1) == y


class _Normalised(nn.Module):
    def __init__(self, model: nn.Module, threat: ThreatModel) -> None:
        super().__init__()
        assert threat.mean is not None
        assert threat.std is not None
        self.model, self.mean, self.std = model, threat.mean, threat.std

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - attacks.broadcast(self.mean, x)) / attacks.broadcast(self.std, x))
