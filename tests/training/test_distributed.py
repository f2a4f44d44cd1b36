"""Every method on two processes: the weights get the mean of the processes' gradients."""

import os
import subprocess
import sys
import textwrap

import pytest

from yopo_ext.training.config import TrainConfig
from yopo_ext.training.fabric import make_fabric

METHODS = (
    "natural", "pgd-2", "free-2", "fgsm-rs", "n-fgsm", "fgsm-mep", "trades-2", "trades-2:bn-mode=train", "yopo-2-2",
    "yopo-2-2:train-on=last", "yopo-2-2:update-every=pass:persist", "trades-yopo-2-2",
)  # fmt: skip

# Takes the gradients of the first update twice, by DDP and as the mean of what the processes find for themselves.
PROCESS = textwrap.dedent(
    """
    import sys

    import torch
    import torch.distributed as dist

    from yopo_ext.training.config import TrainConfig
    from yopo_ext.training.data import Dataset
    from yopo_ext.training.datasets import load_dataset
    from yopo_ext.training.trainer import Trainer

    class Updated(Exception):
        pass

    def trainer_of(method):
        config = TrainConfig(method=method, devices=2, accelerator="cpu", batch_size=40)
        return Trainer(config, dataset=few, shown=False)

    def first_gradients(method, alone):
        trainer, found = trainer_of(method), []
        learner = trainer.learner
        if alone:
            learner.replica = learner.module

        def update():
            found.append(torch.cat([p.grad.flatten() for p in learner.module.parameters()]))
            raise Updated

        learner.update = update
        try:
            learner.step(next(trainer.source.epoch(0)), 0, 0.1)
        except Updated:
            pass
        return found[0]

    digits = load_dataset("digits")
    few = Dataset("digits", 10, digits.train.first(160), digits.validation.first(30), digits.test.first(40))
    for method in sys.argv[1:]:
        together, own = (first_gradients(method, alone) for alone in (False, True))
        mean = own.clone()
        dist.all_reduce(mean)
        mean /= 2
        error = ((together - mean).norm() / mean.norm()).item()
        apart = ((own - mean).norm() / mean.norm()).item()
        trainer = trainer_of(method)
        for number, batch in enumerate(trainer.source.epoch(0)):
            trainer.learner.step(batch, number, 0.05)
        weights = torch.cat([p.detach().flatten() for p in trainer.learner.module.parameters()])
        first = weights.clone()
        dist.broadcast(first, 0)
        if dist.get_rank() == 1:
            print(method, error, apart, torch.equal(weights, first), flush=True)
    """
)


@pytest.mark.slow
def test_weights_get_the_mean_of_the_processes_gradients(tmp_path):
    script, log = tmp_path / "process.py", tmp_path / "log"
    script.write_text(PROCESS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        subprocess.run([sys.executable, str(script), *METHODS], env=environment, stdout=file, stderr=file, timeout=300)
    lines = [line.split() for line in log.read_text().splitlines() if line.startswith(METHODS)]
    assert [line[0] for line in lines] == list(METHODS), log.read_text()
    for method, error, apart, equal in lines:
        assert float(error) < 1e-5, method
        assert float(apart) > 0.05, method  # else a missing reduction would not show
        assert equal == "True", method


def test_a_launcher_must_agree_with_the_configuration(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="devices must be the number of processes that were started, 2; got 1"):
        make_fabric(TrainConfig())
