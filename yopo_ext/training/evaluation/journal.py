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
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):  # a line that a kill cut short
                record = json.loads(line)
                if record["fingerprint"] == fingerprint:
                    survived = (digit == "1" for digit in record["correct"])
                    self.known.setdefault(record["attack"], {}).update(zip(record["images"], survived, strict=True))

    def put(self, attack: str, images: Tensor, correct: Tensor) -> None:
        text = "".join("1" if value else "0" for value in correct.tolist())
        record = {"fingerprint": self.fingerprint, "attack": attack, "images": images.tolist(), "correct": text}
        append_line(self.path, record)


def fingerprint(model: nn.Module, split: Split, threat: ThreatModel, seed: int, batch_size: int) -> str:
    """A short text that changes with anything an accuracy depends on, the attack aside."""
    digest = hashlib.sha256(repr(("image-wise", threat, seed, batch_size)).encode())
    for values in model.state_dict().values():
        digest.update(bytes_of(values))
    digest.update(split.identity())
    return digest.hexdigest()[:16]
