"""The command line: `yopo-ext train | evaluate | compare | export`."""

from __future__ import annotations

import dataclasses
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import register_type

from yopo_ext.training import methods
from yopo_ext.training.config import CompareConfig, EvaluateConfig, TrainConfig, resolve
from yopo_ext.training.numbers import parse_number

Job = Callable[[], int]

UNFINISHED = 75  # exit status: stopped on request, to be run again with --resume auto


class Number(float):
    """A number or a fraction."""


class Texts(tuple[str, ...]):
    """Texts, comma separated."""


class Numbers(tuple[float, ...]):
    """Numbers or fractions, comma separated."""


class Integers(tuple[int, ...]):
    """Integers, comma separated."""


def _separated(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, int | float):
        return [value]
    if not isinstance(value, Sequence):
        raise ValueError(f"must be a list or comma separated; got {value!r}")
    return list(value)


# (type in a configuration, type on the command line, text -> value)
OPTION_TYPES: tuple[tuple[Any, type[Any], Callable[[Any], Any]], ...] = (
    (float, Number, lambda value: Number(parse_number(value))),
    (tuple[str, ...], Texts, lambda value: Texts(map(str, _separated(value)))),
    (tuple[float, ...], Numbers, lambda value: Numbers(map(parse_number, _separated(value)))),
    (tuple[int, ...], Integers, lambda value: Integers(map(int, _separated(value)))),
)
for _, _kind, _read in OPTION_TYPES:
    register_type(_kind, serializer=float if _kind is Number else list, deserializer=_read)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = make_parser()
    given = parser.parse_args(None if arguments is None else list(arguments))
    command = given.subcommand
    prepare = {"train": _train, "evaluate": _evaluate, "compare": _compare, "export": _export}[command]
    try:
        job = prepare(given[command])
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"yopo-ext {command}: error: {error}", file=sys.stderr)
        return 2
    return job()


def make_parser() -> ArgumentParser:
    """All commands with all their options; every option can also be set in a YAML file given as --config."""
    parser = ArgumentParser(prog="yopo-ext", description="Fast adversarial training of image classifiers.")
    commands = parser.add_subcommands(required=True)

    train = _command("Train one model with one method.")
    _add_options(train, TrainConfig)
    for name, field in methods.option_fields().items():
        users = ", ".join(m for m, cls in methods.METHODS.items() if name in {f.name for f in dataclasses.fields(cls)})
        _add_option(train, field, _hint(field), default=None, note=f" [{users}]")
    commands.add_subcommand("train", train, help="train one model")

    evaluate = _command("Attack a trained model.")
    evaluate.add_argument("checkpoint", type=str, help="model.pt or last.pt of a run")
    _add_options(evaluate, EvaluateConfig, skip=("checkpoint",))
    commands.add_subcommand("evaluate", evaluate, help="attack a trained model")

    export = _command("Write a trained model's weights as a plain state_dict, with the keys RobustBench uses.")
    export.add_argument("checkpoint", type=str, help="model.pt or last.pt of a run")
    export.add_argument("file", type=str, help="where to write them, for torch.load")
    commands.add_subcommand("export", export, help="write a state_dict")

    compare = _command("Train several methods alike and test them alike.")
    _add_options(compare, CompareConfig, skip=("train",))
    _add_options(compare, TrainConfig, skip=("method", "seed"))
    commands.add_subcommand("compare", compare, help="compare training methods")
    return parser


def _command(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, usage="%(prog)s [options]; --help lists them")
    parser.add_argument("--config", action="config", help="YAML file with options of this command")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be run, how long and with how much memory"
    )
    return parser


def _add_options(parser: ArgumentParser, config: type[Any], skip: Sequence[str] = ()) -> None:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name not in skip:
            _add_option(parser, field, hints[field.name], field.default)


def _add_option(parser: ArgumentParser, field: dataclasses.Field[Any], hint: Any, default: Any, note: str = "") -> None:
    flag, help_text = "--" + field.name.replace("_", "-"), field.metadata["help"] + note
    if hint is bool or hint == bool | None:
        parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=default, help=help_text)
        return
    optional = default is None or _is_optional(hint)
    wanted = _without_none(hint)
    for plain, kind, read in OPTION_TYPES:
        if wanted == plain:
            wanted, default = kind, default if default is None else read(default)
    parser.add_argument(flag, type=wanted | None if optional else wanted, default=default, help=help_text)


def _hint(field: dataclasses.Field[Any]) -> Any:
    owner = next(cls for cls in methods.METHODS.values() if field in dataclasses.fields(cls))
    return typing.get_type_hints(owner)[field.name]


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _without_none(hint: Any) -> Any:
    if not _is_optional(hint):
        return hint
    (kind,) = (h for h in typing.get_args(hint) if h is not type(None))
    return kind


def _build(config: type[Any], given: Namespace, skip: Sequence[str] = ()) -> Any:
    """A configuration from parsed options, its values of the plain types."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in skip]
    return config(**{name: _plain(given[name]) for name in names})


def _plain(value: Any) -> Any:
    if isinstance(value, Number):
        return float(value)
    return tuple(value) if isinstance(value, Texts | Numbers | Integers) else value


def _train(given: Namespace) -> Job:
    from yopo_ext.training.trainer import Trainer

    names = methods.option_fields()
    options = {name: _plain(given[name]) for name in names if given[name] is not None}
    config, method = resolve(_build(TrainConfig, given), options)
    if given.dry_run:
        return _plan([(config.method, config)])
    if config.out is None:
        config.out = str(default_folder("train", config))
    trainer = Trainer(config)

    def job() -> int:
        result = trainer.fit(None if config.stop_after is None else time.monotonic() + config.stop_after)
        if result is None:
            return UNFINISHED
        if not trainer.leads:
            return 0
        print(
            f"{method.spec}: {result.seconds:.1f} s of training, {result.updates} updates, cost {method.cost()} units"
        )
        for name, value in result.validation.items():
            print(f"  {name}: {value:.4g}")
        print(f"  written to {config.out}")
        return 0

    return job


def _evaluate(given: Namespace) -> Job:
    from yopo_ext.training.suites import CheckpointTest

    config = _build(EvaluateConfig, given, skip=("checkpoint",))
    config.checkpoint = given.checkpoint
    test = CheckpointTest(config)

    def job() -> int:
        print(test.describe() if given.dry_run else test.run())
        return 0

    return job


def _export(given: Namespace) -> Job:
    from yopo_ext.training.checkpoint import load_checkpoint, tested_weights, write_atomically
    from yopo_ext.training.models import robustbench_model

    state = load_checkpoint(Path(given.checkpoint))
    weights, target = tested_weights(state), Path(given.file)

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
    from yopo_ext.training.comparison import Comparison, plan
    from yopo_ext.training.report import table

    train = TrainConfig(**dataclasses.asdict(_build(TrainConfig, given, skip=("method", "seed"))))
    config = dataclasses.replace(_build(CompareConfig, given, skip=("train",)), train=train)
    if given.dry_run:
        return _plan(plan(config), config.test_attacks)
    if train.out is None:
        train.out = str(default_folder("compare", train))
    comparison = Comparison(config)

    def job() -> int:
        rows = comparison.run()
        if rows is None:
            return UNFINISHED
        print(table(rows))
        print(f"\nwritten to {train.out}")
        return 0

    return job


def default_folder(command: str, config: TrainConfig) -> Path:
    """A new folder under runs/: the first free number."""
    number = 1
    while (folder := Path("runs") / f"{command}-{config.dataset}-{number}").exists():
        number += 1
    return folder


def _plan(runs: Sequence[tuple[str, TrainConfig]], test_attacks: Sequence[str] = ()) -> Job:
    from yopo_ext.training.adversaries import parse_attacks
    from yopo_ext.training.datasets import dataset_of
    from yopo_ext.training.estimate import Estimate, duration, estimate

    dataset = dataset_of(runs[0][1])
    attacks = parse_attacks(test_attacks)

    def job() -> int:
        seen: dict[str, Estimate] = {}
        for text, run in runs:
            if text not in seen:
                seen[text] = found = estimate(run, dataset, attacks)
                times = sum(other == text for other, _ in runs)
                length = f"{run.epochs} epochs" if run.time_budget is None else f"{run.time_budget:g} s"
                what = f"{length} of {run.dataset}, {run.model}, eps {run.eps:.4g}"
                print(f"{text}: {times} x ({what}): {found}")
        training = sum(seen[text].training for text, _ in runs)
        evaluation = sum(seen[text].evaluation for text, _ in runs)
        print(f"in all: {len(runs)} runs, training {duration(training)}, evaluation {duration(evaluation)}")
        return 0

    return job


if __name__ == "__main__":
    sys.exit(main())
