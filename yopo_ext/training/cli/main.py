"""The command line: `yopo-ext train | evaluate | compare | export`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from yopo_ext.training import methods
from yopo_ext.training.cli.options import add_option, add_options, build, hint_of, plain
from yopo_ext.training.config.resolve import resolve
from yopo_ext.training.config.schema import CompareConfig, EvaluateConfig, TrainConfig
from yopo_ext.training.run.deadline import Deadline

Job = Callable[[], int]

UNFINISHED = 75  # exit status: stopped on request, to be run again with --resume auto


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = make_parser()
    given = parser.parse_args(None if arguments is None else list(arguments))
    command = given.subcommand
    prepare = {"train": _train, "evaluate": _evaluate, "compare": _compare, "export": _export}[command]
    try:
        job = prepare(given[command])
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"yopo-ext {command}: error: {error}", file=sys.stderr)
        return 2
    try:
        return job()
    except (OSError, FloatingPointError) as error:  # a full disk, a damaged image, weights that are not finite
        print(f"yopo-ext {command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"yopo-ext {command}: interrupted", file=sys.stderr)
        return 130


def make_parser() -> ArgumentParser:
    """All commands with all their options; every option can also be set in a YAML file given as --config."""
    parser = ArgumentParser(
        prog="yopo-ext", description="Fast adversarial training of image classifiers.", allow_abbrev=False
    )
    commands = parser.add_subcommands(required=True)

    train = _command("Train one model with one method.")
    add_options(train, TrainConfig)
    for name, field in methods.option_fields().items():
        users = ", ".join(m for m, cls in methods.METHODS.items() if name in {f.name for f in dataclasses.fields(cls)})
        add_option(train, field, hint_of(field), default=None, note=f" [{users}]")
    commands.add_subcommand("train", train, help="train one model")

    evaluate = _command("Attack a trained model.")
    evaluate.add_argument("checkpoint", type=str, help="model.pt or last.pt of a run")
    add_options(evaluate, EvaluateConfig, skip=("checkpoint",))
    commands.add_subcommand("evaluate", evaluate, help="attack a trained model")

    export = _command("Write a trained model's weights as a plain state_dict, with the keys RobustBench uses.")
    export.add_argument("checkpoint", type=str, help="model.pt or last.pt of a run")
    export.add_argument("file", type=str, help="where to write them, for torch.load")
    commands.add_subcommand("export", export, help="write a state_dict")

    compare = _command("Train several methods alike and test them alike.")
    add_options(compare, CompareConfig, skip=("train",))
    add_options(compare, TrainConfig, skip=("method", "seed"))
    commands.add_subcommand("compare", compare, help="compare training methods")
    return parser


def _command(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, usage="%(prog)s [options]; --help lists them", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with options of this command")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be run, how long and with how much memory"
    )
    return parser


def _train(given: Namespace) -> Job:
    from yopo_ext.training.loop.trainer import Trainer

    names = methods.option_fields()
    options = {name: plain(given[name]) for name in names if given[name] is not None}
    config, method = resolve(build(TrainConfig, given), options)
    if given.dry_run:
        return _plan([(config.method, config)])
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


def _evaluate(given: Namespace) -> Job:
    from yopo_ext.training.evaluation.checkpoint_test import CheckpointTest

    config = build(EvaluateConfig, given, skip=("checkpoint",))
    config.checkpoint = given.checkpoint
    test = CheckpointTest(config)

    def job() -> int:
        if given.dry_run:
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


def _export(given: Namespace) -> Job:
    from yopo_ext.training.models import robustbench_model
    from yopo_ext.training.run.checkpoint import WRITTEN, load_checkpoint, tested_weights
    from yopo_ext.training.run.files import write_atomically

    state = load_checkpoint(Path(given.checkpoint))
    weights, target = tested_weights(state), Path(given.file)
    taken = target.exists() and (target.name in WRITTEN or target.samefile(given.checkpoint))
    if target.is_dir() or taken:
        raise ValueError(f"file must name a new file, not a folder or a file of the run; got {given.file!r}")

    def job() -> int:
        if not given.dry_run:
            write_atomically(target, lambda file: torch.save(weights, file))
        model, size = state["config"]["model"], sum(value.numel() for value in weights.values())
        print(f"{len(weights)} tensors, {size} numbers of {model}: {target}")
        if (theirs := robustbench_model(model, state["classes"])) is not None:
            print(f"robustbench.model_zoo.architectures.{theirs} loads them")
        if state["config"].get("mean"):
            print(f"their input is (pixels - {state['config']['mean']}) / {state['config']['std']}")
        return 0

    return job


def _compare(given: Namespace) -> Job:
    from yopo_ext.training.comparison.comparison import Comparison, plan
    from yopo_ext.training.comparison.report import finding, table

    train = TrainConfig(**dataclasses.asdict(build(TrainConfig, given, skip=("method", "seed"))))
    config = dataclasses.replace(build(CompareConfig, given, skip=("train",)), train=train)
    if given.dry_run:
        return _plan(plan(config), config.test_attacks, config.test_samples)
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


def _plan(
    runs: Sequence[tuple[str, TrainConfig]], test_attacks: Sequence[str] = (), test_samples: int | None = None
) -> Job:
    from yopo_ext.training.attacks.registry import parse_attacks
    from yopo_ext.training.cli.dry_run import Estimate, estimate
    from yopo_ext.training.config.resolve import dataset_of
    from yopo_ext.training.run.progress import duration

    dataset = dataset_of(runs[0][1])
    attacks = parse_attacks(test_attacks) if test_attacks else []

    def job() -> int:
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


if __name__ == "__main__":
    sys.exit(main())
