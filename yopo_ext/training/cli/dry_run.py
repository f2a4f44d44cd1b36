"""What a run would cost, from a few timed steps: `--dry-run`."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from yopo_ext.training.attacks.base import Attack, passes_on
from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.attacks.registry import parse_attacks
from yopo_ext.training.config.resolve import dataset_of
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.splits import Dataset
from yopo_ext.training.evaluation.evaluate import seconds_per_pass
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.run.progress import duration

PROBED_STEPS = 3


@dataclass(frozen=True)
class Estimate:
    """Seconds of training and of evaluation (validation and test), and the highest memory use seen, in MiB."""

    training: float
    evaluation: float
    memory: float

    def __str__(self) -> str:
        return (
            f"training {duration(self.training)}, evaluation {duration(self.evaluation)}, memory {self.memory:.0f} MiB"
        )


def estimate(
    config: TrainConfig, dataset: Dataset, test_attacks: Sequence[Attack] = (), test_samples: int | None = None
) -> Estimate:
    """Time a few training steps and a small attack, then scale up. Writes no file."""
    trainer = Trainer(
        dataclasses.replace(config, out=None, resume="never", stop_after=None), dataset=dataset, shown=False
    )
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    batches = iter(trainer.source.epoch(0))
    elapsed = 0.0
    probed = min(PROBED_STEPS, trainer.source.batches)
    for number in range(-1, probed):  # the first one warms up
        batch = next(batches, None) or next(batches := iter(trainer.source.epoch(0)))
        started = time.perf_counter()
        trainer.learner.step(batch, number + 1, trainer.lr())
        if cuda:
            torch.cuda.synchronize(trainer.device)
        elapsed += time.perf_counter() - started if number >= 0 else 0.0
    epoch = elapsed / probed * trainer.source.batches
    training = trainer.config.time_budget or epoch * (trainer.config.epochs or 0)

    per_pass = seconds_per_pass(trainer.learner.result, trainer.dataset.validation, trainer.threat)
    validations = training / epoch / (trainer.config.validate_every or 1)
    evaluation = per_pass * (
        validations * passes_on([PgdAttack(trainer.config.validation_steps)], len(trainer.dataset.validation))
        + passes_on(test_attacks, len(trainer.dataset.test.first(test_samples)))
    )
    if cuda:
        memory = torch.cuda.max_memory_allocated(trainer.device) / 2**20
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return Estimate(training, evaluation, memory)


def planned(
    runs: Sequence[tuple[str, TrainConfig]],
    check: Callable[[], object],
    test_attacks: Sequence[str] = (),
    test_samples: int | None = None,
) -> Callable[[], int]:
    """Something to call that prints what the runs would cost, after `check` has met the errors that they would meet."""

    def job() -> int:
        check()
        dataset = dataset_of(runs[0][1])
        attacks = parse_attacks(test_attacks) if test_attacks else []
        seen: dict[str, Estimate] = {}
        for text, run in runs:
            if text not in seen:
                seen[text] = found = estimate(run, dataset, attacks, test_samples)
                times = sum(other == text for other, _ in runs)
                length = f"{run.epochs} epochs" if run.time_budget is None else f"{run.time_budget:g} s"
                what = f"{length} of {run.dataset}, {run.model}, eps {run.eps:.4g}"
                print(f"{text}: {times} x ({what}): {found}", flush=True)
        training = sum(seen[text].training for text, _ in runs)
        evaluation = sum(seen[text].evaluation for text, _ in runs)
        print(f"in all: {len(runs)} runs, training {duration(training)}, evaluation at most {duration(evaluation)}")
        return 0

    return job
