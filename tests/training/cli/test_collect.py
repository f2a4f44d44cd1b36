import json
import runpy
import sys
from pathlib import Path

import pytest

from yopo_ext.training.cli.main import main

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def collect(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield runpy.run_path(str(SCRIPTS / "collect.py"))["main"]
    sys.modules.pop("paired", None)


def train(out, epochs=1, batch_size=300):
    toy = ["--epochs", str(epochs), "--batch-size", str(batch_size), "--validation-steps", "1"]
    assert main(["train", "--method", "natural", "--out", str(out), *toy]) == 0


def evaluate(out, name, attacks, *options):
    report = str(out / f"evaluation-{name}.json")
    assert main(["evaluate", str(out / "model.pt"), "--attacks", attacks, "--out", report, *options]) == 0


def test_runs_and_their_evaluations_become_one_file(tmp_path, collect):
    out = tmp_path / "run"
    train(out)
    evaluate(out, "pgd", "pgd-2")
    evaluate(out, "cw", "cw-1@20")
    (out / "commit").write_text("abc1234\n")
    collect(str(tmp_path / "all.json"), str(out))
    text = (tmp_path / "all.json").read_text()
    (row,) = json.loads(text)["rows"]
    assert set(row["robust"]) == {"pgd-2", "cw-1@20"}
    assert row["cost"]["total"] == 3
    assert (row["method"], row["samples"], row["updates"], row["commit"]) == ("natural", 450, 3, "abc1234")
    assert str(tmp_path) not in text  # where it ran is nobody's business


def test_a_run_that_was_not_attacked_is_a_trial(tmp_path, collect):
    train(tmp_path / "run")
    collect(str(tmp_path / "all.json"), str(tmp_path / "run"))
    found = json.loads((tmp_path / "all.json").read_text())
    (trial,) = found["trials"]
    assert found["rows"] == []
    assert (trial["method"], trial["epochs"], trial["updates"]) == ("natural", 1, 3)
    assert 0.0 <= trial["validation_pgd"] <= trial["validation_clean"] <= 100.0


@pytest.mark.parametrize("option", ["--survivors-only", "--no-survivors-only"])
def test_it_says_of_every_image_which_attacks_it_survived(tmp_path, collect, option):
    from paired import unpacked

    out = tmp_path / "run"
    train(out, epochs=3, batch_size=50)  # long enough to be right about most clean images
    evaluate(out, "two", "cw-2@40,pgd-1", "--samples", "70", option)
    collect(str(tmp_path / "all.json"), str(out))
    (row,) = json.loads((tmp_path / "all.json").read_text())["rows"]
    left = {name: unpacked(found["left"], found["images"]) for name, found in row["survivors"].items()}
    assert {name: len(images) for name, images in left.items()} == {"clean": 70, "cw-2@40": 40, "pgd-1": 70}
    alone = {"clean": {}, "cw-2": {}, "pgd-1": {}}  # read from the journal by hand
    for line in Path(out / "evaluation-two.json.journal").read_text().splitlines():
        record = json.loads(line)
        alone[record["attack"]].update(zip(record["images"], (c == "1" for c in record["correct"]), strict=True))
    clean, cw, pgd = alone.values()
    assert left["clean"] == [clean[i] for i in range(70)]
    assert left["cw-2@40"] == [clean[i] and cw[i] for i in range(40)]
    assert left["pgd-1"] == [clean[i] and (i >= 40 or cw[i]) and pgd.get(i, False) for i in range(70)]
    assert 0 < sum(left["pgd-1"]) < sum(left["clean"])


def test_a_journal_of_another_result_is_refused(tmp_path, collect):
    out = tmp_path / "run"
    train(out)
    evaluate(out, "one", "pgd-1", "--samples", "40")
    path = out / "evaluation-one.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "robust": {"pgd-1": 1.0}}))
    with pytest.raises(ValueError, match="disagree about pgd-1"):
        collect(str(tmp_path / "all.json"), str(out))
