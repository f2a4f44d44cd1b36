import pytest

from yopo_ext.training.comparison.plot import save_plot
from yopo_ext.training.comparison.report import Row, finding, table

RECORD = {
    "method": "pgd-10",
    "seed": 0,
    "clean": 90.0,
    "robust": {"pgd-20": 50.0, "autoattack@100": 45.0},
    "worst": 45.0,
    "worst_samples": 100,
    "seconds": 8.0,
    "images_per_second": 100.0,
    "updates": 1000,
    "peak_memory_mib": None,
    "cost": {"forwards": 11, "input_grads": 11, "weight_grads": 1, "total": 23},
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
    assert cells[0] == ["method", "clean %", "PGD-20 %", "+ AUTOATTACK@100 %", "seconds", "images/s", "units = f + i + w",
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


def test_the_finding_follows_from_the_rows():
    pgd = {**RECORD, "worst": 80.0, "worst_samples": 400, "seconds": 20.0}  # standard error: 2 points
    near = {**YOPO, "worst": 78.5, "worst_samples": 400, "seconds": 5.0}
    far = {**near, "method": "fgsm-rs", "worst": 77.5, "seconds": 1.0}
    assert finding(rows(far, pgd, near)) == (
        "The most robust under all attacks is pgd-10 (80.0 % after 20.0 s of training); within one standard error of 400 "
        "images (2.0 points) of it the fastest is yopo-5-3 (78.5 % after 5.0 s of training), in 0.25 of its time."
    )
    assert finding(rows(far, pgd)).endswith(
        "none that is faster comes within one standard error of 400 images (2.0 points) of it."
    )
    assert finding(rows({**near, "worst": 81.0}, pgd)).startswith(
        "The most robust under all attacks is yopo-5-3 (81.0 %"
    )


@pytest.mark.parametrize(
    "seconds",
    [(3.0, 4.3, 5.1, 7.6, 11.9, 17.7), (3.0, 3.0, 3.1, 3.1, 3.2, 3.2), (2.0, 60.0, 61.0, 900.0, 901.0, 9000.0)],
)
def test_every_name_in_the_plot_can_be_read(tmp_path, seconds, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    methods = {"natural": 7.0, "fgsm-rs": 67.0, "yopo-2-3:train-on=last:persist": 71.6,
               "yopo-3-2:update-every=pass:persist": 75.3, "yopo-5-3": 76.2, "pgd-10": 76.8}  # fmt: skip
    records = [
        [{**RECORD, "method": method, "worst": worst + change, "seconds": time} for change in (-1.0, 1.0)]
        for (method, worst), time in zip(methods.items(), seconds, strict=True)
    ]
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    save_plot([Row.of(several) for several in records], tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    figures[0].draw_without_rendering()
    assert sorted(text.get_text() for text in axes.texts) == sorted(methods)
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own extent includes its line
    for number, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 <= box.y1 <= axes.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    low, high = axes.get_xlim()
    assert 0.9 * min(seconds) < low < min(seconds) <= max(seconds) < high
