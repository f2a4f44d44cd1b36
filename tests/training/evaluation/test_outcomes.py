"""What an evaluation says of single images and classes, and of a network whose outputs are not finite."""

import json

import pytest
import torch
from torch import nn

from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.cli.main import main
from yopo_ext.training.data.splits import Split
from yopo_ext.training.evaluation.evaluate import evaluate, evaluate_in_parts
from yopo_ext.training.methods import ThreatModel

THREAT = ThreatModel(0.1)
TRAINED = ["--method", "natural", "--epochs", "3", "--batch-size", "50", "--validation-steps", "1"]


class Threshold(nn.Module):
    """Predicts 1 where the only pixel exceeds one half; NaN above 0.98."""

    def forward(self, x):
        pixel = x.flatten(1).sum(1)
        logits = torch.stack([0.5 - pixel, pixel - 0.5], 1)
        return torch.where(pixel[:, None] > 0.98, torch.nan, logits)


def split(pixels, labels):
    return Split(torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels), 255)


def test_nan_is_wrong_whatever_the_label():
    class Nothing(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :1].expand(-1, 2) * torch.nan

    found = evaluate(Nothing(), split([0, 0, 9], [0, 1, 0]), THREAT, [PgdAttack(2), PgdAttack(2, 2)])
    assert (found.clean, found.worst) == (0.0, 0.0)
    assert set(found.robust.values()) == {0.0}
    assert found.not_finite == 3


def test_the_outcome_of_every_image(tmp_path):
    data = split([0, 100, 120, 140, 200, 255], [0, 0, 1, 1, 1, 1])
    tried = [PgdAttack(10, samples=4), PgdAttack(5, 2, "margin")]
    journal = tmp_path / "journal"
    for _ in range(2):  # the second time from the journal
        found = evaluate_in_parts(Threshold(), data, THREAT, tried, batch_size=4, journal=journal)
        assert found.outcomes == {"clean": "11011n", "pgd-10@4": "1100", "cw-5-2": "11001n"}
        assert found.not_finite == 1
    left = evaluate_in_parts(Threshold(), data, THREAT, tried, batch_size=4, survivors_only=True)
    assert left.outcomes == {"clean": "11011n", "pgd-10@4": "11-0", "cw-5-2": "11--1-"}


def test_accuracies_by_class():
    data = split([0, 140, 120, 140, 200, 200], [0, 0, 1, 1, 1, 3])
    found = evaluate(Threshold(), data, THREAT, [PgdAttack(10, samples=3)])
    by_class = found.by_class(data.labels, 4)
    assert by_class == {
        "clean": [50.0, pytest.approx(200 / 3), None, 0.0],  # there is no image of class 2
        "pgd-10@3": [50.0, 0.0, None, None],
    }


def test_the_report_of_a_checkpoint(tmp_path, capsys):
    run, report = tmp_path / "run", tmp_path / "report.json"
    assert main(["train", *TRAINED, "--out", str(run)]) == 0
    attack = ["evaluate", str(run / "model.pt"), "--attacks", "pgd-2", "--samples", "60"]
    assert main([*attack, "--out", str(report)]) == 0
    found = json.loads(report.read_text())
    assert len(found["labels"]) == len(found["outcomes"]["clean"]) == len(found["outcomes"]["pgd-2"]) == 60
    assert found["robust"]["pgd-2"] == pytest.approx(100 * found["outcomes"]["pgd-2"].count("1") / 60)
    one = [o for o, label in zip(found["outcomes"]["clean"], found["labels"], strict=True) if label == 1]
    assert found["by_class"]["clean"][1] == pytest.approx(100 * one.count("1") / len(one))
    assert found["alarms"] == []
    assert "lowest class" in capsys.readouterr().out


def test_weights_that_are_not_finite_raise_the_alarm(tmp_path, capsys):
    run, report = tmp_path / "run", tmp_path / "report.json"
    assert main(["train", *TRAINED, "--out", str(run)]) == 0
    state = torch.load(run / "model.pt", weights_only=True)
    for value in state["model"].values():
        value.fill_(torch.nan)
    torch.save(state, run / "broken.pt")
    for options in ([], ["--survivors-only"]):
        arguments = ["--attacks", "pgd-2", "--samples", "60", "--out", str(report), *options]
        assert main(["evaluate", str(run / "broken.pt"), *arguments]) == 0
        found = json.loads(report.read_text())
        assert (found["clean"], found["worst"], found["not_finite"]) == (0.0, 0.0, 60)
        assert "outputs are not finite for 60 of 60 images" in found["alarms"][0]
        assert "ALARM" in capsys.readouterr().out
