"""Every method on two processes: the weights get the mean of the processes' gradients."""

import json
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.datasets import load_dataset
from yopo_ext.training.data.splits import Dataset
from yopo_ext.training.loop.fabric import make_fabric
from yopo_ext.training.loop.trainer import Trainer

METHODS = (
    "natural", "pgd-2", "free-2", "fgsm-rs", "n-fgsm", "fgsm-mep", "trades-2", "trades-2:bn-mode=train", "yopo-2-2",
    "yopo-2-2:train-on=last", "yopo-2-2:update-every=pass:persist", "trades-yopo-2-2",
)  # fmt: skip


class UpdateReachedError(Exception):
    pass


def trainer_of(method, few):
    config = TrainConfig(method=method, devices=2, accelerator="cpu", batch_size=40)
    return Trainer(config, dataset=few, shown=False)


def first_gradients(method, few, alone):
    trainer, found = trainer_of(method, few), []
    learner = trainer.learner
    if alone:
        learner.replica = learner.module

    def update():
        found.append(torch.cat([p.grad.flatten() for p in learner.module.parameters()]))
        raise UpdateReachedError

    learner.update = update
    with suppress(UpdateReachedError):
        learner.step(next(trainer.source.epoch(0)), 0, 0.1)
    return found[0]


def compare_gradients(methods, file):
    """In each of two processes: the gradients of the first update by DDP, and the mean of what the processes find alone."""
    digits, results = load_dataset("digits"), []
    few = Dataset("digits", 10, digits.train.first(160), digits.validation.first(30), digits.test.first(40))
    for method in methods:
        together, own = (first_gradients(method, few, alone) for alone in (False, True))
        mean = own.clone()
        dist.all_reduce(mean)
        mean /= 2
        error = ((together - mean).norm() / mean.norm()).item()
        apart = ((own - mean).norm() / mean.norm()).item()
        trainer = trainer_of(method, few)
        for number, batch in enumerate(trainer.source.epoch(0)):
            trainer.learner.step(batch, number, 0.05)
        weights = torch.cat([p.detach().flatten() for p in trainer.learner.module.parameters()])
        first = weights.clone()
        dist.broadcast(first, 0)
        results.append((method, error, apart, torch.equal(weights, first)))
    if dist.get_rank() == 1:
        file.write_text(json.dumps(results))


def test_weights_get_the_mean_of_the_processes_gradients(tmp_path):
    file, log = tmp_path / "results.json", tmp_path / "log"
    assert run_ranks(compare_gradients, METHODS, file, log=log) == [0, 0], log.read_text()
    results = json.loads(file.read_text())
    assert [result[0] for result in results] == list(METHODS)
    for method, error, apart, equal in results:
        assert error < 1e-5, method
        assert apart > 0.05, method  # else a missing reduction would not show
        assert equal, method


def test_a_launcher_must_agree_with_the_configuration(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="devices must be the number of processes that were started, 2; got 1"):
        make_fabric(TrainConfig())
