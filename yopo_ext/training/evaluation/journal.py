"""The results of a long evaluation as they come, in a file."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from yopo_ext.training.data.splits import Split, bytes_of
from yopo_ext.training.methods.base import ThreatModel
from yopo_ext.training.run.files import append_line


class Journal:
    """Which images survived which attack, one line per batch in a file, so that a long evaluation can be gone on with.

    Lines count only for the same weights, images and seed, which `fingerprint` stands for.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.known: dict[str, dict[int, bool]] = {}
        self.not_finite: dict[str, set[int]] = {}  # images with logits that are not finite
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):  # a line that a kill cut short
                record = json.loads(line)
                if record["fingerprint"] == fingerprint:
                    attack, images, digits = record["attack"], record["images"], record["correct"]
                    survived = (digit in "1i" for digit in digits)
                    self.known.setdefault(attack, {}).update(zip(images, survived, strict=True))
                    odd = {image for image, digit in zip(images, digits, strict=True) if digit in "in"}
                    self.not_finite.setdefault(attack, set()).update(odd)

    def put(self, attack: str, images: Tensor, correct: Tensor, finite: Tensor) -> None:
        """Note a batch: "1" for correct, "0" for wrong, and with logits that are not finite "i" and "n" for the same."""
        values = zip(correct.tolist(), finite.tolist(), strict=True)
        text = "".join(("n0", "i1")[right][known] for right, known in values)
        record = {"fingerprint": self.fingerprint, "attack": attack, "images": images.tolist(), "correct": text}
        append_line(self.path, record)


def fingerprint(model: nn.Module, split: Split, threat: ThreatModel, seed: int, batch_size: int) -> str:
    """A short text that changes with anything an accuracy depends on, the attack aside."""
    digest = hashlib.sha256(repr(("image-wise, divided", threat, seed, batch_size)).encode())
    for values in model.state_dict().values():
        digest.update(bytes_of(values))
    digest.update(split.identity())
    return digest.hexdigest()[:16]
