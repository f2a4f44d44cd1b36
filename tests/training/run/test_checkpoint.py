import json
import os

import pytest
import torch

from yopo_ext.training.run.checkpoint import load_checkpoint, save_checkpoint
from yopo_ext.training.run.files import write_atomically, write_json

STATE = {"config": {"eps": 0.1}, "model": {"weight": torch.arange(3.0)}}


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "deep" / "a.pt", STATE)
    state = load_checkpoint(tmp_path / "deep" / "a.pt")
    assert state["config"] == STATE["config"]
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert os.listdir(tmp_path / "deep") == ["a.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"version": 1})

    def half(file):
        file.write(b"half of")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == {"version": 1}
    assert os.listdir(tmp_path) == ["a.json"]


class Code:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("content", [{"config": {}, "model": Code()}, {"weights": 1}, [1, 2]])
def test_only_checkpoints_without_code_are_read(tmp_path, content):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt is not a (readable )?checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")


def test_truncated_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pt")
    save_checkpoint(tmp_path / "a.pt", STATE)
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
