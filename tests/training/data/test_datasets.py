import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.config.schema import PRESETS, TrainConfig
from yopo_ext.training.data.datasets import DATASETS, load_dataset
from yopo_ext.training.evaluation.evaluate import evaluate
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.models import MODELS, ModelEntry
from yopo_ext.training.torchvision_import import import_torchvision

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


def test_every_data_set_has_its_defaults():
    assert set(PRESETS) == set(DATASETS)


@needs_torchvision
def test_torchvision_imports_in_a_fresh_process():
    """Also where its binary was built for another torch: see `import_torchvision`."""
    script = "from yopo_ext.training.torchvision_import import import_torchvision as i; print(i().__name__, i().datasets.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["torchvision", "torchvision.datasets"], done.stderr


@needs_torchvision
def test_mnist_files(tmp_path):
    import_torchvision()
    generator = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for part, count in (("train", 60), ("t10k", 20)):
        pixels[part] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = struct.pack(">iiii", 2051, count, 28, 28) + pixels[part].tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels.tobytes())
    data = load_dataset("mnist", tmp_path, validation=20)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [40, 20, 20]
    assert data.shape == (1, 28, 28)
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(pixels["t10k"]))
    torch.testing.assert_close(data.test.x()[3, 0, 5, 7].item(), pixels["t10k"][3, 5, 7] / 255, rtol=1e-6, atol=0)
    seen = torch.cat([data.train.images, data.validation.images]).flatten(1)
    assert len(seen.unique(dim=0)) == 60


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of noise, eight images each for training and two for testing; some grey."""
    import_torchvision()
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(100 * label, 100 * label + 50, (30, 40, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert("L" if number == 0 else "RGB")
                image.save(tmp_path / part / name / f"{number}.png")
    return tmp_path


@needs_torchvision
def test_image_folders_with_other_classes_for_testing(image_folder):
    (image_folder / "val" / "cat").rename(image_folder / "val" / "ant")
    with pytest.raises(ValueError, match="same class folders for training and testing; only in one: ant, cat"):
        load_dataset("imagefolder", image_folder, validation=4, image_size=16)


@needs_torchvision
@pytest.mark.parametrize("workers", [None, 0, 2])
def test_image_folders(image_folder, workers):
    data = load_dataset("imagefolder", image_folder, validation=4, image_size=16, workers=workers)
    assert data.classes == 2
    assert data.shape == (3, 16, 16)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [12, 4, 4]
    means = data.test.x().mean((1, 2, 3))
    assert ((means > 75 / 255) == data.test.labels.bool()).all()
    whole = load_dataset("imagefolder", image_folder, validation=4, image_size=16)
    index = torch.tensor([7, 0, 3])
    assert torch.equal(data.train.x(index), whole.train.x(index))
    assert torch.equal(data.train.first(3).x(slice(1, 3)), whole.train.x(slice(1, 3)))
    first, second = data.train.stream([index, index[:1]])
    assert torch.equal(first, whole.train.x(index))
    assert torch.equal(second, whole.train.x(index[:1]))
    with pytest.raises(ValueError, match="data_dir must hold a folder train of class folders"):
        load_dataset("imagefolder", image_folder / "train", validation=4)


@needs_torchvision
def test_images_left_in_their_files_change_nothing_but_the_memory(image_folder, monkeypatch):
    """Training, kept perturbations and evaluation, bit for bit."""

    def build(channels, classes):
        first = nn.Conv2d(channels, 8, 5, stride=2, padding=2)
        return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, classes))

    monkeypatch.setitem(MODELS, "small-net", ModelEntry(build))
    weights = []
    for workers in (None, 2):
        config = TrainConfig(
            dataset="imagefolder", data_dir=str(image_folder), image_size=32, workers=workers, validation_size=4,
            model="small-net", method="yopo-1-2:persist", epochs=2, batch_size=4, validation_steps=1, threads=1,
        )  # fmt: skip
        trainer = Trainer(config, shown=False)
        state_before = torch.get_rng_state()
        list(trainer.source.epoch(0))
        assert torch.equal(torch.get_rng_state(), state_before)
        result = trainer.fit()
        found = evaluate(result.network, result.dataset.test, trainer.learner.threat, [PgdAttack(1)])
        weights.append((found, *result.network.state_dict().values()))
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(a, b) for a, b in zip(weights[0][1:], weights[1][1:], strict=True))


@needs_torchvision
def test_images_that_do_not_fit_into_memory(image_folder, monkeypatch):
    monkeypatch.setattr("yopo_ext.training.data.datasets.available_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="workers must be given for images that do not fit into memory: the 16 of"):
        load_dataset("imagefolder", image_folder, validation=4, image_size=16)
    load_dataset("imagefolder", image_folder, validation=4, image_size=16, workers=0)


@needs_torchvision
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_nothing_is_downloaded_unasked(tmp_path, name):
    with pytest.raises(ValueError, match=f"data_dir must hold {name}, or give download"):
        load_dataset(name, tmp_path)
    assert not list(tmp_path.rglob("*.gz"))


@pytest.mark.parametrize("validation", [9, 1340])
def test_validation_must_leave_samples_of_every_class(validation):
    with pytest.raises(ValueError, match=r"validation_size must be between 10 and 1337; got"):
        load_dataset("digits", validation=validation)
