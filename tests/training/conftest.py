from __future__ import annotations

import fcntl
import itertools
import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

# Looked up, not imported: collecting tests should not take seconds.
if any(find_spec(name) is None for name in ("yaml", "lightning_fabric", "matplotlib", "sklearn", "tqdm")):
    collect_ignore_glob = ["*/test_*.py"]
else:
    from yopo_ext.training.config.schema import TrainConfig
    from yopo_ext.training.data.datasets import load_dataset
    from yopo_ext.training.data.splits import Dataset
    from yopo_ext.training.loop.trainer import Trainer


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def few_digits(digits) -> Dataset:
    """Digits cut down to what a test of mechanics needs."""
    return Dataset("digits", 10, digits.train.first(160), digits.validation.first(30), digits.test.first(40))


@pytest.fixture(scope="session")
def robust_model(digits, tmp_path_factory) -> torch.nn.Module:
    """A network that withstands attacks. One test process trains it; the others take it from the folder of its run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # all processes of this call of pytest, and no other call, have this folder
    config = TrainConfig(method="pgd-3", epochs=6, validate_every=6, out=str(shared / "robust-model"), resume="auto")
    with open(shared / "robust-model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Trainer(config, dataset=digits, shown=False).fit().network


@pytest.fixture
def counting_clock(monkeypatch):
    """The clock of `--stop-after` moves on by one second whenever it is read: a run's stops depend on no machine's speed."""
    monkeypatch.setattr("yopo_ext.training.run.deadline.time", SimpleNamespace(monotonic=itertools.count().__next__))


@pytest.fixture(autouse=True)
def threads_put_back():
    """A run may set PyTorch's number of threads; the next test must not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
