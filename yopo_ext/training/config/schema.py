"""What a user may configure, typed, and the defaults of every data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from yopo_ext.training.attacks.suites import SUITES
from yopo_ext.training.config.method_options import declared_methods
from yopo_ext.training.option import option

# The headings of `--help`, in its order.
GROUPS: dict[str, str] = {
    "data": "what is learnt from",
    "model": "the network",
    "method": "how it is made robust, and against what",
    "optimisation": "how long and how fast it learns",
    "speed": "how the machine computes",
    "run": "its seed, its folder, what it writes and selects",
}


@dataclass(frozen=True)
class Preset:
    """Defaults of a data set: a comparison should not need a configuration file."""

    model: str
    eps: float
    epochs: int
    batch_size: int
    lr: float
    augment: bool = False
    validate_every: int = 1
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    average: float = 0.0
    label_smoothing: float = 0.0


# Averaged weights and smoothed labels change the robust accuracy of every method by more than the methods differ, so they
# are the same for all: 0.05 of the run is what a decay of 0.9995 spans in 100 epochs of CIFAR in batches of 128.
_TAIL: dict[str, Any] = {"average": 0.05, "label_smoothing": 0.4}

PRESETS: dict[str, Preset] = {
    # One thread: networks this small gain little from a second one, and lose much on a machine with other work.
    "digits": Preset("digits-cnn", eps=0.15, epochs=15, batch_size=32, lr=0.1, validate_every=2, threads=1),
    "mnist": Preset("smallcnn", eps=0.3, epochs=10, batch_size=128, lr=0.05),
    "fashion-mnist": Preset("smallcnn", eps=0.1, epochs=10, batch_size=128, lr=0.05),
    # No mirror image and no crop for digits in the street: a mirrored 2 is no digit.
    "svhn": Preset("preactresnet18", eps=8 / 255, epochs=30, batch_size=128, lr=0.05),
    "cifar10": Preset("preactresnet18", eps=8 / 255, epochs=30, batch_size=128, lr=0.2, augment=True, **_TAIL),
    "cifar100": Preset("preactresnet18", eps=8 / 255, epochs=30, batch_size=128, lr=0.2, augment=True, **_TAIL),
    "imagefolder": Preset("torchvision/resnet18", eps=4 / 255, epochs=30, batch_size=128, lr=0.1, augment=True),
}


@dataclass
class TrainConfig:
    """One training run. None means: the default of the data set (`PRESETS`); for lr, scaled by the method."""

    method: str = option(
        "yopo-5-3",
        f"training method, with its numbers (pgd-10, yopo-5-3) or options (yopo:persist): {', '.join(declared_methods())}",
        group="method",
    )
    dataset: str = option("digits", f"data set: {', '.join(PRESETS)}", group="data")
    data_dir: str = option("data", "folder that holds or receives data sets", group="data", metavar="FOLDER")
    download: bool = option(False, "download the data set if it is not in the folder", group="data")
    image_size: int | None = option(
        None, "imagefolder: pixels that images are resized and cropped to (default: 224)", group="data"
    )
    image_channels: int | None = option(
        None,
        "imagefolder: 1 for grey images, 3 for colour; files of the other kind are converted (default: 3)",
        group="data",
    )
    workers: int | None = option(
        None,
        "imagefolder: leave the images in their files, and decode them in so many processes (default: in memory)",
        group="data",
    )
    model: str | None = option(
        None,
        "digits-cnn, smallcnn, preactresnet18, resnet18, wrn-DEPTH-WIDTH, timm/NAME, torchvision/NAME",
        group="model",
    )
    eps: float | None = option(None, "radius of the ball of perturbations, for pixels in [0, 1]", group="method")
    norm: Literal["linf", "l2"] = option("linf", "norm of the ball", group="method")
    mean: tuple[float, ...] = option(
        (), "the model gets (pixels - mean) / std, per channel; eps stays in pixel units", group="model"
    )
    std: tuple[float, ...] = option((), "see mean", group="model")
    seed: int = option(0, "seed of weights, batch order and attacks")
    out: str | None = option(
        None,
        "folder for checkpoints and metrics (default: a new one under runs); a finished or foreign run in it is never touched",
        metavar="FOLDER",
    )
    epochs: int | None = option(None, "passes over the training data", group="optimisation")
    time_budget: float | None = option(None, "seconds of training, instead of epochs", group="optimisation")
    batch_size: int | None = option(None, "samples per weight update and process", group="optimisation")
    lr: float | None = option(
        None, "highest learning rate; for some methods, times a factor of their own", group="optimisation"
    )
    momentum: float = option(0.9, "SGD momentum", group="optimisation")
    weight_decay: float = option(5e-4, "L2 penalty, on every parameter", group="optimisation")
    schedule: Literal["triangular", "cosine", "one-cycle", "piecewise", "constant"] = option(
        "triangular", "learning rate over the run", group="optimisation"
    )
    milestones: tuple[float, ...] = option(
        (), "piecewise schedule: fractions of the run, comma separated", group="optimisation"
    )
    warmup: float = option(
        0.0, "fraction of the run over which the learning rate also rises from 0", group="optimisation"
    )
    eps_warmup: float = option(
        0.0,
        "fraction of the run over which eps rises from 0, and with it every step size that is not given",
        group="method",
    )
    clip: float | None = option(None, "largest gradient norm", group="optimisation")
    average: float | None = option(
        None,
        "fraction of the updates so far that the averaged weights, which are then the result, span; 0: no average",
        group="optimisation",
    )
    ema: float | None = option(
        None, "constant decay of a moving average of the weights, instead of average", group="optimisation"
    )
    label_smoothing: float | None = option(None, "label smoothing of the training loss", group="optimisation")
    augment: bool | None = option(None, "random crop and flip", group="data")
    validation_size: int | None = option(
        None, "training samples held out for validation (default: 180 of digits, 2000 of the others)", group="data"
    )
    validate_every: int | None = option(None, "epochs between validations")
    validation_steps: int = option(10, "PGD steps of the validation attack")
    select: Literal["best", "last"] = option("best", "which checkpoint is the result: best on validation, or last")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = option(
        "auto",
        "arithmetic of training; auto: fp32, or in longer runs what a rehearsal of a few steps shows to be faster and as exact; "
        "validation and evaluation are always in fp32",
        group="speed",
    )
    accelerator: Literal["auto", "cpu", "cuda"] = option(
        "auto", "where to run; auto: a GPU if there is one", group="speed"
    )
    devices: int = option(1, "processes, one per device", group="speed")
    compile: bool | None = option(
        None, "torch.compile the model (default: where a rehearsal shows that a long run gains by it)", group="speed"
    )
    channels_last: bool | None = option(
        None, "channels_last memory format (default: where a rehearsal shows it to be faster)", group="speed"
    )
    threads: int | None = option(None, "CPU threads", group="speed")
    resume: Literal["never", "auto"] = option(
        "never", "auto: go on with the run that the folder holds, if it holds one"
    )
    save_every: float = option(300.0, "seconds between checkpoints inside an epoch")
    tensorboard: bool = option(False, "write the epochs' records as TensorBoard event files, too")
    stop_after: float | None = option(None, "save and leave after so many seconds, to go on later with --resume auto")


@dataclass
class EvaluateConfig:
    """Attacks on a trained model."""

    checkpoint: str = option("", "model.pt or last.pt of a run")
    suite: Literal["quick", "standard", "full"] = option(
        "quick", "which attacks: " + "; ".join(f"{name}: {', '.join(tried)}" for name, tried in SUITES.items())
    )
    attacks: tuple[str, ...] | None = option(
        None,
        "attacks instead of a suite, comma separated: pgd-STEPS[-RESTARTS][:STEP_SIZE] or cw-... (margin loss), apgd-ce, "
        "apgd-t, square, autoattack; with @1000 after it: on the first 1000 images only",
    )
    survivors_only: bool = option(
        False, "try each attack only on the images that those before it have left: the same worst case for less time"
    )
    split: Literal["test", "validation"] = option("test", "which split to attack")
    samples: int | None = option(None, "only the first so many samples")
    seed: int = option(0, "seed of the attacks' random starts")
    data_dir: str | None = option(None, "folder of the data set, if not the one used in training", metavar="FOLDER")
    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "where to run; auto: a GPU if there is one")
    out: str | None = option(None, "JSON file for the result", metavar="FILE")
    save_images: str | None = option(
        None, "folder for the attacked images, as PNG files of 8 bits that are still inside the ball", metavar="FOLDER"
    )


@dataclass
class CompareConfig:
    """Several methods trained and tested alike."""

    methods: tuple[str, ...] = option(
        (
            "natural",
            "fgsm-rs",
            "yopo-2-3:train-on=last:persist",
            "yopo-3-2:update-every=pass:persist",
            "yopo-5-3",
            "pgd-10",
        ),
        "methods, comma separated, written as for train --method",
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds, comma separated: each method is trained once with each")
    test_attacks: tuple[str, ...] = option(
        ("pgd-20", "apgd-ce", "apgd-t"),
        "attacks on the test split, comma separated, written as for evaluate --attacks; each is tried on the images that "
        "those before it have left",
    )
    test_samples: int | None = option(None, "only the first so many test samples")
    train: TrainConfig = field(default_factory=TrainConfig)

    def test(self) -> dict[str, Any]:
        """What is tried on every trained model, JSON-ready."""
        return {"attacks": list(self.test_attacks), "samples": self.test_samples, "survivors_only": True}
