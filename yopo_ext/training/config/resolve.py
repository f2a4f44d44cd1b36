"""How defaults depend on data set and method, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal

import torch

from yopo_ext import validation
from yopo_ext.training import methods
from yopo_ext.training.config.schema import PRESETS, TrainConfig
from yopo_ext.training.data.datasets import load_dataset
from yopo_ext.training.data.splits import Dataset
from yopo_ext.training.methods import Method, ThreatModel
from yopo_ext.training.models import check_model_name
from yopo_ext.training.nearest import unknown
from yopo_ext.training.optim.schedules import make_schedule
from yopo_ext.training.run.metrics import require_tensorboard


def resolve(config: TrainConfig, method_options: dict[str, Any] | None = None) -> tuple[TrainConfig, Method]:
    """The configuration with every default filled in, and its method.

    Raises:
        ValueError, TypeError: naming the field, what it was and what is allowed.
    """
    if config.dataset not in PRESETS:
        raise unknown("dataset", config.dataset, PRESETS)
    preset = PRESETS[config.dataset]
    method = methods.parse(config.method, **(method_options or {}))
    defaults: dict[str, Any] = {
        "model": preset.model,
        "eps": preset.eps,
        "epochs": preset.epochs,
        "batch_size": preset.batch_size,
        "lr": preset.lr * method.lr_scale,
        "augment": preset.augment,
        "validate_every": preset.validate_every,
        "threads": preset.threads,
        "average": preset.average if config.ema is None else 0.0,
        "label_smoothing": preset.label_smoothing,
    }
    if config.time_budget is not None:
        if config.epochs is not None:
            raise ValueError(f"epochs must not be given with time_budget, which ends the run; got {config.epochs}")
        del defaults["epochs"]
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, method=method.spec, **missing)
    check(config)
    method.check(threat_model(config))
    return config, method


def check(config: TrainConfig) -> None:
    """Refuse values that no run could use."""
    hints = typing.get_type_hints(TrainConfig)
    for name, hint in hints.items():
        if typing.get_origin(hint) is Literal:
            validation.choice(name, getattr(config, name), typing.get_args(hint))
    device_for(config.accelerator)
    check_model_name(config.model)
    for name, low in (("epochs", 1), ("batch_size", 1), ("validate_every", 1), ("validation_steps", 1), ("devices", 1)):
        if name != "epochs" or config.time_budget is None:
            validation.integer(name, getattr(config, name), low)
    validation.integer("seed", config.seed, 0)
    for name in ("validation_size", "threads", "image_size"):
        if getattr(config, name) is not None:
            validation.integer(name, getattr(config, name), 1)
    if config.workers is not None:
        validation.integer("workers", config.workers, 0)
    threat_model(config)
    for name, lowest, limit in (
        ("lr", 0.0, float("inf")),
        ("momentum", 0.0, 1.0),
        ("weight_decay", 0.0, float("inf")),
        ("label_smoothing", 0.0, 1.0),
        ("average", 0.0, 1.0),
    ):
        value = getattr(config, name)
        if not lowest <= value < limit:
            raise ValueError(f"{name} must be in [{lowest:g}, {limit:g}); got {value}")
    if not 0.0 <= config.eps_warmup <= 1.0:
        raise ValueError(f"eps_warmup must be in [0, 1]; got {config.eps_warmup}")
    for name in ("time_budget", "stop_after", "clip", "save_every"):
        value = getattr(config, name)
        if value is not None and not value > 0.0:
            raise ValueError(f"{name} must be > 0; got {value}")
    if config.ema is not None and not 0.0 < config.ema < 1.0:
        raise ValueError(f"ema must be in (0, 1); got {config.ema}")
    if config.ema is not None and config.average:
        raise ValueError(f"average must be 0 with ema, which says how the weights are averaged; got {config.average}")
    if config.image_channels not in (None, 1, 3):
        raise ValueError(f"image_channels must be 1 or 3; got {config.image_channels}")
    if config.dataset != "imagefolder":
        for name in ("image_size", "image_channels", "workers"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} is for dataset 'imagefolder'; dataset is {config.dataset!r}")
    if config.precision == "16-mixed" and device_for(config.accelerator).type == "cpu":
        raise ValueError("precision must be 'auto', '32-true' or 'bf16-mixed' on a CPU; got '16-mixed'")
    if config.out is not None and (config.out == "" or Path(config.out).is_file()):
        raise ValueError(f"out must name a folder; got {config.out!r}")
    if config.resume == "auto" and config.out is None:
        raise ValueError("out must name a folder with resume='auto'; got None")
    if config.stop_after is not None and config.out is None:
        raise ValueError("out must name a folder with stop_after; got None")
    if config.tensorboard:
        require_tensorboard()
    make_schedule(config.schedule, config.milestones, config.warmup)


def device_for(accelerator: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for; ValueError for a GPU where there is none."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator must be 'auto' or 'cpu' where PyTorch finds no GPU; got 'cuda'")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


# What may change between the parts of an interrupted run.
CHANGEABLE = ("out", "data_dir", "download", "workers", "resume", "save_every", "tensorboard", "stop_after")


def require_same(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raise ValueError unless the configuration saved in the folder `config.out` leads to the same result as `config`."""
    changed = changed_options(saved, config)
    if changed:
        how = ", ".join(f"{name} was {then!r}, not {now!r}" for name, (then, now) in changed.items())
        raise ValueError(f"out must hold a run with the same configuration; in {config.out} {how}")


def changed_options(saved: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What the saved configuration and this one say of every option that a run keeps and in which they differ.

    An option that the saved configuration does not know has its default there.
    """
    defaults = dataclasses.asdict(TrainConfig())
    facts = ({**defaults, **saved}, dataclasses.asdict(config))
    then, now = (json.loads(json.dumps(fact)) for fact in facts)  # lists for tuples
    for name, unset in (("precision", "auto"), ("channels_last", None), ("compile", None)):
        if now[name] == unset:
            now[name] = then[name]  # a run keeps the mode that it chose
    if now["time_budget"] is not None:
        now["epochs"] = then["epochs"]  # runs with a time budget used to keep a number of epochs that ended nothing
    return {name: (then[name], now[name]) for name in now if name not in CHANGEABLE and then[name] != now[name]}


def check_channels(config: TrainConfig, channels: int) -> None:
    """Raise ValueError if the normalisation is not for images of so many channels."""
    if len(config.mean) not in (0, 1, channels):
        raise ValueError(f"mean must have one value or one per channel ({channels}); got {list(config.mean)}")


def threat_model(config: TrainConfig) -> ThreatModel:
    """The threat model of a resolved configuration."""
    assert config.eps is not None
    if len(config.mean) != len(config.std):
        raise ValueError(f"mean and std must have the same length; got {list(config.mean)} and {list(config.std)}")
    if not all(value > 0.0 for value in config.std):
        raise ValueError(f"std must be > 0; got {list(config.std)}")
    threat = ThreatModel(config.eps, norm=config.norm, mean=config.mean or None, std=config.std or None)
    threat.around(torch.empty(0, 1, 1, 1))  # which checks it
    return threat


def dataset_of(config: TrainConfig) -> Dataset:
    """The data set that a configuration names."""
    return load_dataset(
        config.dataset,
        config.data_dir,
        download=config.download,
        validation=config.validation_size,
        image_size=config.image_size,
        workers=config.workers,
        image_channels=config.image_channels,
    )
