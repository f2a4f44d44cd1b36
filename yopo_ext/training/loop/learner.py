"""The model under training and everything that is done to it: passes, attacks, weight updates, averaging, its state."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from yopo_ext import attacks
from yopo_ext.threat import broadcast
from yopo_ext.training.config.resolve import check_channels, threat_model
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.batches import Batch, PerSample
from yopo_ext.training.data.splits import Dataset
from yopo_ext.training.loop.position import DivergedError
from yopo_ext.training.methods import Method, Outcome, Start, ThreatModel
from yopo_ext.training.models import build_model
from yopo_ext.training.run.seeds import mix_seed

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class FabricLearner:
    """Implements `methods.Learner` on Lightning Fabric."""

    def __init__(self, config: TrainConfig, method: Method, dataset: Dataset, fabric: Fabric) -> None:
        assert config.model is not None
        assert config.lr is not None
        self.config, self.method, self.dataset, self.fabric = config, method, dataset, fabric
        self.device = fabric.device
        self.threat, self.classes = threat_model(config), dataset.classes
        check_channels(config, dataset.shape[0])
        torch.manual_seed(mix_seed(config.seed))
        self.module, self.first_layer = build_model(config.model, dataset.shape, dataset.classes)
        self.module.train()
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.module.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer: Any = torch.optim.SGD(
            self.module.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        wrapped, self.optimizer = fabric.setup(self.module, self.optimizer)
        # Fabric's wrapper hides DDP's no_sync and refuses input gradients under mixed precision: use what it wraps.
        self.replica: nn.Module = wrapped._forward_module
        self.network: nn.Module = self.module
        if config.compile:
            self.network = torch.compile(self.module)  # type: ignore[assignment]
            self.replica = self.network if self.replica is self.module else torch.compile(self.replica)  # type: ignore[assignment]
        self.average: AveragedModel | None = None
        if config.ema is not None or config.average:
            # Buffers too: BatchNorm's statistics must be those of the averaged weights, not of the last ones.
            self.average = AveragedModel(self.module, multi_avg_fn=self._follow, use_buffers=True)
        self.generator = torch.Generator(self.device)
        # The ball grows in the eps warm-up; what is kept of the samples starts inside the first one, which is a point.
        first = dataclasses.replace(self.threat, eps=0.0) if config.eps_warmup else self.threat
        self.kept = {n: PerSample(self._start(start, 0, first), method.frame) for n, start in method.keeps.items()}
        self.carried: dict[str, Tensor] = {}
        self.processes: list[Any] = []  # what each process has for itself, as of the last `collect`
        self.updates = 0
        self.progress = 0.0
        self.inputs: list[Tensor] = []
        if method.watches_inputs:
            self.replica.register_forward_pre_hook(lambda _, arguments: self.inputs.append(arguments[0].detach()))

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.replica(self._normalised(x)).float()

    def predict(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.network(self._normalised(x)).float()

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        assert self.config.label_smoothing is not None
        return F.cross_entropy(logits.float(), y, label_smoothing=self.config.label_smoothing)

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def update(self) -> None:
        if self.config.clip is not None:
            # fp16's scaler meets overflows as a matter of course, and skips their updates.
            scaled = self.config.precision == "16-mixed"
            try:
                self.fabric.clip_gradients(
                    self.module, self.optimizer, max_norm=self.config.clip, error_if_nonfinite=not scaled
                )
            except RuntimeError as error:
                if "non-finite" not in str(error):
                    raise
                raise DivergedError("gradients are not finite") from error
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.average is not None:
            self.average.update_parameters(self.module)

    def _follow(self, averaged: Any, current: Any, number: Any) -> None:
        """The average with the weights of update t: w <- w + (theta_t - w) / (1 + c t), or with the constant decay.

        A weight of 1 / (1 + c t) spans a fraction c of the updates so far: it needs no warm-up, in which the first weights
        would weigh too much, and it does not have to know how many updates will follow.
        """
        decay = self.config.ema
        if decay is None:
            assert self.config.average is not None
            decay = 1.0 - 1.0 / (1.0 + self.config.average * self.updates)
        get_ema_multi_avg_fn(decay)(averaged, current, number)

    def attack(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        options = {**dataclasses.asdict(self.threat), "generator": self.generator, **options}
        with self.autocast():
            return attacks.pgd(self.network, x, y, **options).perturbation

    def autocast(self) -> AbstractContextManager[Any]:
        return self.fabric.autocast()

    def step(self, batch: Batch, number: int, lr: float) -> Outcome:
        """Train on one batch. Its random numbers depend on the seed, the process and `number` alone.

        So a run that is taken up again at any batch goes on as if it had never stopped, without saved generators.
        """
        seed = mix_seed(self.config.seed, self.fabric.global_rank, number, 1)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if batch.number == 0 and self.method.restarts(batch.epoch):
            for name, start in self.method.keeps.items():
                self.kept[name].values.copy_(self._start(start, batch.epoch, self.threat))
        self.inputs.clear()
        if self.config.channels_last:
            batch = dataclasses.replace(batch, x=batch.x.contiguous(memory_format=self.memory_format))
        return self.method.train(self, batch)

    def rehearse(self, batch: Batch) -> None:
        """Take two steps that leave no trace: what torch.compile compiles, it compiles here.

        Two, because the first pass of a YOPO step runs uncompiled once per process. Each process must call it.
        """
        self.collect()
        before = copy.deepcopy(self.state_dict())
        for _ in range(2):
            self.step(batch, 0, lr=0.0)
        self.load_state_dict(before)

    @property
    def result(self) -> nn.Module:
        """The model to test: the averaged one if there is one. Neither compiled nor wrapped."""
        return self.module if self.average is None else self.average.module

    def synchronise(self) -> None:
        """Give every process the buffers (BatchNorm's statistics) of the first: each has seen its own samples only."""
        if self.fabric.world_size > 1:
            for buffer in self._buffers().values():
                torch.distributed.broadcast(buffer, src=0)

    def collect(self) -> None:
        """Gather for `state_dict` what only its own process knows; each of them must call it."""
        own = {
            "buffers": {name: buffer.cpu() for name, buffer in self._buffers().items()},
            "carried": {name: value.cpu() for name, value in self.carried.items()},
        }
        self.processes = [own] * self.fabric.world_size
        if self.fabric.world_size == 1:
            return
        torch.distributed.all_gather_object(self.processes, own)
        mine = torch.zeros(len(self.dataset.train), dtype=torch.bool, device=self.device)
        mine[self.fabric.global_rank :: self.fabric.world_size] = True
        for kept in self.kept.values():
            kept.values[~mine] = 0.0
            torch.distributed.all_reduce(kept.values)

    def _buffers(self) -> dict[str, Tensor]:
        average = {} if self.average is None else dict(self.average.module.named_buffers(prefix="average"))
        return {**dict(self.module.named_buffers()), **average}

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, tensors and plain values only, as of the last `collect`."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "kept": {name: kept.values for name, kept in self.kept.items()},
            "processes": self.processes,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name, kept in self.kept.items():
            kept.values.copy_(state["kept"][name])
        own = state["processes"][self.fabric.global_rank]
        for name, buffer in self._buffers().items():
            buffer.copy_(own["buffers"][name])
        self.carried = {name: value.to(self.device) for name, value in own["carried"].items()}
        self.updates = state["updates"]

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all weights and statistics are, those of the averaged model too."""
        state = {**self.module.state_dict(), **{f"average.{n}": v for n, v in self.result.state_dict().items()}}
        return all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())

    def _start(self, start: Start, epoch: int, threat: ThreatModel) -> Tensor:
        """The first values of what is kept of every sample, [N, C, H, W], when it starts with this epoch."""
        train = self.dataset.train
        if start == "zero":
            return torch.zeros(train.images.shape, device=self.device)
        seed = mix_seed(self.config.seed, 2, *([epoch] if epoch else []))
        generator = torch.Generator(self.device).manual_seed(seed)
        if start == "corners":
            draw = torch.rand(train.images.shape, device=self.device, generator=generator)
            return torch.where(draw < 0.5, -threat.eps, threat.eps)
        parts = train.stream(torch.arange(len(train), device=self.device).split(4096))
        balls = (threat.around(x) for x in parts)
        return torch.cat([ball.uniform(generator) for ball in balls])

    def _normalised(self, x: Tensor) -> Tensor:
        if self.threat.mean is None or self.threat.std is None:
            return x
        return (x - broadcast(self.threat.mean, x)) / broadcast(self.threat.std, x)
