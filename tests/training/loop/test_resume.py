"""A run that is killed at any moment and resumed ends with the same bits as one left alone."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from processes import finished, run_ranks, start

from yopo_ext.training.cli.main import main
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.datasets import load_dataset
from yopo_ext.training.loop import trainer as trainer_module
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.run import checkpoint, deadline, files
from yopo_ext.training.run.checkpoint import load_checkpoint
from yopo_ext.training.run.deadline import Deadline

CONFIG = {"epochs": 4, "batch_size": 40, "validation_steps": 2, "augment": True, "ema": 0.9, "save_every": 1e-9}


def run(few_digits, tmp_path, name, **change):
    config = TrainConfig(**{**CONFIG, "out": str(tmp_path / name), **change})
    return Trainer(config, dataset=few_digits, shown=False).fit()


def final_state(folder):
    state = load_checkpoint(folder / "last.pt")
    state["position"].pop("seconds")
    state["position"].pop("compile_seconds")
    state["position"].pop("origin_seconds")
    state["position"].pop("curve")
    return {
        name: state[name] for name in ("model", "optimizer", "average", "kept", "processes", "selected", "position")
    }


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for name in a:
            assert_same(a[name], b[name], f"{path}/{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def whole_run(few_digits, tmp_path_factory):
    """The uninterrupted run of a method and its folder, made once for all that is compared with it."""
    runs = {}

    def of(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp("runs")
            runs[method] = run(few_digits, folder, "whole", method=method), folder / "whole"
        return runs[method]

    return of


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["pgd-2", "free-2", "fgsm-mep", "yopo-2-2:update-every=pass:persist"])
@pytest.mark.parametrize("batch", [1, 4, 6, 14])  # 4 a multiple of an epoch
def test_interrupted_between_batches(few_digits, tmp_path, whole_run, method, batch):
    whole, folder = whole_run(method)
    config = TrainConfig(**CONFIG, method=method, out=str(tmp_path / "parts"))
    trainer = Trainer(config, dataset=few_digits, shown=False)
    step = trainer.learner.step

    def stop(b, number, lr):
        if number == batch:
            raise Killed
        return step(b, number, lr)

    trainer.learner.step = stop
    with pytest.raises(Killed):
        trainer.fit()
    parts = run(few_digits, tmp_path, "parts", method=method, resume="auto")
    assert_same(final_state(tmp_path / "parts"), final_state(folder))
    assert_same(parts.network.state_dict(), whole.network.state_dict())
    lines = {
        name: [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
        for name, at in (("whole", folder), ("parts", tmp_path / "parts"))
    }
    for record in (*lines["whole"], *lines["parts"]):
        record.pop("seconds")
    assert lines["parts"] == lines["whole"]


def test_a_time_limit_stops_and_resume_goes_on(few_digits, tmp_path, whole_run):
    whole, _ = whole_run("pgd-2")
    config = TrainConfig(**CONFIG, method="pgd-2", out=str(tmp_path / "parts"), resume="auto")
    stops = 0
    while (result := Trainer(config, dataset=few_digits, shown=False).fit(Deadline(0.0))) is None:
        stops += 1  # one batch at a time
    assert stops > 8
    assert_same(result.network.state_dict(), whole.network.state_dict())


def test_resuming_a_finished_run_gives_its_result_again(few_digits, tmp_path):
    first = run(few_digits, tmp_path, "run", method="pgd-2")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = run(few_digits, tmp_path, "run", method="pgd-2", resume="auto")
    assert_same(again.network.state_dict(), first.network.state_dict())
    assert again.validation == first.validation
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resume_auto_starts_where_there_is_nothing(few_digits, tmp_path):
    assert run(few_digits, tmp_path, "new", method="natural", resume="auto").updates == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume": "never"}, "out must be a folder without a run or comparison unless resume is 'auto'"),
        ({"resume": "auto", "lr": 0.01}, "same configuration; in .* lr was 0.1, not 0.01"),
        ({"resume": "auto", "method": "pgd-3"}, "method was 'pgd-2', not 'pgd-3'"),
    ],
)
def test_what_cannot_be_resumed(few_digits, tmp_path, change, message):
    run(few_digits, tmp_path, "run", method="pgd-2")
    with pytest.raises(ValueError, match=message):
        run(few_digits, tmp_path, "run", **{"method": "pgd-2", **change})


def test_training_on_with_more_epochs(few_digits, tmp_path, capsys):
    """A finished run goes on from its last weights, with a schedule of its own over the epochs that are new."""
    run(few_digits, tmp_path, "run", method="natural", epochs=4)
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    rates = []
    config = TrainConfig(**{**CONFIG, "epochs": 6, "method": "natural", "out": str(tmp_path / "run"), "resume": "auto"})
    trainer = Trainer(config, dataset=few_digits, shown=True)
    assert_same(trainer.learner.module.state_dict(), last["model"])
    assert "a new schedule over epochs 5 to 6 starts from the weights of epoch 4" in capsys.readouterr().err
    step = trainer.learner.step
    trainer.learner.step = lambda batch, number, lr: rates.append((batch.epoch, lr)) or step(batch, number, lr)
    assert trainer.fit().updates == 6 * 4
    assert [epoch for epoch, _ in rates] == [4] * 4 + [5] * 4
    fresh = [0.1 * trainer.schedule((number + 0.5) / 8) for number in range(8)]
    assert [rate for _, rate in rates] == pytest.approx(fresh)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    again = run(few_digits, tmp_path, "run", method="natural", epochs=6, resume="auto")  # as any finished run
    assert again.updates == 6 * 4


def test_training_on_can_be_interrupted(few_digits, tmp_path):
    def all_of_it(name, stop):
        run(few_digits, tmp_path, name, method="natural", epochs=2)
        more = {**CONFIG, "method": "natural", "epochs": 5, "out": str(tmp_path / name), "resume": "auto"}
        while (
            Trainer(TrainConfig(**more), dataset=few_digits, shown=False).fit(Deadline(0.0) if stop else None) is None
        ):
            pass
        return final_state(tmp_path / name)

    assert_same(all_of_it("parts", True), all_of_it("whole", False))


def test_training_on_needs_more_than_there_is(few_digits, tmp_path):
    run(few_digits, tmp_path, "run", method="natural", epochs=4)
    with pytest.raises(ValueError, match=r"epochs must be more than the 4 that .*run has been trained for.*; got 3"):
        run(few_digits, tmp_path, "run", method="natural", epochs=3, resume="auto")
    with pytest.raises(ValueError, match=r"lr was 0.1, not 0.2"):
        run(few_digits, tmp_path, "run", method="natural", epochs=5, lr=0.2, resume="auto")


def test_options_that_a_run_was_made_before_have_their_defaults(few_digits, tmp_path):
    run(few_digits, tmp_path, "run", method="natural")
    path = tmp_path / "run" / "last.pt"
    state = load_checkpoint(path)
    for name in ("eps_warmup", "image_channels"):
        del state["config"][name]
    for name in ("diverged", "fallen", "origin"):
        del state["position"][name]
    checkpoint.save_checkpoint(path, state)
    assert run(few_digits, tmp_path, "run", method="natural", resume="auto").updates == 16
    with pytest.raises(ValueError, match=r"eps_warmup was 0.0, not 0.5"):
        run(few_digits, tmp_path, "run", method="natural", resume="auto", eps_warmup=0.5)


def command(*arguments):
    return main(list(arguments))


def command_on_a_counting_clock(*arguments):
    """The command, whose clock of `--stop-after` moves on by one second whenever it is read."""
    deadline.time = SimpleNamespace(monotonic=itertools.count().__next__)
    return command(*arguments)


def victim(place, count, *arguments):
    """Kills its own process, without any chance to clean up, at the named place and time."""

    def fatal(original):
        def call(*given, **options):
            nonlocal count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **options)

        return call

    save = checkpoint.torch.save

    def half(state, file):
        nonlocal count
        count -= 1
        if count == 0:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    if place == "epoch":
        trainer_module.FabricLearner.step = fatal(trainer_module.FabricLearner.step)
    elif place == "write":
        checkpoint.torch.save = half
    elif place == "rename":
        files.os.replace = fatal(files.os.replace)
    elif place == "validation":
        trainer_module.evaluate = fatal(trainer_module.evaluate)
    return main(list(arguments))


ARGUMENTS = [
    "train", "--method", "yopo-2-2:persist", "--epochs", "3", "--batch-size", "300", "--validation-steps", "1",
    "--save-every", "1e-9", "--ema", "9/10", "--resume", "auto",
]  # fmt: skip


def test_killed_processes(tmp_path):
    """SIGKILL mid-epoch, inside a checkpoint's write, before its rename and in validation, one after the other."""
    log = tmp_path / "log"

    def status(out, place="nowhere", count=0):
        process = start(victim, place, count, *ARGUMENTS, "--out", str(tmp_path / out), log=log)
        return finished(process, log)

    assert status("whole") == 0, log.read_text()
    for place, count in (("epoch", 3), ("write", 2), ("validation", 1), ("rename", 3), ("epoch", 2)):
        assert status("parts", place, count) == -signal.SIGKILL, (place, log.read_text())
    assert status("parts") == 0, log.read_text()
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    models = [load_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("whole", "parts")]
    assert_same(*models)
    records = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in records] == [1, 2, 3]
    assert not list((tmp_path / "parts").glob(".*"))  # half-written files


@pytest.mark.slow
@pytest.mark.parametrize("method", ["natural", "yopo-1-2", "yopo-2-2"])
def test_a_compiled_run_keeps_its_bits(few_digits, tmp_path, method):
    settings = {"method": method, "epochs": 1, "compile": True}
    whole = run(few_digits, tmp_path, "whole", **settings)
    torch.compiler.reset()  # as in a new process
    config = TrainConfig(**{**CONFIG, **settings, "out": str(tmp_path / "parts"), "resume": "auto"})
    assert Trainer(config, dataset=few_digits, shown=False).fit(Deadline(0.0)) is None
    torch.compiler.reset()
    parts = run(few_digits, tmp_path, "parts", **settings, resume="auto")
    assert_same(parts.network.state_dict(), whole.network.state_dict())
    assert parts.compile_seconds > 0.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_saves_what_it_has(tmp_path, number):
    """Ctrl-C, and a scheduler's warning: the run stops after the batch under way, and goes on from there."""
    out = str(tmp_path / "run")
    arguments = [
        "train", "--method", "natural", "--epochs", "9999", "--validate-every", "9999", "--save-every", "9999",
        "--resume", "auto", "--out", out,
    ]  # fmt: skip
    log = tmp_path / "log"
    process = start(command, *arguments, log=log)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert finished(process, log) == 75, log.read_text()
    assert "--resume auto goes on from here" in log.read_text()
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["position"]
    assert saved["epoch"] >= 2


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("yopo-1-2:persist", []),
        # What each process has for itself: statistics of BatchNorm, averaged and not, and Free's perturbation.
        ("free-2", ["--model", "timm/test_resnet", "--ema", "9/10"]),
    ],
)
def test_two_processes(tmp_path, method, options):
    """DDP on two CPU processes: a run that is stopped and gone on with ends like one left alone, bit for bit."""
    if "timm/test_resnet" in options and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    arguments = [
        "train", "--method", method, "--epochs", "2", "--batch-size", "20", *options, "--validation-steps", "1",
        "--accelerator", "cpu", "--devices", "2", "--resume", "auto",
    ]  # fmt: skip
    log = tmp_path / "log"

    def statuses(out, *more):
        log.write_text("")
        return run_ranks(command_on_a_counting_clock, *arguments, "--out", str(tmp_path / out), *more, log=log)

    assert statuses("whole") == [0, 0], log.read_text()
    assert log.read_text().count("s of training") == 1  # one process speaks
    parts = 0
    while (found := statuses("parts", "--stop-after", "1")) == [75, 75]:
        parts += 1
        assert parts < 50
    assert found == [0, 0], log.read_text()
    assert parts >= 2
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    state = final_state(tmp_path / "whole")
    digits = load_dataset("digits")
    assert state["position"]["batches"] == 2 * (len(digits.train) // 2 // 20)
    first, second = state["processes"]
    if method.startswith("free"):
        assert not torch.equal(first["carried"]["perturbation"], second["carried"]["perturbation"])
    if method.endswith("persist"):
        config = TrainConfig(method=method, epochs=2, batch_size=20, validation_steps=1)
        untouched = Trainer(config, shown=False).learner.kept["perturbation"].values
        moved = (state["kept"]["perturbation"] != untouched).flatten(1).any(1)
        assert moved[0::2].float().mean() > 0.95
        assert moved[1::2].float().mean() > 0.95


@pytest.mark.slow
def test_fabric_starts_the_second_process(tmp_path):
    """As a user does it: one command, without torchrun."""
    out = tmp_path / "run"
    line = (
        f"-m yopo_ext train --method yopo-1-2 --epochs 1 --validation-steps 1 --devices 2 --accelerator cpu --out {out}"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("s of training") == 1  # one process speaks
    assert len(load_checkpoint(out / "last.pt")["processes"]) == 2
