"""The command line: `yopo-ext train | evaluate | compare | export`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yopo_ext import __version__
from yopo_ext.training.cli.options import (
    Layout,
    Option,
    Parser,
    add_options,
    build,
    method_options,
    options_of,
    read_yaml,
)
from yopo_ext.training.config.method_options import check_method_name, declared_methods
from yopo_ext.training.config.schema import PRESETS, CompareConfig, EvaluateConfig, TrainConfig
from yopo_ext.training.nearest import nearest, unknown

Given = Mapping[str, Any]
Job = Callable[[], int]

UNFINISHED = 75  # exit status: stopped on request, to be run again with --resume auto
USER_ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Raises:
        SystemExit: for --help, and with status 2 for options that cannot be read.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given and not given[0].startswith("-") else None
    try:
        if command in COMMANDS:
            return _run(command, given[1:])
    except KeyboardInterrupt:  # also while PyTorch is loaded
        print(f"yopo-ext {command}: interrupted", file=sys.stderr)
        return 130
    if given and given[0] == "--version":
        print(
            f"yopo-ext {__version__} (torch {importlib.metadata.version('torch')}, Python {platform.python_version()})"
        )
        return 0
    if given and given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    what = f"there is no command {given[0]!r}{nearest(given[0], COMMANDS)}" if given else "which command?"
    print(f"yopo-ext: error: {what}; commands: {', '.join(COMMANDS)}; --help says more", file=sys.stderr)
    raise SystemExit(2)


def _run(name: str, arguments: Sequence[str]) -> int:
    command = COMMANDS[name]
    try:
        given = read(name, arguments)
        _load_pytorch(name)
        job = command.prepare(given)
        if given["dry_run"]:  # which constructs what the run would, and so meets the same errors
            return job()
    except USER_ERRORS as error:
        return _failed(name, error, 2)
    try:
        return job()
    except (OSError, FloatingPointError) as error:  # a full disk, a damaged image, weights that are not finite
        return _failed(name, error, 1)


def _load_pytorch(name: str) -> None:
    """Import it and say so: it takes seconds, and on a busy machine many."""
    if "torch" in sys.modules:
        return
    print(f"yopo-ext {name}: loading PyTorch", file=sys.stderr, flush=True)
    started = time.monotonic()
    import torch  # noqa: F401

    if (seconds := time.monotonic() - started) > 2.0:
        print(f"yopo-ext {name}: PyTorch loaded in {seconds:.0f} s; preparing", file=sys.stderr, flush=True)


def _failed(name: str, error: Exception, status: int) -> int:
    print(f"yopo-ext {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def make_parser(name: str) -> Parser:
    """The parser of one command; every option can also be set in a YAML file given as --config."""
    command = COMMANDS[name]
    parser = Parser(
        prog=f"yopo-ext {name}",
        usage=f"yopo-ext {name} {' '.join([*(p.upper() for p in command.positional), '[options]'])}",
        description=f"{command.about}\n\nNUMBER is a number or a fraction: 0.03, 8/255, 1e-3.",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
        formatter_class=Layout,
        allow_abbrev=False,
    )
    for positional, text in command.positional.items():
        parser.add_argument(positional, help=text)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with options of this command; the command line wins"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be run, how long and with how much memory"
    )
    add_options(parser, command.options())
    return parser


def read(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What was given on the command line and in the YAML file it names, by name.

    Raises:
        OSError, ValueError: for the file, or for a data set, a method or a checkpoint that does not exist.
        SystemExit: for the command line.
    """
    parser = make_parser(name)
    given = vars(parser.parse(arguments))
    if (path := given.pop("config")) is not None:
        given = {**read_yaml(Path(path), COMMANDS[name].options()), **given}
    if given.get("dataset", "digits") not in PRESETS:
        raise unknown("dataset", given["dataset"], PRESETS)
    for method in (given.get("method", "natural"), *given.get("methods", ())):
        check_method_name(method)
    if not Path(given.get("checkpoint", ".")).exists():
        raise FileNotFoundError(f"no checkpoint at {given['checkpoint']}")
    return given


def _train(given: Given) -> Job:
    from yopo_ext.training.cli.dry_run import planned
    from yopo_ext.training.config.resolve import resolve
    from yopo_ext.training.loop.saved_run import saved_run
    from yopo_ext.training.loop.trainer import Trainer
    from yopo_ext.training.run.deadline import Deadline

    names = {name for options in declared_methods().values() for name in options}
    config, method = resolve(build(TrainConfig, given), {n: value for n, value in given.items() if n in names})
    if given["dry_run"]:
        return planned([(config.method, config)], lambda: saved_run(config))
    if config.out is None:
        config.out = str(default_folder("train", config))
    trainer = Trainer(config)

    def job() -> int:
        deadline = Deadline(config.stop_after)
        with deadline.heeding_signals():
            result = trainer.fit(deadline)
        if result is None:
            return UNFINISHED
        if not trainer.leads:
            return 0
        print(
            f"{method.spec}: {result.seconds:.1f} s of training, {result.updates} updates, cost {method.cost()} units"
        )
        found = result.validation
        accuracies = ", ".join(
            f"{name.removeprefix('validation_')} {found[name]:.2f} %" for name in found if name != "epoch"
        )
        print(f"  the {config.select} weights, of epoch {found['epoch']:.0f}: {accuracies} on the validation split")
        print(f"  written to {config.out}")
        return 0

    return job


def _evaluate(given: Given) -> Job:
    from yopo_ext.training.evaluation.checkpoint_test import CheckpointTest
    from yopo_ext.training.run.deadline import Deadline

    test = CheckpointTest(config := build(EvaluateConfig, given))

    def job() -> int:
        if given["dry_run"]:
            print(test.describe())
            return 0
        deadline = Deadline()
        with deadline.heeding_signals():
            report = test.run(deadline)
        if report is None:
            print("stopped; the same command goes on from here" if config.out else "stopped", file=sys.stderr)
            return UNFINISHED
        print(report)
        return 0

    return job


def _export(given: Given) -> Job:
    import torch

    from yopo_ext.training.models import robustbench_model
    from yopo_ext.training.run.checkpoint import WRITTEN, load_checkpoint, tested_weights
    from yopo_ext.training.run.files import write_atomically

    state = load_checkpoint(Path(given["checkpoint"]))
    weights, target = tested_weights(state), Path(given["file"])
    taken = target.exists() and (target.name in WRITTEN or target.samefile(given["checkpoint"]))
    if target.is_dir() or taken:
        raise ValueError(f"file must name a new file, not a folder or a file of the run; got {str(target)!r}")

    def job() -> int:
        if not given["dry_run"]:
            write_atomically(target, lambda file: torch.save(weights, file))
        model, size = state["config"]["model"], sum(value.numel() for value in weights.values())
        print(f"{len(weights)} tensors, {size} numbers of {model}: {target}")
        if (theirs := robustbench_model(model, state["classes"])) is not None:
            print(f"robustbench.model_zoo.architectures.{theirs} loads them")
        if state["config"].get("mean"):
            print(f"their input is (pixels - {state['config']['mean']}) / {state['config']['std']}")
        return 0

    return job


def _compare(given: Given) -> Job:
    from yopo_ext.training.cli.dry_run import planned
    from yopo_ext.training.comparison.comparison import Comparison, plan
    from yopo_ext.training.comparison.report import finding, table
    from yopo_ext.training.run.deadline import Deadline

    train = build(TrainConfig, given)
    config = build(CompareConfig, given, train=train)
    if given["dry_run"]:
        runs = plan(config)
        return planned(runs, lambda: Comparison(config, shown=False), config.test_attacks, config.test_samples)
    if train.out is None:
        train.out = str(default_folder("compare", train))
    comparison = Comparison(config)

    def job() -> int:
        deadline = Deadline(train.stop_after)
        with deadline.heeding_signals():
            rows = comparison.run(deadline)
        if rows is None:
            return UNFINISHED
        print(f"{table(rows)}\n\n{finding(rows)}")
        print(f"Written to {train.out}: comparison.txt, comparison.json, accuracy-time.png, and every run's model.")
        if train.dataset != "imagefolder":
            name = sys.argv[0] if Path(sys.argv[0]).name == "yopo-ext" else "yopo-ext"
            print("The same on images of your own, in FOLDER/train/CLASS/ and FOLDER/test/CLASS/:")
            print(
                f"  {name} compare --dataset imagefolder --data-dir FOLDER --image-size 64 --epochs 5 --out runs/mine"
            )
        return 0

    return job


def default_folder(command: str, config: TrainConfig) -> Path:
    """A new folder under runs/: the first free number."""
    number = 1
    while (folder := Path("runs") / f"{command}-{config.dataset}-{number}").exists():
        number += 1
    return folder


@dataclass(frozen=True)
class Command:
    """One command: what it does, its options, and the function that prepares it; what it returns does it."""

    about: str
    prepare: Callable[[Given], Job]
    options: Callable[[], list[Option]]
    examples: Sequence[str]
    positional: Mapping[str, str] = dataclasses.field(default_factory=dict)


_CHECKPOINT = "model.pt or last.pt of a run"

COMMANDS: dict[str, Command] = {
    "train": Command(
        "Train one model with one method.",
        _train,
        lambda: [*options_of(TrainConfig), *method_options()],
        (
            "yopo-ext train --method yopo-5-3 --dataset digits --out runs/yopo",
            "yopo-ext train --method pgd-10 --dataset cifar10 --download --eps 8/255 --epochs 30 --resume auto --out runs/pgd",
        ),
    ),
    "evaluate": Command(
        "Attack a trained model.",
        _evaluate,
        lambda: options_of(EvaluateConfig, skip=("checkpoint",)),
        ("yopo-ext evaluate runs/yopo/model.pt --attacks pgd-20,apgd-ce --out runs/yopo/evaluation.json",),
        {"checkpoint": _CHECKPOINT},
    ),
    "compare": Command(
        "Train several methods alike and test them alike.",
        _compare,
        lambda: [*options_of(CompareConfig, skip=("train",)), *options_of(TrainConfig, skip=("method", "seed"))],
        ("yopo-ext compare --methods natural,pgd-10,yopo-5-3 --dataset digits --seeds 0,1,2 --out runs/compare",),
    ),
    "export": Command(
        "Write a trained model's weights as a plain state_dict, with the keys RobustBench uses.",
        _export,
        list,
        ("yopo-ext export runs/yopo/model.pt weights.pt",),
        {"checkpoint": _CHECKPOINT, "file": "where to write them, for torch.load"},
    ),
}


def _overview() -> str:
    lines = [f"  {name:<10}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: yopo-ext COMMAND [options]    yopo-ext COMMAND --help lists the options of a command",
            "",
            "Fast adversarial training of image classifiers.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  --version   the versions of this package, of PyTorch and of Python",
            "  --help      this text",
            "",
            "example:",
            f"  {COMMANDS['train'].examples[0]}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
