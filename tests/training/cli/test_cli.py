import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from yopo_ext.training.cli.main import main
from yopo_ext.training.comparison.comparison import Comparison, plan
from yopo_ext.training.config.schema import CompareConfig, TrainConfig
from yopo_ext.training.run.deadline import Deadline

TOY = ["--epochs", "1", "--batch-size", "200", "--validation-steps", "1"]


def test_train_writes_a_run_that_evaluate_can_test(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--method", "pgd", "--steps", "2", "--eps", "1/10", "--out", str(out), *TOY]) == 0
    assert "pgd-2: " in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["config"]["eps"] == 0.1

    report = tmp_path / "report.json"
    test = ["evaluate", str(out / "model.pt"), "--attacks", "pgd-2,cw-2-2", "--samples", "50", "--out", str(report)]
    assert main(test) == 0
    printed = capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["samples"] == 50
    assert written["worst"] <= min(written["clean"], *written["robust"].values())
    assert f"{written['robust']['pgd-2']:6.2f} %" in printed
    assert main([*test, "--dry-run"]) == 0
    assert "50 test samples: clean, pgd-2, cw-2-2; about" in capsys.readouterr().out


def test_compare_writes_everything(tmp_path, capsys):
    out = tmp_path / "comparison"
    arguments = ["--methods", "natural,pgd-10,yopo-1-2", "--seeds", "0,1", "--test-attacks", "pgd-2,pgd-3"]
    assert main(["compare", *arguments, "--out", str(out), *TOY]) == 0
    table = capsys.readouterr().out
    assert (out / "comparison.txt").read_text() in table
    assert "PGD-2 %" in table
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["natural", "pgd-10", "yopo-1-2"]

    found = json.loads((out / "comparison.json").read_text())
    assert found["seeds"] == [0, 1]
    assert found["environment"]["packages"]["torch"]
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["pgd-10"]["cost"] == {"forwards": 11, "input_grads": 11, "weight_grads": 1, "total": 23}
    assert rows["pgd-10"]["time_ratio"] == 1.0
    assert rows["natural"]["cost_ratio"] == pytest.approx(3 / 23)
    assert all(len(row["robust"]["pgd-3"]["per_seed"]) == 2 for row in rows.values())

    runs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # Each seed starts with another method, so that no method always runs first.
    assert [(r["seed"], r["method"]) for r in runs] == [
        (0, "natural"), (0, "pgd-10"), (0, "yopo-1-2"), (1, "pgd-10"), (1, "yopo-1-2"), (1, "natural"),
    ]  # fmt: skip
    for method in rows:
        for seed in (0, 1):
            assert (out / method / f"seed-{seed}" / "model.pt").is_file()
    assert (out / "accuracy-time.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_on_survivors_only_finds_the_same_worst_case(tmp_path, capsys):
    out = tmp_path / "run"
    short = ["--epochs", "3", "--batch-size", "50", "--validation-steps", "1"]
    assert main(["train", "--method", "natural", "--out", str(out), *short]) == 0
    found = {}
    for flag in ("--no-survivors-only", "--survivors-only"):
        report = tmp_path / f"{flag}.json"
        tested = ["--attacks", "pgd-3,cw-2,pgd-1", "--samples", "60", "--out", str(report), flag]
        assert main(["evaluate", str(out / "model.pt"), *tested]) == 0
        found[flag] = json.loads(report.read_text())
    each, left = found["--no-survivors-only"], found["--survivors-only"]
    assert (each["survivors_only"], left["survivors_only"]) == (False, True)
    assert left["worst"] == each["worst"] == left["robust"]["pgd-1"]
    assert each["robust"]["pgd-1"] > each["worst"]  # the weak attack alone leaves more


def test_a_method_of_a_list_can_have_its_own_epochs_and_rate():
    texts = ("pgd-10", "yopo-5-3:epochs=9:persist:lr=1/4", "free-8:epochs=10")
    runs = dict(plan(CompareConfig(methods=texts, seeds=(0,), train=TrainConfig(epochs=30))))
    assert [runs[text].epochs for text in texts] == [30, 9, 10]
    assert runs[texts[1]].lr == 0.25
    assert runs[texts[1]].method == "yopo-5-3:persist=True"
    with pytest.raises(ValueError, match=r"epochs must be an integer; got '1\.5'"):
        plan(CompareConfig(methods=("pgd:epochs=1.5",)))


@pytest.mark.parametrize("command", ["train", "compare"])
def test_dry_run_estimates_and_writes_nothing(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    choice = ["--method", "fgsm-rs"] if command == "train" else ["--methods", "natural,fgsm-rs", "--seeds", "0,1,2"]
    assert main([command, *choice, "--dry-run", *TOY]) == 0
    printed = capsys.readouterr().out
    assert "fgsm-rs: " in printed
    assert "1 epochs of digits, digits-cnn, eps 0.15" in printed
    assert "MiB" in printed
    assert f"in all: {1 if command == 'train' else 6} runs, training" in printed
    assert not list(tmp_path.iterdir())


def test_yaml_and_command_line_combine(tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("method: yopo\nouter_steps: 2\npersist: true\neps: 8/255\nepochs: 1\nbatch_size: 200\n")
    out = tmp_path / "run"
    options = ["--inner-steps", "4", "--update-every", "pass", "--out", str(out)]
    assert main(["train", "--config", str(settings), *options]) == 0
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["method"] == "yopo-2-4:update-every=pass:persist=True"
    assert config["eps"] == 8 / 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "pgd", "--outer-steps", "2"], "outer_steps is no option of method 'pgd'"),
        (["train", "--dataset", "letters"], "dataset must be one of"),
        (["train", "--eps", "8"], "looks like 0..255 units: use 8/255"),
        (["train", "--warmup", "2"], "warmup must be a fraction"),
        (["compare", "--model", "net"], "model must be one of"),
        (["compare", "--methods", "natural,natural"], "methods must be a list without repetitions"),
        (["compare", "--methods", "natural,sgd"], "method must be one of"),
        (["compare", "--test-attacks", "fgsm"], "attack must look like pgd-20"),
        (["compare", "--devices", "2"], "devices must be 1 to compare; got 2"),
        (["compare", "--test-samples", "0"], "test_samples must be an integer >= 1; got 0"),
        (["compare", "--methods", "yopo,yopo-5-3"], "'yopo' and 'yopo-5-3' are the same"),
        (["train", "--method", "pgd", "--step-size", "-1"], "step_size must be > 0; got -1"),
        (["train", "--method", "n-fgsm", "--step-size", "0"], "step_size must be > 0; got 0"),
        (["train", "--image-size", "64"], "image_size is for dataset 'imagefolder'; dataset is 'digits'"),
        (["train", "--schedule", "piecewise"], "milestones must be given for schedule 'piecewise'"),
        (
            ["train", "--precision", "16-mixed", "--accelerator", "cpu"],
            "precision must be 'auto', '32-true' or 'bf16-mixed' on a",
        ),
        (["train", "--out", ""], "out must name a folder; got ''"),
        (["train", "--model", "timm/no-such-net"], "(timm is not installed, or has no such model)"),
        (["compare", "--methods", "natural,pgd-1:batch-size=9999", "--out", "."], "batch_size must be between 1 and"),
        (["compare", "--dataset", "mnist", "--dry-run"], "data_dir must hold mnist, or give download; got 'data'"),
        (["train", "--dataset", "cifar10"], "data_dir must hold cifar10, or give download; got 'data'"),
        (["evaluate", "nothing.pt"], "no checkpoint at nothing.pt"),
    ],
)
def test_bad_requests_end_with_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "mistake",
    [
        ["--batch-size", "5000"],
        ["--model", "smallcnn"],  # takes larger images
        ["--mean", "0.1,0.2", "--std", "1,1"],
        ["--dataset", "cifar10"],
        ["--out", "finished"],
        ["--out", "finished", "--resume", "auto", "--lr", "0.3"],
    ],
)
@pytest.mark.parametrize(
    "command", [["train", "--method", "natural"], ["compare", "--methods", "natural", "--seeds", "0"]]
)
def test_a_dry_run_meets_the_errors_of_the_run(tmp_path, monkeypatch, capsys, command, mistake):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--out", "finished", *TOY]) == 0
    capsys.readouterr()
    assert main([*command, *TOY, *mistake]) == 2
    expected = capsys.readouterr().err
    assert main([*command, *TOY, *mistake, "--dry-run"]) == 2
    assert capsys.readouterr().err == expected
    assert len(expected.strip().splitlines()) == 1


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "yopo_ext", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert "--outer-steps" in done.stdout


def test_export_writes_the_tested_weights(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--method", "natural", "--ema", "0.5", "--out", str(out), *TOY]) == 0
    for source in ("model.pt", "last.pt"):
        assert main(["export", str(out / source), str(tmp_path / source), "--dry-run"]) == 0
        assert not (tmp_path / source).exists()
        assert main(["export", str(out / source), str(tmp_path / source)]) == 0
    assert "10 tensors" in capsys.readouterr().out
    averaged, again = (torch.load(tmp_path / name, weights_only=True) for name in ("model.pt", "last.pt"))
    raw = torch.load(out / "last.pt", weights_only=True)["model"]
    assert list(averaged) == list(raw)
    assert all(torch.equal(averaged[name], again[name]) for name in averaged)
    assert not torch.equal(averaged["first.0.weight"], raw["first.0.weight"])


def test_no_command_replaces_what_a_run_left(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--method", "natural", "--out", str(out), *TOY]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    attack = ["evaluate", str(out / "model.pt"), "--attacks", "pgd-1", "--samples", "10"]
    for arguments, message in (
        ([*attack, "--out", str(out / "model.pt")], "out must name a .json file for the report"),
        ([*attack, "--out", str(out / "run.json")], "out must not name a file of the run"),
        ([*attack, "--out", str(out)], "out must name a file for the report, such as"),
        (["export", str(out / "last.pt"), str(out / "last.pt")], "file must name a new file"),
        (["export", str(out / "last.pt"), str(out)], "file must name a new file"),
        (["train", "--out", str(out / "model.pt")], "out must name a folder"),
        (["compare", "--out", str(out), "--resume", "auto"], "out must not be the folder of a single run"),
        (["evaluate", str(out)], "checkpoint must be a file such as"),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "last.pt").unlink()
    assert main(["train", "--method", "natural", "--out", str(out), *TOY]) == 2
    assert "holds run.json, model.pt, metrics.jsonl, result.json" in capsys.readouterr().err
    comparison = tmp_path / "comparison"
    assert main(["compare", "--methods", "natural", "--seeds", "0", "--out", str(comparison), *TOY]) == 0
    assert main(["train", "--out", str(comparison), "--resume", "auto", *TOY]) == 2
    assert "out must not be the folder of a comparison" in capsys.readouterr().err


def test_compare_stops_on_time_and_goes_on(tmp_path, capsys, counting_clock):
    out = tmp_path / "comparison"
    arguments = [
        "compare",
        "--methods",
        "natural,fgsm-rs",
        "--seeds",
        "0",
        "--test-attacks",
        "pgd-2",
        "--out",
        str(out),
    ]
    arguments += ["--resume", "auto", "--epochs", "2", "--batch-size", "200", "--validation-steps", "1"]
    calls = 1
    while (status := main([*arguments, "--stop-after", "5"])) == 75:
        assert not (out / "comparison.json").exists()
        calls += 1
        assert calls < 100
    assert status == 0
    assert calls > 2  # both runs are left and gone on with
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    table = (out / "comparison.txt").read_text()
    seconds = [row["seconds"] for row in json.loads((out / "comparison.json").read_text())["rows"]]
    assert main(arguments) == 0  # nothing is run again
    assert (out / "comparison.txt").read_text() == table
    capsys.readouterr()
    assert main([*arguments, "--epochs", "3"]) == 2  # nor relabelled
    assert "same configuration; in" in capsys.readouterr().err
    weights = (out / "natural" / "seed-0" / "model.pt").read_bytes()
    assert main([*arguments, "--test-attacks", "pgd-3"]) == 0  # tested anew, trained no more
    assert (out / "natural" / "seed-0" / "model.pt").read_bytes() == weights
    assert "PGD-3 %" in (out / "comparison.txt").read_text()
    assert [row["seconds"] for row in json.loads((out / "comparison.json").read_text())["rows"]] == seconds


def test_compare_ends_however_short_the_time_of_a_call(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr("yopo_ext.training.comparison.comparison.dataset_of", lambda config: few_digits)
    train = TrainConfig(epochs=2, batch_size=40, validation_steps=1, out=str(tmp_path / "run"), resume="auto")
    config = CompareConfig(methods=("natural", "pgd-1"), seeds=(0,), test_attacks=("pgd-1", "pgd-2"), train=train)

    def call():
        return Comparison(config, shown=False).run(Deadline(0.0))

    def written():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}

    calls, before = 1, {}
    while (rows := call()) is None:
        assert written() != before  # each call leaves something new
        before = written()
        calls += 1
        assert calls < 50
    assert calls > 10
    whole = dataclasses.replace(config, train=dataclasses.replace(train, out=None, resume="never"))
    for row, expected in zip(rows, Comparison(whole, shown=False).run(), strict=True):
        assert (row.method, row.clean, row.robust) == (expected.method, expected.clean, expected.robust)
