import json
from pathlib import Path

import pytest

from yopo_ext.training.cli import dry_run
from yopo_ext.training.cli.main import UNFINISHED, main
from yopo_ext.training.config.resolve import resolve

FOLDER = Path(__file__).parents[3] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def configurations(recipe, monkeypatch):
    """What a recipe would run, resolved."""
    compares = "methods:" in recipe.read_text()
    command = "compare" if compares else "train"
    runs = []
    monkeypatch.setattr(dry_run, "planned", lambda found, *_: runs.extend(run for _, run in found) or (lambda: 0))
    assert main([command, "--config", str(recipe), "--out", "somewhere", "--dry-run"]) == 0
    return runs


@pytest.mark.parametrize("recipe", RECIPES, ids=[str(r.relative_to(FOLDER)) for r in RECIPES])
def test_every_recipe_can_be_run(recipe, monkeypatch):
    runs = configurations(recipe, monkeypatch)
    assert runs
    for run in runs:
        assert resolve(run)[0] == run


def test_released_schedule_drops_where_the_paper_says(monkeypatch):
    (run,) = configurations(FOLDER / "released" / "cifar10-preactresnet18-yopo-5-3.yaml", monkeypatch)
    assert run.milestones == (30 / 36, 34 / 36)
    assert run.method == "yopo-5-3:step-size=0.00784313725490196:gradient=released"


def test_the_gpu_comparison_names_every_method(monkeypatch):
    from yopo_ext.training.methods import METHODS, parse

    runs = configurations(FOLDER / "fastat-resnet18.yaml", monkeypatch)
    assert {parse(run.method).name for run in runs} == set(METHODS)
    assert all(run.stop_after == 480 and run.resume == "auto" for run in runs)


@pytest.mark.slow
def test_the_gpu_comparison_runs_at_toy_size(tmp_path, capsys, counting_clock):
    """Every method of the recipe, in bf16 and channels_last, in commands that stop and go on."""
    toy = [
        "--dataset", "digits", "--model", "digits-cnn", "--eps", "0.15", "--epochs", "1", "--batch-size", "300",
        "--seeds", "0", "--test-samples", "20", "--validation-size", "20", "--validation-steps", "1", "--no-compile",
        "--test-attacks", "pgd-2,pgd-2-2", "--stop-after", "5", "--threads", "1", "--accelerator", "cpu",
    ]  # fmt: skip
    # The clock is read once per batch: every training (5 batches) is left and gone on with.
    command = ["compare", "--config", str(FOLDER / "fastat-resnet18.yaml"), "--out", str(tmp_path / "out"), *toy]
    calls = 1
    while main(command) == UNFINISHED:
        calls += 1
        assert calls < 60
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert calls > len(found["rows"])
    assert [row["method"].split(":")[0] for row in found["rows"]] == [
        "natural", "fgsm-rs", "n-fgsm", "fgsm-rs-cs", "fgsm-pgi", "fgsm-mep", "liet", "pgd-10", "pgd-10", "free-8", "trades-10",
        "yopo-5-3", "yopo-2-1", "yopo-2-2", "trades-yopo-3-4",
    ]  # fmt: skip
    assert found["environment"]["packages"]["torch"]
