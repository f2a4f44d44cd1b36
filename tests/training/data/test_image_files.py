"""Image files of every kind that a folder may hold: scaled to eight bits, or refused by name."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from yopo_ext.training.data.datasets import load_dataset
from yopo_ext.training.data.image_files import ImageFiles

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
SIZE = 12


def save(path, pixels):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def grey(bits):
    """A picture of all grey values, in so many bits."""
    values = np.linspace(0, 2**bits - 1, SIZE * SIZE).round().reshape(SIZE, SIZE)
    return values.astype(np.uint8 if bits == 8 else np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    files = ImageFiles([save(tmp_path / name, grey(16))], SIZE, 0)
    expected = (torch.from_numpy(grey(16).astype(np.float64)) / 257).round().to(torch.uint8)
    assert torch.equal(files[0], expected.expand(3, SIZE, SIZE))
    assert len(files[0].unique()) > 100


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused_by_file_name(tmp_path, dtype):
    path = save(tmp_path / "deep.tiff", np.linspace(0.0, 1.0, SIZE * SIZE).reshape(SIZE, SIZE).astype(dtype))
    with pytest.raises(OSError, match=r"deep\.tiff.*convert it to 8 or 16 bits"):
        ImageFiles([path], SIZE, 0)[0]


@pytest.mark.parametrize("bits", [8, 16])
def test_one_channel_images(tmp_path, bits):
    files = ImageFiles([save(tmp_path / "a.png", grey(bits))], SIZE, 0, channels=1)
    assert files.shape == (1, 1, SIZE, SIZE)
    assert torch.equal(files[0], ImageFiles([str(tmp_path / "a.png")], SIZE, 0)[0][:1])
    assert torch.equal(files.whole()[0], files[0])
    assert torch.equal(files.subset(torch.tensor([0]))[0], files[0])


def folder(tmp_path, images=4):
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            for number in range(images):
                pixels = np.full((SIZE, SIZE), 100 * label + number, np.uint8)
                save(tmp_path / part / name / f"{number}.png", pixels)
    return tmp_path


def test_a_folder_of_one_channel(tmp_path):
    data = load_dataset("imagefolder", folder(tmp_path), validation=2, image_size=SIZE, image_channels=1)
    assert data.shape == (1, SIZE, SIZE)
    assert ((data.test.x().mean((1, 2, 3)) > 0.2) == data.test.labels.bool()).all()
    with pytest.raises(ValueError, match="image_channels must be 1 or 3; got 2"):
        load_dataset("imagefolder", tmp_path, validation=2, image_channels=2)


@pytest.mark.parametrize("workers", [None, 0, 2])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_image_is_named(tmp_path, workers, damage):
    broken = folder(tmp_path) / "train" / "dog" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes({"cut": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage])

    def read():
        data = load_dataset("imagefolder", tmp_path, validation=2, image_size=SIZE, workers=workers)
        data.train.x()
        data.validation.x()

    with pytest.raises(OSError, match=r"dog/2\.png cannot be read: ") as error:
        read()
    assert "\n" not in str(error.value)
