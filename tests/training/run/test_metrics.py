import json
from importlib.util import find_spec

import pytest

from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.run.metrics import EpochLog, MetricsFile


def test_metrics_after_a_resume(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.keep_through(3)
    for epoch in (1, 2, 3):
        metrics.append({"epoch": epoch})
    with metrics.path.open("a") as file:
        file.write('{"epoch": 4, "lo')  # cut short by a kill
    metrics.append({"epoch": 5})  # starts a line of its own
    assert [r["epoch"] for r in metrics.read()] == [1, 2, 3, 5]
    metrics.keep_through(2)
    metrics.append({"epoch": 3, "again": True})
    records = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert records == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3, "again": True}]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_an_interrupted_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EpochLog(tmp_path, tensorboard=True, epoch=0, updates=0)
    for epoch in (1, 2, 3):
        log.append({"epoch": epoch, "updates": 10 * epoch, "loss": epoch / 2})
    log.close()
    log = EpochLog(tmp_path, tensorboard=True, epoch=2, updates=25)  # saved in the third epoch, killed after it
    log.append({"epoch": 3, "updates": 30, "loss": 9.0, "alarm": "collapsed"})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(10, 0.5), (20, 1.0), (30, 9.0)]
    assert "alarm/text_summary" in board.Tags()["tensors"]
    assert [record["epoch"] for record in log.file.read()] == [1, 2, 3]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_run_writes_tensorboard_files_only_when_asked(few_digits, tmp_path):
    for wanted in (False, True):
        out = tmp_path / str(wanted)
        config = TrainConfig(method="natural", epochs=1, tensorboard=wanted, out=str(out))
        Trainer(config, dataset=few_digits, shown=False).fit()
        assert (out / "tensorboard").exists() == wanted
        assert (out / "metrics.jsonl").exists()


def test_without_tensorboard_the_message_says_what_to_install(few_digits, monkeypatch):
    monkeypatch.setattr("yopo_ext.training.run.metrics.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard needs a package: pip install tensorboard"):
        Trainer(TrainConfig(method="natural", tensorboard=True), dataset=few_digits, shown=False)
