"""A run whose weights stop being finite stops, never selects them, and says so."""

import json

import pytest
import torch

from yopo_ext.training.cli.main import main
from yopo_ext.training.comparison.comparison import Comparison
from yopo_ext.training.config.schema import CompareConfig, TrainConfig
from yopo_ext.training.loop.position import DivergedError
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.run.files import append_line, write_json


def breaking(trainer, epoch):
    """The trainer, with a weight that becomes NaN in this epoch (from 0) and stays it."""
    step = trainer.learner.step

    def broken(batch, number, lr):
        outcome = step(batch, number, lr)
        if batch.epoch >= epoch:
            with torch.no_grad():
                next(trainer.learner.module.parameters()).fill_(torch.nan)
        return outcome

    trainer.learner.step = broken
    return trainer


def strict(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("select", ["best", "last"])
@pytest.mark.parametrize("average", [0.0, 0.1])
def test_the_run_stops_with_the_best_finite_weights(few_digits, tmp_path, select, average):
    out = tmp_path / "run"
    config = TrainConfig(
        method="natural", epochs=6, validate_every=1, select=select, average=average, out=str(out), validation_steps=1
    )
    result = breaking(Trainer(config, dataset=few_digits, shown=False), 2).fit()
    assert result.validation["epoch"] <= 2
    assert all(value.isfinite().all() for value in result.network.state_dict().values())
    records = strict(out / "metrics.jsonl")
    assert [r["epoch"] for r in records] == [1, 2, 3]  # the third is the last
    assert "training diverged" in records[2]["alarm"]
    assert "validation_clean" not in records[2]
    assert json.loads((out / "result.json").read_text())["diverged"] == 3
    again = Trainer(TrainConfig(**{**vars(config), "resume": "auto"}), dataset=few_digits, shown=False).fit()
    assert again.validation == result.validation
    assert strict(out / "metrics.jsonl") == records


def test_a_run_without_finite_weights_is_an_error(few_digits, tmp_path):
    config = TrainConfig(method="natural", epochs=6, out=str(tmp_path / "run"))
    with pytest.raises(DivergedError, match=r"training diverged in epoch 1.*lower learning rate"):
        breaking(Trainer(config, dataset=few_digits, shown=False), 0).fit()
    assert not (tmp_path / "run" / "model.pt").exists()


@pytest.mark.parametrize("clip", [[], ["--clip", "1"]])
def test_the_command_ends_with_one_line(tmp_path, capsys, clip):
    arguments = ["--method", "natural", "--lr", "1e30", "--epochs", "3", "--validation-steps", "1", *clip]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("yopo-ext train: error: training diverged in epoch 1")


def test_a_comparison_goes_on_with_the_other_methods(few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("yopo_ext.training.comparison.comparison.dataset_of", lambda config: few_digits)
    train = TrainConfig(epochs=2, batch_size=40, validation_steps=1, out=str(tmp_path / "run"))
    config = CompareConfig(methods=("natural:lr=1e30", "natural"), seeds=(0,), test_attacks=("pgd-1",), train=train)
    bad, good = Comparison(config).run()
    assert (bad.clean, bad.worst) == ([0.0], [0.0])
    assert good.clean[0] > 0.0
    assert "training diverged" in strict(tmp_path / "run" / "metrics.jsonl")[0]["alarm"]
    assert "ALARM" in capsys.readouterr().err


def test_what_is_written_stays_json(tmp_path):
    value = {"a": float("nan"), "b": [1.0, -float("inf")], "c": {"d": float("inf")}, "e": 2}
    write_json(tmp_path / "a.json", value)
    append_line(tmp_path / "a.jsonl", value)
    for text in ((tmp_path / "a.json").read_text(), (tmp_path / "a.jsonl").read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.0, None], "c": {"d": None}, "e": 2}
