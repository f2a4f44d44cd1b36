from importlib.util import find_spec

import numpy as np
import pytest
import torch

from yopo_ext.training.cli.main import main
from yopo_ext.training.evaluation.saved_images import eight_bits
from yopo_ext.training.methods import ThreatModel

pytest.importorskip("PIL")
TRAINED = ["--method", "natural", "--epochs", "1", "--batch-size", "200", "--validation-steps", "1"]


def size(delta, norm):
    return delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 8 / 255), ("linf", 0.3), ("linf", 1 / 500), ("l2", 0.5), ("l2", 0.05)]
)
@pytest.mark.parametrize("levels", [255, 16])
def test_images_of_eight_bits_stay_in_the_ball(norm, eps, levels):
    """Also where the clean image itself lies between two grey levels, as digits with their 17 values do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels + 1, (20, 1, 8, 8), generator=generator) / levels
    delta = torch.randn(x.shape, generator=generator)
    delta = eps * (delta.sign() if norm == "linf" else delta / delta.flatten(1).norm(dim=1)[:, None, None, None])
    attacked = (x + delta).clamp(0.0, 1.0)
    saved = eight_bits(x, attacked, ThreatModel(eps, norm=norm)).double() / 255
    assert (size(saved - x.double(), norm) <= eps + 1e-6).all()
    assert size(saved - attacked.double(), "linf").max() <= (1.001 if norm == "linf" else 2.0) / 255
    if norm == "linf" and levels == 255 and eps == 8 / 255:
        assert torch.equal((saved - attacked.double()).abs() < 1e-6, torch.ones_like(x, dtype=torch.bool))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_ball_between_two_grey_levels_holds_no_image(norm):
    x = torch.full((2, 1, 2, 2), 0.5)  # 127.5 grey levels
    with pytest.raises(ValueError, match=r"eps must be large enough for images of 8 bits.*got 0\.001"):
        eight_bits(x, x, ThreatModel(0.001, norm=norm))


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_command_writes_them(tmp_path, capsys):
    from PIL import Image

    run, folder = tmp_path / "run", tmp_path / "images"
    assert main(["train", *TRAINED, "--out", str(run)]) == 0
    report = ["--out", str(tmp_path / "report.json")]
    command = ["evaluate", str(run / "model.pt"), "--attacks", "pgd-2,cw-1-2", "--samples", "12", *report]
    assert main(command) == 0  # its journal knows no images
    assert main([*command, "--save-images", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["cw-1-2", "pgd-2"]
    files = sorted((folder / "pgd-2").iterdir())
    assert [path.name[:6] for path in files] == [f"{i:06d}" for i in range(12)]
    pixels = np.asarray(Image.open(files[3]))
    assert (pixels.shape, pixels.dtype) == ((8, 8), np.uint8)
    before = files[3].stat().st_mtime_ns
    files[0].unlink()
    assert main([*command, "--save-images", str(folder)]) == 0  # only what is missing is written again
    assert files[0].exists()
    assert files[3].stat().st_mtime_ns == before
