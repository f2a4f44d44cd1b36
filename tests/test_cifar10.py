"""The table and the plot of CIFAR-10 on rows made by hand: what is compared with what, and what is a tie."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cifar10

    monkeypatch.setattr(cifar10, "TIMES", tmp_path / "times.json")
    monkeypatch.setattr(cifar10, "ROOT", tmp_path)
    yield cifar10
    for name in ("cifar10", "paired", "tables"):
        sys.modules.pop(name, None)


def row(method, epochs, units, survivors, images=200, seed=0, more=0):
    """A run whose first `survivors` images survive APGD-T; APGD-T was tried on `more` images beyond, APGD-CE leaves ten more."""
    from paired import packed

    def of(left):
        return {"images": images + more, "left": packed([number < left for number in range(images + more)])}

    return {
        "method": method, "config": {"epochs": epochs, "lr": 0.4, "seed": seed}, "cost": {"total": units}, "clean": 60.0,
        "updates": 375 * epochs, "survivors": {"clean": of(120), "apgd-ce@200": of(survivors + 10), "apgd-t@200": of(survivors)},
    }  # fmt: skip


def cells(table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")
    ]


ROWS = [
    ("fgsm-rs", 20, 5, 80),
    ("fgsm-pgi", 14, 7, 82),
    ("yopo-2-1:step-size=0.03137254901960784:train-on=last:persist=True", 20, 5, 60),
    ("pgd-10", 13, 23, 90),
]


def test_runs_are_compared_within_their_budget(cifar10):
    lines = cells(cifar10.runs({"rows": [row(*one) for one in ROWS]}))
    assert [line[0] for line in lines] == [
        "`fgsm-pgi`", "`fgsm-rs`", "`yopo-2-1:step-size=8/255:train-on=last:persist`", "`pgd-10`",
    ]  # fmt: skip
    assert [line[2] for line in lines] == ["98", "100", "100", "299"]
    assert [line[5:7] for line in lines] == [["46.0", "41.0"], ["45.0", "40.0"], ["35.0", "30.0"], ["50.0", "45.0"]]
    best, tied, apart, alone = (line[7] for line in lines)
    assert best == alone == "the best"
    assert tied == "1.0 ± 1.4, tied"  # two of 200 images
    assert apart.startswith("11.0 ± ")
    assert "tied" not in apart


def test_the_images_that_every_run_met_count(cifar10):
    rows = [row(*ROWS[0]), row(*ROWS[1], more=100)]
    assert "attacks on the first 200;" in cifar10.runs({"rows": rows})
    assert cells(cifar10.runs({"rows": rows}))[0][6] == "41.0"


def test_seeds_of_a_method_are_one_line(cifar10):
    rows = [row(*ROWS[0]), row("fgsm-rs", 20, 5, 90, seed=1), row(*ROWS[1])]
    table = cifar10.runs({"rows": rows})
    assert [line[6] for line in cells(table)] == ["42.5", "41.0"]
    assert "1 to 2 seeds of each" in table


def test_seconds_are_updates_by_the_time_of_one(cifar10):
    data = {"rows": [row(*ROWS[0]), row(*ROWS[2])]}
    assert {line[3] for line in cells(cifar10.runs(data))} == {"not measured"}
    with pytest.raises(SystemExit, match="no time of"):
        cifar10.plot(data)
    cases = [
        {"method": "fgsm-rs", "ms": 100.0},
        {"method": ROWS[2][0].replace("0.03137254901960784", "0.1"), "ms": 120.0},
    ]
    environment = {"cpu": "some CPU", "cores": 2, "torch": "2.13.0", "date": "2026-11-25"}
    cifar10.TIMES.write_text(json.dumps({"environment": environment, "cases": cases}))
    assert [line[3] for line in cells(cifar10.runs(data))] == ["750", "900"]  # another step takes as long
    (cifar10.ROOT / "docs").mkdir()
    cifar10.plot(data)
    assert (cifar10.ROOT / "docs" / "cifar10.png").read_bytes().startswith(b"\x89PNG")


def test_trials_are_listed_by_method_and_rate(cifar10):
    trial = {"epochs": 3, "cost": {"total": 5}, "validation_clean": 50.0, "validation_pgd": 30.0, "alignment": None}
    rates = [("yopo-2-1:step-size=0.0470588235294", 0.4), ("fgsm-rs", 0.4), ("fgsm-rs", 0.1)]
    table = cifar10.trials({"trials": [trial | {"method": method, "lr": lr} for method, lr in rates]})
    assert [line[:3] for line in cells(table)] == [
        ["`fgsm-rs`", "0.1", "5 x 3"], ["`fgsm-rs`", "0.4", "5 x 3"], ["`yopo-2-1:step-size=12/255`", "0.4", "5 x 3"],
    ]  # fmt: skip
