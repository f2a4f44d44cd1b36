"""One training run: batches in, weights, metrics and checkpoints out. The method decides what happens to a batch."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yopo_ext import attacks
from yopo_ext.training.augment import Augmentation
from yopo_ext.training.checkpoint import MetricsFile, save_checkpoint, write_json
from yopo_ext.training.config import TrainConfig, resolve, threat_model
from yopo_ext.training.data import Batch, Dataset, PerSample, TensorSource, load_dataset, mix_seed
from yopo_ext.training.environment import environment
from yopo_ext.training.evaluation import PgdAttack, evaluate
from yopo_ext.training.methods import Method, Outcome
from yopo_ext.training.models import build_model
from yopo_ext.training.progress import Progress
from yopo_ext.training.schedules import make_schedule


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    config: TrainConfig
    method: Method
    network: nn.Module  # with the selected weights, in evaluation mode, on the run's device
    dataset: Dataset  # on the run's device
    seconds: float  # of training alone: no validation, no checkpoints
    updates: int
    validation: dict[str, float]  # of the selected checkpoint


class Trainer:
    """Trains one configuration. It is the `Learner` that the method sees."""

    def __init__(self, config: TrainConfig, *, dataset: Dataset | None = None, shown: bool = True) -> None:
        """`config` is resolved here; `dataset` replaces the one it names (several runs can share one in memory)."""
        from yopo_ext.training.fabric import make_fabric  # seconds of imports that --help should not pay

        self.config, self.method = resolve(config)
        self.folder = Path(self.config.out) if self.config.out is not None else None
        if self.folder is not None and (self.folder / "last.pt").exists():
            raise ValueError(f"out must be a folder without a run; {self.folder} holds one")
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.fabric = make_fabric(self.config)
        self.device = self.fabric.device
        self.threat = threat_model(self.config)
        self.dataset = on_device(dataset or load_dataset(self.config.dataset), self.device)

        torch.manual_seed(mix_seed(self.config.seed))
        channels = self.dataset.shape[0]
        assert self.config.model is not None
        assert self.config.lr is not None
        assert self.config.batch_size is not None
        self.network, self.first_layer = build_model(self.config.model, channels, self.dataset.classes)
        self.network.train()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        wrapped, self.optimizer = self.fabric.setup(self.network, self.optimizer)
        # Fabric's wrapper hides DDP's no_sync and refuses input gradients under mixed precision: use what it wraps.
        self.replica: nn.Module = wrapped._forward_module
        self.network = wrapped.module

        self.source = TensorSource(
            self.dataset.train,
            self.config.batch_size,
            seed=self.config.seed,
            augmentation=Augmentation() if self.config.augment else None,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        self.schedule = make_schedule(self.config.schedule, self.config.milestones, self.config.warmup)
        self.generator = torch.Generator(self.device)
        self.kept = {name: self._first_kept(name) for name in self.method.keeps}
        self.carried: dict[str, Tensor] = {}
        self.epochs_done, self.batches_done, self.updates, self.seconds = 0, 0, 0, 0.0
        self.best: dict[str, float] | None = None
        self.curve: list[tuple[float, float]] = []  # (training seconds, validation PGD accuracy)
        self.leads = self.fabric.global_rank == 0  # the process that writes and prints
        self.shown = shown and self.leads

    # What a method uses (methods.base.Learner).

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.replica(self._normalised(x)).float()

    def predict(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.network(self._normalised(x)).float()

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), y, label_smoothing=self.config.label_smoothing)

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def attack(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        with self.autocast():
            options = {**dataclasses.asdict(self.threat), "generator": self.generator, **options}
            return attacks.pgd(self.network, x, y, **options).perturbation

    def autocast(self) -> AbstractContextManager[Any]:
        return self.fabric.autocast()

    # The run.

    def fit(self) -> TrainResult:
        """Train to the end and select the result on the validation split."""
        config = self.config
        assert config.epochs is not None
        metrics = self._open_folder()
        total = None if config.time_budget else config.epochs * self.source.batches
        progress = Progress(f"{config.method} seed {config.seed}", total, shown=self.shown)
        selected: dict[str, Tensor] | None = None
        try:
            while self._progress() < 1.0:
                record = self._train_epoch(progress)
                last = self._progress() >= 1.0
                if last or self.epochs_done % config.validate_every == 0:
                    record |= self._validate()
                    self.curve.append((record["seconds"], record["validation_pgd"]))
                    if self._is_best(record):
                        self.best = {k: v for k, v in record.items() if k.startswith("validation_")} | {
                            "epoch": record["epoch"]
                        }
                        selected = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
                        self._save("best.pt")
                if metrics is not None:
                    metrics.append(record)
                self._save("last.pt")
                progress.epoch(record, last)
        finally:
            progress.close()
        if config.select == "best" and selected is not None:
            self.network.load_state_dict(selected)
        self.network.eval()
        result = TrainResult(
            config, self.method, self.network, self.dataset, self.seconds, self.updates, dict(self.best or {})
        )
        if self.folder is not None and self.leads:
            write_json(
                self.folder / "result.json",
                {"method": config.method, "seconds": self.seconds, "updates": self.updates, "selected": self.best},
            )
        return result

    def step(self, batch: Batch, number: int) -> Outcome:
        """Train on one batch. Its random numbers depend on the seed, the process and `number` alone."""
        seed = mix_seed(self.config.seed, self.fabric.global_rank, number, 1)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        return self.method.train(self, batch)

    def _train_epoch(self, progress: Progress) -> dict[str, Any]:
        self.network.train()
        totals = torch.zeros(3, device=self.device)  # loss, correct, samples: read once per epoch
        self._synchronise()
        started = time.perf_counter()
        before = self.seconds
        for batch in self.source.epoch(self.epochs_done):
            if self._progress() >= 1.0:
                break
            lr = self.config.lr * self.schedule(self._progress(half_batch=True))  # type: ignore[operator]
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            outcome = self.step(batch, self.batches_done)
            correct = (outcome.logits.argmax(1) == batch.y).sum()
            totals += torch.stack([outcome.loss.float() * len(batch.y), correct, totals.new_tensor(len(batch.y))])
            self.batches_done += 1
            self.seconds = before + time.perf_counter() - started
            progress.advance()
        self._synchronise()
        self.seconds = before + time.perf_counter() - started
        self.epochs_done += 1
        loss, correct_count, count = totals.tolist()
        return {
            "epoch": self.epochs_done,
            "updates": self.updates,
            "seconds": round(self.seconds, 3),
            "lr": lr,
            "train_loss": loss / max(count, 1),
            "train_accuracy": 100.0 * correct_count / max(count, 1),
        }

    def _progress(self, half_batch: bool = False) -> float:
        """How much of the run is done, 0..1; with `half_batch` at the middle of the batch to come."""
        if self.config.time_budget is not None:
            return min(1.0, self.seconds / self.config.time_budget)
        assert self.config.epochs is not None
        return (self.batches_done + 0.5 * half_batch) / (self.config.epochs * self.source.batches)

    def _validate(self) -> dict[str, float]:
        attack = PgdAttack(self.config.validation_steps)
        found = evaluate(self.network, self.dataset.validation, self.threat, [attack], seed=self.config.seed)
        return {"validation_clean": found.clean, "validation_pgd": found.robust[attack.name]}

    def _is_best(self, record: dict[str, Any]) -> bool:
        key = {"robust": "validation_pgd", "clean": "validation_clean"}[self.method.selects_by]
        return self.best is None or record[key] >= self.best[key]

    def _first_kept(self, name: str) -> PerSample:
        train, threat = self.dataset.train, self.threat
        if name != "perturbation":
            return PerSample(torch.zeros(train.images.shape, device=self.device))
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.config.seed, 2))
        parts = torch.arange(len(train), device=self.device).split(4096)
        balls = (attacks.AdmissibleSet(train.x(part), threat.eps, threat.norm, threat.bounds) for part in parts)
        return PerSample(torch.cat([ball.uniform(generator) for ball in balls]))

    def _normalised(self, x: Tensor) -> Tensor:
        if self.threat.mean is None or self.threat.std is None:
            return x
        return (x - attacks.broadcast(self.threat.mean, x)) / attacks.broadcast(self.threat.std, x)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _open_folder(self) -> MetricsFile | None:
        if self.folder is None or not self.leads:
            return None
        metrics = MetricsFile(self.folder / "metrics.jsonl")
        write_json(
            self.folder / "run.json",
            {"config": dataclasses.asdict(self.config), "environment": environment(self.device)},
        )
        return metrics

    def _save(self, name: str) -> None:
        if self.folder is None or not self.leads:
            return
        save_checkpoint(
            self.folder / name,
            {
                "config": dataclasses.asdict(self.config),
                "model": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": self.epochs_done,
                "seconds": self.seconds,
                "validation": self.best,
            },
        )


def on_device(dataset: Dataset, device: torch.device) -> Dataset:
    """The data set with its splits on `device`."""
    splits = {name: getattr(dataset, name).to(device) for name in ("train", "validation", "test")}
    return dataclasses.replace(dataset, **splits)
