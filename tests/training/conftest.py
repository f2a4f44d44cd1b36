from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

# Looked up, not imported: collecting tests should not take seconds.
if any(find_spec(name) is None for name in ("jsonargparse", "lightning_fabric", "matplotlib", "sklearn", "tqdm")):
    collect_ignore_glob = ["*/test_*.py"]
else:
    from yopo_ext.training.data.datasets import load_dataset
    from yopo_ext.training.data.splits import Dataset


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def few_digits(digits) -> Dataset:
    """Digits cut down to what a test of mechanics needs."""
    return Dataset("digits", 10, digits.train.first(160), digits.validation.first(30), digits.test.first(40))


@pytest.fixture(autouse=True)
def threads_put_back():
    """A run may set PyTorch's number of threads; the next test must not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
