"""The images that attacks find, as files of eight bits that are still inside the ball."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from yopo_ext.training.methods.base import ThreatModel

SLACK = 1e-4  # of a grey level: the rounding of fp32 pixels


class SavedImages:
    """FOLDER/ATTACK/NUMBER-label-LABEL.png: the number is the image's place in the split."""

    def __init__(self, folder: Path, threat: ThreatModel) -> None:
        self.folder, self.threat = folder, threat
        self.there: dict[str, set[int]] = {}

    def has(self, attack: str, image: int) -> bool:
        """Whether the file was written, by this call or by an interrupted one before it."""
        if attack not in self.there:
            files = self._folder(attack).glob("*-label-*.png")
            self.there[attack] = {int(file.name.partition("-")[0]) for file in files}
        return image in self.there[attack]

    def put(self, attack: str, images: Tensor, x: Tensor, attacked: Tensor, y: Tensor) -> None:
        """Write a batch: its places in the split [B], clean and attacked pixels [B, C, H, W], labels [B]."""
        from PIL import Image

        folder = self._folder(attack)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = eight_bits(x, attacked, self.threat).permute(0, 2, 3, 1).cpu().numpy()
        for number, label, image in zip(images.tolist(), y.tolist(), pixels, strict=True):
            path = folder / f"{number:06d}-label-{label}.png"
            unfinished = path.with_suffix(".tmp")
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(unfinished, format="PNG")
            os.replace(unfinished, path)

    def _folder(self, attack: str) -> Path:
        return self.folder / attack.replace(":", "_")


def eight_bits(x: Tensor, attacked: Tensor, threat: ThreatModel) -> Tensor:
    """The attacked images rounded to eight bits inside the ball around x: uint8 [B, C, H, W].

    L-inf: to the nearest grey level that the ball holds. L2: towards x, and where x lies between two grey levels, which alone may
    take an image out of a small ball, after as much of the perturbation as the ball then has room for.

    Raises:
        ValueError: no image of eight bits is in the ball.
    """
    clean, aim = 255.0 * x.double(), 255.0 * attacked.double()
    if threat.norm == "linf":
        low = (clean - 255.0 * threat.eps - SLACK).ceil().clamp(min=0.0)
        high = (clean + 255.0 * threat.eps + SLACK).floor().clamp(max=255.0)
        if bool((low > high).any()):
            raise _no_room(threat)
        return aim.round().clamp(low, high).to(torch.uint8)
    found = torch.zeros_like(clean)
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for step in range(20, -1, -1):
        shift = (aim - clean) * (step / 20)
        moved = torch.where(shift > 0, (clean + shift + SLACK).floor(), (clean + shift - SLACK).ceil())
        moved = moved if step else clean.round()
        moved = moved.clamp(0.0, 255.0)
        fits = (moved - clean).flatten(1).norm(dim=1) <= 255.0 * threat.eps + SLACK
        found[left & fits] = moved[left & fits]
        left &= ~fits
    if bool(left.any()):
        raise _no_room(threat)
    return found.to(torch.uint8)


def _no_room(threat: ThreatModel) -> ValueError:
    return ValueError(f"eps must be large enough for images of 8 bits to be in the ball; got {threat.eps:.3g}")
