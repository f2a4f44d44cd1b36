"""The mode of a run: what `--precision auto`, and layout and compilation that are not given, come to."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from yopo_ext.model_state import evaluating
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.batches import SplitSource
from yopo_ext.training.data.splits import Dataset
from yopo_ext.training.loop.learner import FabricLearner
from yopo_ext.training.loop.rehearsal import Mode, Step, Trial, _flat, best, modes_to_try, report, run_trials
from yopo_ext.training.methods import Method
from yopo_ext.training.models import build_model
from yopo_ext.training.run.environment import processor
from yopo_ext.training.run.files import read_json

# Runs with less to compute stay in fp32 without a rehearsal, which would cost about what it saves. Counted, not timed: the same
# run must not be computed otherwise on a busy day.
SHORT_RUN = {"cpu": 1e13, "cuda": 1e15}  # floating-point operations: minutes of one core, seconds of a GPU
SHORT_BUDGET = 120.0  # seconds, for runs with a time budget
WORTH_COMPILING = 2400.0  # seconds of the run: compiling takes about a minute
CPU_BATCH = 16  # images of a rehearsed step: what they gain or lose by a mode, more of them do too


def is_open(config: TrainConfig) -> bool:
    """Whether there is something to choose."""
    return config.precision == "auto" or config.channels_last is None or config.compile is None


def plainly(config: TrainConfig) -> TrainConfig:
    """The configuration with fp32, contiguous and not compiled where nothing is given."""
    return with_mode(config, Mode())


def with_mode(config: TrainConfig, mode: Mode) -> TrainConfig:
    """The configuration with this mode where nothing is given."""
    return dataclasses.replace(
        config,
        precision=mode.precision if config.precision == "auto" else config.precision,
        channels_last=mode.channels_last if config.channels_last is None else config.channels_last,
        compile=mode.compile if config.compile is None else config.compile,
    )


def kept(config: TrainConfig, saved: dict[str, Any], device: torch.device, *, shown: bool) -> TrainConfig:
    """The configuration with the mode of the saved run where nothing is given; said if this is another machine."""
    found = with_mode(config, Mode(saved["precision"], saved["channels_last"], saved["compile"]))
    if found.precision == "16-mixed" and device.type == "cpu":
        raise ValueError(f"accelerator must be one with a GPU: the run in {config.out} computes in 16-mixed")
    facts = read_json(Path(str(config.out)) / "run.json").get("environment", {})
    there, here = facts.get("gpu") or facts.get("cpu"), processor(device)
    if shown and is_open(config) and there not in (None, here):
        mode = Mode(found.precision, found.channels_last, found.compile)  # type: ignore[arg-type]
        print(f"this machine ({here}) is not the one the run began on ({there}); it keeps {mode}", file=sys.stderr)
    return found


def operations(config: TrainConfig, method: Method, dataset: Dataset) -> float:
    """Floating-point operations of the whole run: those of one image's forward pass, times passes and images."""
    with torch.random.fork_rng([]), FlopCounterMode(display=False) as counter:
        model, _ = build_model(str(config.model), dataset.shape, dataset.classes)
        counter.flop_counts.clear()  # building runs a forward pass as a check
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, *dataset.shape))
    return counter.get_total_flops() * method.cost().total * len(dataset.train) * (config.epochs or 0)


def choose_mode(
    config: TrainConfig, method: Method, dataset: Dataset, device: torch.device, *, shown: bool
) -> TrainConfig:
    """The configuration with the fastest mode where nothing is given, from a rehearsal on this process. Leaves no trace."""
    budget = config.time_budget
    if budget is not None and budget < SHORT_BUDGET:
        return plainly(config)
    if budget is None and operations(config, method, dataset) < SHORT_RUN[device.type]:
        return plainly(config)
    size = min(config.batch_size or 1, CPU_BATCH) if device.type == "cpu" else config.batch_size or 1
    few = dataclasses.replace(dataset, train=dataset.train.first(size))
    tried = dataclasses.replace(config, devices=1, batch_size=size, out=None, resume="never")
    network, _ = build_model(str(config.model), dataset.shape, dataset.classes)
    convolutional = any(isinstance(module, nn.Conv2d) for module in network.modules())
    precision: Any = None if config.precision == "auto" else config.precision
    modes = modes_to_try(device, precision, config.channels_last, convolutional=convolutional)
    if config.compile:
        modes = [dataclasses.replace(mode, compile=True) for mode in modes]
    trials = _trials(modes, tried, method, few, device, shown)
    chosen = best(trials)
    share = size * (1 if config.devices == 1 else config.devices)
    left = budget or chosen.typical * len(dataset.train) / share * (config.epochs or 0)
    if config.compile is None and left >= WORTH_COMPILING:
        compiled = dataclasses.replace(chosen.mode, compile=True)
        pair = _trials([chosen.mode, compiled], tried, method, few, device, shown)
        trials = [*trials, pair[1]]
        chosen = pair[1] if best(pair) is pair[1] else chosen
    if shown:
        print("\n".join(report(trials, chosen, f"rehearsal with {size} images a step")), file=sys.stderr, flush=True)
    return with_mode(config, chosen.mode)


def _trials(
    modes: list[Mode], config: TrainConfig, method: Method, few: Dataset, device: torch.device, shown: bool
) -> list[Trial]:
    from lightning_fabric import Fabric  # after `make_fabric`, which makes sure that it can be imported

    def build(mode: Mode) -> Step:
        fixed = with_mode(dataclasses.replace(config, precision="auto", channels_last=None, compile=None), mode)
        fabric = Fabric(accelerator=device.type, devices=1, precision=mode.precision)
        learner = FabricLearner(fixed, method, few, fabric)
        batch = next(SplitSource(few.train, len(few.train), seed=config.seed).epoch(0))
        gradients: list[Tensor] = []
        update = learner.update

        def recording() -> None:
            if not gradients:
                gradients.append(_flat(parameter.grad for parameter in learner.module.parameters()))
            update()

        learner.update = recording  # type: ignore[method-assign]

        def run() -> tuple[float, Tensor]:
            gradients.clear()
            loss = learner.step(batch, 0, lr=0.0).loss
            return float(loss), gradients[0]

        return run

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return run_trials([(mode, partial(build, mode)) for mode in modes], device, shown=shown)
