import json
import runpy
from pathlib import Path

from yopo_ext.training.cli import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "collect.py"


def test_runs_and_their_evaluations_become_one_file(tmp_path):
    out = tmp_path / "run"
    toy = ["--epochs", "1", "--batch-size", "300", "--validation-steps", "1"]
    assert main(["train", "--method", "natural", "--out", str(out), *toy]) == 0
    for attack in ("pgd-2", "cw-1@20"):
        report = str(out / f"evaluation-{attack.partition('@')[0]}.json")
        assert main(["evaluate", str(out / "model.pt"), "--attacks", attack, "--out", report]) == 0
    runpy.run_path(str(SCRIPT))["main"](str(tmp_path / "all.json"), str(out))
    text = (tmp_path / "all.json").read_text()
    (row,) = json.loads(text)["rows"]
    assert set(row["robust"]) == {"pgd-2", "cw-1@20"}
    assert row["cost"]["total"] == 3
    assert (row["method"], row["samples"], row["updates"]) == ("natural", 450, 3)
    assert str(tmp_path) not in text  # where it ran is nobody's business
