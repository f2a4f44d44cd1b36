"""Lightning Fabric, set up for a run."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.torchvision_import import import_torchvision

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(config: TrainConfig) -> Fabric:
    """A launched Fabric for the configuration's accelerator, devices and precision.

    Raises:
        ModuleNotFoundError: the training extra is not installed.
        ValueError: a launcher started another number of processes than `devices`.
    """
    started = int(os.environ.get("WORLD_SIZE", config.devices))
    if started != config.devices:
        raise ValueError(f"devices must be the number of processes that were started, {started}; got {config.devices}")
    import_torchvision(required=False)  # Fabric may import it by way of torchmetrics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    # Buffers are not sent around before each forward: that would change them between the two forwards of TRADES, before
    # its one backward. `FabricLearner.synchronise` makes them equal where it matters.
    strategy = DDPStrategy(broadcast_buffers=False) if config.devices > 1 else "auto"
    precision = "32-true" if config.precision == "auto" else config.precision  # until a rehearsal has chosen
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=precision, strategy=strategy)
    fabric.launch()
    return fabric
