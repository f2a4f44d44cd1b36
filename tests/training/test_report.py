import dataclasses

import pytest

from yopo_ext.training.report import Row, save_plot, table

RECORD = {
    "method": "pgd-10",
    "seed": 0,
    "clean": 90.0,
    "robust": {"pgd-20": 50.0, "autoattack@100": 45.0},
    "seconds": 8.0,
    "images_per_second": 100.0,
    "updates": 1000,
    "peak_memory_mib": None,
    "cost": {"forwards": 11, "input_grads": 11, "weight_grads": 1, "total": 23},
    "curve": [(4.0, 40.0), (8.0, 50.0)],
}
YOPO = {
    **RECORD,
    "method": "yopo-5-3",
    "seconds": 2.0,
    "peak_memory_mib": 300.25,
    "cost": {"forwards": 5, "input_grads": 5, "weight_grads": 5, "total": 15},
}


def rows(*records):
    return [Row.of([record]) for record in records]


def test_the_table_gives_accuracies_costs_and_ratios():
    head, _, pgd, yopo = (line.split("  ") for line in table(rows(RECORD, YOPO)).splitlines())
    cells = [[cell.strip() for cell in line if cell.strip()] for line in (head, pgd, yopo)]
    assert cells[0] == ["method", "clean %", "PGD-20 %", "AUTOATTACK@100 %", "seconds", "images/s", "units = f + i + w",
                        "peak MiB", "time / pgd-10", "units / pgd-10"]  # fmt: skip
    assert cells[1] == ["pgd-10", "90.0", "50.0", "45.0", "8.0", "100", "23 = 11 + 11 + 1", "1.00", "1.00"]
    assert cells[2] == ["yopo-5-3", "90.0", "50.0", "45.0", "2.0", "100", "15 = 5 + 5 + 5", "300", "0.25", "0.65"]


def test_without_a_gpu_or_the_reference_their_columns_are_left_out():
    text = table(rows(dict(YOPO, peak_memory_mib=None)))
    assert "MiB" not in text
    assert "pgd-10" not in text


def test_seeds_are_averaged():
    second = {**YOPO, "seed": 1, "clean": 92.0, "peak_memory_mib": 310.0}
    row = Row.of([YOPO, second])
    assert "91.0 ± 1.4" in table([row])
    assert row.as_dict([row])["peak_memory_mib"] == 310.0
    assert row.as_dict([row])["updates"] == {"mean": 1000, "per_seed": [1000, 1000]}
    assert row.as_dict([row])["clean"]["mean"] == pytest.approx(91.0)


def test_the_plot_is_written(tmp_path):
    several = [*rows(RECORD), dataclasses.replace(rows(YOPO)[0], curves=[[]])]
    save_plot(several, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
