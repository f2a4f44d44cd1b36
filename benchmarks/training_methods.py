"""Seconds of one weight update of every method, by the recipe of CIFAR-10 on one CPU core, interleaved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import yaml

from yopo_ext.training import methods
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.splits import Dataset, Split
from yopo_ext.training.loop.trainer import Trainer

RECIPE = Path(__file__).parent.parent / "recipes" / "cifar10-small.yaml"
KEPT = "yopo-2-1:train-on=last:persist:step-size=8/255"
METHODS = ("natural", "fgsm-rs", "n-fgsm", "fgsm-rs-cs", "fgsm-pgi", "liet", KEPT, f"{KEPT}:gradient=full", "pgd-10")
IMAGES = 2560  # twenty batches; an update takes as long for any images


def random_images() -> Dataset:
    """Images of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (IMAGES,), generator=generator), 255)
    return Dataset("random", 10, split, split, split)


def updates(method: str, dataset: Dataset) -> Callable[[], None]:
    """A function that trains on the next batch, its augmentation included."""
    settings = yaml.safe_load(RECIPE.read_text()) | {"method": method, "epochs": 1, "lr": 1e-3, "eps": 8 / 255}
    trainer = Trainer(
        TrainConfig(**settings | {"weight_decay": float(settings["weight_decay"])}), dataset=dataset, shown=False
    )
    trainer.learner.module.train()
    place = {"number": 0}
    batches = iter(())

    def update() -> None:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(trainer.source.epoch(0))
            batch = next(batches)
        trainer.learner.step(batch, place["number"], 1e-3)
        place["number"] += 1

    return update


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0], seconds=120.0)
    dataset = random_images()
    chosen = [method for method in METHODS if options.only in method]
    functions = {method: updates(method, dataset) for method in chosen}
    if options.threads:
        torch.set_num_threads(options.threads)
    times = measure.interleaved(functions, options.seconds)
    results: list[dict[str, Any]] = []
    for method in chosen:
        parsed = methods.parse(method)
        found = measure.summary(times[method])
        results.append({"method": parsed.spec, "units": parsed.cost().total, **found})
        print(f"{parsed.spec}: {found['ms']:.1f} ms, {found['ms'] / parsed.cost().total:.2f} ms per unit", flush=True)
    measure.save("training_methods_cpu", {"environment": measure.environment(), "cases": results}, options.out)


if __name__ == "__main__":
    main()
