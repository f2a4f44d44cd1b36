"""What is said where there is no terminal: something soon, then often enough, then no more than a long log can bear."""

from types import SimpleNamespace

import pytest
import torch

from yopo_ext.training.cli.main import main
from yopo_ext.training.data.image_files import ImageFiles
from yopo_ext.training.run import progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.mark.parametrize("seconds_per_batch", [0.1, 1.0, 4.0])
def test_lines_come_soon_and_go_on(clock, capsys, seconds_per_batch):
    told = progress.Progress("run", 1000)
    said, last = [], 0.0
    while clock.seconds < 1000.0:
        clock.seconds += seconds_per_batch
        told.advance()
        if capsys.readouterr().err:
            said.append(clock.seconds - last)
            last = clock.seconds
    assert said[0] <= max(1.0, seconds_per_batch) + 0.11
    assert max(said) <= 30.0 + seconds_per_batch + 0.01
    assert max(said[:5]) <= 5.0 + seconds_per_batch + 0.01
    assert len(said) < 80


def test_a_run_says_first_what_it_is(tmp_path, capsys):
    arguments = ["--method", "natural", "--epochs", "2", "--batch-size", "200", "--validation-steps", "1"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(
        "natural seed 0: 2 epochs of 5 batches of 200 from digits; digits-cnn, linf eps 0.15; fp32 on "
    )


def test_a_validation_that_takes_long_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress.Progress, "_is_due", lambda self: True)
    arguments = ["--method", "natural", "--epochs", "1", "--batch-size", "200", "--validation-steps", "1"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
    assert "natural seed 0 validation: batch 2 of 12" in capsys.readouterr().err


def test_decoding_a_folder_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress.Progress, "_is_due", lambda self: True)
    image = pytest.importorskip("PIL.Image")
    paths = []
    for number in range(3):
        image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    assert torch.equal(ImageFiles(paths, 8, 0).whole(), torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    assert "reading images: batch 1 of 1" in capsys.readouterr().err
