"""One training run: epochs, validation, checkpoints, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.config.resolve import dataset_of, device_for, resolve, threat_model
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.augment import Augmentation
from yopo_ext.training.data.batches import SplitSource
from yopo_ext.training.data.splits import Dataset
from yopo_ext.training.evaluation.evaluate import evaluate
from yopo_ext.training.loop.collapse_alarm import has_fallen, training_alarm
from yopo_ext.training.loop.course import Course, description, divergence, train_on
from yopo_ext.training.loop.learner import FabricLearner
from yopo_ext.training.loop.position import Clock, DivergedError, Position
from yopo_ext.training.loop.saved_run import saved_run
from yopo_ext.training.loop.speed import choose_mode, is_open, kept
from yopo_ext.training.methods import Method
from yopo_ext.training.optim.schedules import make_schedule
from yopo_ext.training.run.checkpoint import save_checkpoint
from yopo_ext.training.run.deadline import Deadline
from yopo_ext.training.run.environment import environment
from yopo_ext.training.run.files import remove_leftovers, write_json
from yopo_ext.training.run.metrics import EpochLog
from yopo_ext.training.run.progress import Progress


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    config: TrainConfig
    method: Method
    network: nn.Module  # with the selected weights, in evaluation mode, on the run's device
    dataset: Dataset  # on the run's device
    seconds: float  # of training alone: no compilation, no validation, no checkpoints
    compile_seconds: float  # spent compiling, by each process that had a part in the run
    updates: int
    images: int  # trained on, by all processes
    peak_memory: float | None  # MiB on the GPU, in training and validation; None on a CPU
    validation: dict[str, float]  # of the selected checkpoint
    diverged: int | None  # the epoch that ended the run because its weights were not finite


class Trainer:
    """Trains one configuration."""

    def __init__(self, config: TrainConfig, *, dataset: Dataset | None = None, shown: bool = True) -> None:
        """`config` is resolved here; `dataset` replaces the one it names (several runs can share one in memory).

        Sets PyTorch's number of CPU threads if the configuration does.

        Raises:
            ValueError, TypeError: for a configuration that cannot be run, or a folder that holds another run.
        """
        from yopo_ext.training.loop.fabric import make_fabric  # seconds of imports that --help should not pay

        self.config, self.method = resolve(config)
        self.folder = Path(self.config.out) if self.config.out is not None else None
        self.at = Position()
        saved = saved_run(self.config)
        threads = self.config.threads if saved is None else saved["threads"]  # another number rounds differently
        if threads is not None:
            torch.set_num_threads(threads)
        if saved is not None:
            self.config = kept(self.config, saved["config"], device_for(self.config.accelerator), shown=shown)
        self.fabric = make_fabric(self.config)
        self.device = self.fabric.device
        self.leads = self.fabric.global_rank == 0  # the process that writes and prints
        self.shown = shown and self.leads
        self.threat = threat_model(self.config)
        self.dataset = (dataset or dataset_of(self.config)).to(self.device)
        if is_open(self.config):
            self._choose_mode()
        self.learner = FabricLearner(self.config, self.method, self.dataset, self.fabric)
        assert self.config.batch_size is not None
        self.source = SplitSource(
            self.dataset.train,
            self.config.batch_size,
            seed=self.config.seed,
            augmentation=Augmentation() if self.config.augment else None,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        self.schedule = make_schedule(self.config.schedule, self.config.milestones, self.config.warmup)
        self.selected: dict[str, Tensor] | None = None
        # Processes must agree on whatever depends on time, and asking costs them a wait.
        self.agree_every = 1 if self.fabric.world_size == 1 else 16
        if saved is not None:
            self.learner.load_state_dict(saved)
            self.selected = saved["selected"]
            self.at = Position(**saved["position"])
            train_on(self.config, saved["config"], self.at, self.source.batches, shown=self.shown)
        self.course = Course(self.config, self.at, self.source.batches)

    def _choose_mode(self) -> None:
        """Fill in precision, layout and compilation; the first process decides and tells the others."""
        from yopo_ext.training.loop.fabric import make_fabric

        found = self.config
        if self.leads:
            found = choose_mode(self.config, self.method, self.dataset, self.device, shown=self.shown)
        self.config = self.fabric.broadcast(found)
        if self.config.precision != "32-true":
            self.fabric = make_fabric(self.config)

    def fit(self, deadline: Deadline | None = None) -> TrainResult | None:
        """Train to the end and select the result on the validation split.

        When the `deadline` passes the run is saved and left, and None returned.
        """
        log = self._open_folder()
        if self.config.compile and self.progress() < 1.0:
            self._compile()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        total = None if self.config.time_budget else (self.config.epochs or 0) * self.source.batches
        progress = Progress(self.title, total, self.at.batches, shown=self.shown)
        if not self.course.is_over():
            progress.say(description(self.config, self.at, self.source.batches, self.device))
        try:
            while self.progress() < 1.0 and self.at.diverged is None:
                if not self._train_epoch(progress, deadline):
                    progress.say(f"stopped after {self.at.seconds:.0f} s of training; --resume auto goes on from here")
                    return None
                record = self._end_epoch()
                if "alarm" in record:
                    progress.say(f"ALARM: {record['alarm']}")
                if log is not None:
                    log.append(record)
                self._save()
                progress.epoch(record, last=self.course.is_over())
        finally:
            progress.close()
            if log is not None:
                log.close()
        return self._finish()

    @property
    def title(self) -> str:
        return f"{self.config.method} seed {self.config.seed}"

    def progress(self, ahead: float = 0.0) -> float:
        """How much of the schedule is done, 0..1, `ahead` batches from here."""
        return self.course.progress(ahead)

    def lr(self) -> float:
        """The learning rate of the batch to come."""
        assert self.config.lr is not None
        return self.config.lr * self.schedule(self.progress(ahead=0.5))

    def _compile(self) -> None:
        clock = Clock(self.device, self.at.compile_seconds)
        self.learner.rehearse(next(self.source.epoch(0)))
        self.at.compile_seconds = clock.pause()

    def _train_epoch(self, progress: Progress, deadline: Deadline | None) -> bool:
        """The rest of the epoch; False if the deadline ended it."""
        self.learner.module.train()
        totals = torch.tensor(self.at.totals, dtype=torch.float64, device=self.device)  # read back when saving
        clock = Clock(self.device, self.at.seconds)
        saved = time.monotonic()
        for batch in self.source.epoch(self.at.epoch, self.at.batch):
            if self.progress() >= 1.0:
                break
            self.learner.progress = self.course.progress_after_epoch()
            self.learner.threat = self.course.threat_now(self.threat)
            try:
                outcome = self.learner.step(batch, self.at.batches, self.lr())
            except DivergedError:
                self.at.diverged = self.at.epoch + 1
                break
            count = totals.new_tensor(len(batch.y))
            correct = (outcome.logits.argmax(1) == batch.y).sum()
            alignment = torch.zeros_like(count) if outcome.alignment is None else outcome.alignment * count
            totals += torch.stack([outcome.loss.double() * count, correct, count, alignment])
            self.at.batches += 1
            self.at.batch += 1
            progress.advance()
            if self.at.batches % self.agree_every == 0:
                now = time.monotonic()
                due = (clock.read(), deadline is not None and deadline.passed(), now - saved > self.config.save_every)
                self.at.seconds, stop, save = self.fabric.broadcast(due)
                if (stop or save) and self.at.batch < self.source.batches:
                    self.at.seconds = self.fabric.broadcast(clock.pause())
                    self.at.totals = totals.tolist()
                    self._save()
                    if stop:
                        return False
                    saved = time.monotonic()
                    clock = Clock(self.device, self.at.seconds)
        self.at.seconds = self.fabric.broadcast(clock.pause())
        self.at.totals = totals.tolist()
        return True

    def _end_epoch(self) -> dict[str, Any]:
        """Validate where it is due; returns the epoch's record."""
        lr = self.learner.optimizer.param_groups[0]["lr"]
        loss, correct, count, alignment = self.at.totals
        self.at.epoch += 1
        self.at.batch, self.at.totals = 0, [0.0] * 4
        record: dict[str, Any] = {
            "epoch": self.at.epoch,
            "updates": self.learner.updates,
            "seconds": round(self.at.seconds, 3),
            "lr": lr,
            "train_loss": loss / max(count, 1.0),
            "train_accuracy": 100.0 * correct / max(count, 1.0),
        }
        if self.method.watches_inputs:
            record["alignment"] = alignment / max(count, 1.0)
        self.learner.synchronise()
        if self.at.diverged is not None or not self.learner.is_finite():
            self.at.diverged = self.at.epoch
            return record | {"alarm": divergence(self.at)}
        if self.progress() >= 1.0 or self.at.epoch % (self.config.validate_every or 1) == 0:
            record |= self._validate()
            self.at.curve.append((record["seconds"], record["validation_pgd"]))
            if self._is_selected(record):
                found = {name: value for name, value in record.items() if name.startswith("validation_")}
                self.at.selected = {**found, "epoch": record["epoch"]}
                self.selected = {k: v.detach().clone() for k, v in self.learner.result.state_dict().items()}
                self._save_model()
        if "validation_clean" in record:
            fell = has_fallen(self.at.highest, record, self.dataset.classes)
            self.at.fallen = self.at.fallen + 1 if fell else 0
        if self.method.selects_by == "robust":
            alarm = training_alarm(
                self.at.highest, record, self.dataset.classes, fallen=self.at.fallen, last=self.progress() >= 1.0
            )
            if alarm is not None:
                record["alarm"] = alarm
        for name in {"validation_clean", "validation_pgd", "alignment", "lr"} & record.keys():
            self.at.highest[name] = max(record[name], self.at.highest.get(name, 0.0))
        return record

    def _validate(self) -> dict[str, float]:
        attack = PgdAttack(self.config.validation_steps)
        found = evaluate(
            self.learner.result,
            self.dataset.validation,
            self.threat,
            [attack],
            seed=self.config.seed,
            title=f"{self.title} validation" if self.shown else None,
        )
        return {"validation_clean": found.clean, "validation_pgd": found.robust[attack.name]}

    def _is_selected(self, record: dict[str, Any]) -> bool:
        """Whether these weights replace the ones that were the result so far."""
        if self.config.select == "last" or self.at.selected is None:
            return True
        key = {"robust": "validation_pgd", "clean": "validation_clean"}[self.method.selects_by]
        return record[key] >= self.at.selected[key]

    def _finish(self) -> TrainResult:
        if self.selected is None:
            raise DivergedError(divergence(self.at))
        network = self.learner.result
        network.load_state_dict(self.selected)
        network.eval()
        result = TrainResult(
            self.config,
            self.method,
            network,
            self.dataset,
            self.at.seconds,
            self.at.compile_seconds,
            self.learner.updates,
            self.at.batches * self.source.batch_size * self.fabric.world_size,
            self.at.peak_memory,
            dict(self.at.selected or {}),
            self.at.diverged,
        )
        if self.folder is not None and self.leads:
            summary = {name: getattr(result, name) for name in ("seconds", "compile_seconds", "updates", "diverged")}
            write_json(
                self.folder / "result.json",
                {"method": self.config.method, **summary, "selected": self.at.selected},
            )
        return result

    def _open_folder(self) -> EpochLog | None:
        if self.folder is None or not self.leads:
            return None
        remove_leftovers(self.folder)
        log = EpochLog(
            self.folder, tensorboard=self.config.tensorboard, epoch=self.at.epoch, updates=self.learner.updates
        )
        facts = {"config": dataclasses.asdict(self.config), "environment": environment(self.device)}
        write_json(self.folder / "run.json", facts)
        return log

    def _save(self) -> None:
        """Everything that `resume` needs."""
        self.learner.collect()
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
            self.at.peak_memory = max(peak, self.at.peak_memory or 0.0)
        if self.folder is None or not self.leads:
            return
        state = {**self._description(), **self.learner.state_dict(), "selected": self.selected}
        save_checkpoint(self.folder / "last.pt", {**state, "position": dataclasses.asdict(self.at)})

    def _save_model(self) -> None:
        """The weights that are the result so far."""
        if self.folder is None or not self.leads:
            return
        state = {**self._description(), "model": self.learner.result.state_dict(), "validation": self.at.selected}
        save_checkpoint(self.folder / "model.pt", state)

    def _description(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "shape": list(self.dataset.shape),
            "classes": self.dataset.classes,
            "threads": torch.get_num_threads(),
        }
