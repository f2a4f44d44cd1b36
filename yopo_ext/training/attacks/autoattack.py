"""AutoAttack and its Square attack, from the package `pyautoattack` or `autoattack`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from yopo_ext.training.attacks.base import Attack, pixel_model
from yopo_ext.training.attacks.image_wise import Starts
from yopo_ext.training.methods.base import ThreatModel

TARGETS = 9  # most likely other classes that the targeted attacks try
# Its attacks, and the fewest classes each can be run on: the targeted DLR loss reads the four largest logits.
ENSEMBLE = {"apgd-ce": 2, "apgd-t": 4, "fab-t": 2, "square": 2}


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
        wrapped, x = pixel_model(model, threat), x.contiguous()  # it fails on channels_last inputs
        with torch.no_grad():
            classes = wrapped(x[:1]).shape[1] if len(x) else TARGETS + 1
        chosen = ["square"] if self.square else [*(a for a, least in ENSEMBLE.items() if classes >= least)]
        if find_spec("pyautoattack") is not None:
            from pyautoattack import AutoAttack as Ensemble

            ensemble = Ensemble(wrapped, version="custom", attacks=chosen, **options)
            _as_in_the_standard_version(ensemble, classes)
            attacked, _ = ensemble.run_standard_evaluation(x, y, batch_size=max(len(x), 1))
        else:
            from autoattack import AutoAttack as Ensemble

            ensemble = Ensemble(wrapped, version="custom", attacks_to_run=chosen, verbose=False, **options)
            _as_in_the_standard_version(ensemble, classes)
            attacked = ensemble.run_standard_evaluation(x, y, bs=max(len(x), 1))
        return starts.ball.project(attacked - x)


def _as_in_the_standard_version(ensemble: Any, classes: int) -> None:
    ensemble.apgd.n_restarts = ensemble.fab.n_restarts = ensemble.apgd_targeted.n_restarts = 1
    ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = min(TARGETS, classes - 1)
    ensemble.square.n_queries = 5000
