"""Runs rows of the table in a process of its own and writes one line of JSON per outcome.

python fault_worker.py SETTING OUT RANK STORE < names of rows, one per line
"""

from __future__ import annotations

import importlib
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from fault_rows import TWO_PROCESSES, Row, Setting

BROKEN = ("gloo", "Connection closed", "timed out", "Timed out")


def table(but: str = "test_faults_oracle") -> dict[str, Row]:
    """Every row of every group by its name."""
    names = [path.stem for path in sorted(Path(__file__).parent.glob("test_faults_*.py"))]
    modules = [importlib.import_module(name) for name in names if name != but]
    return {row.name: row for module in modules for row in module.ROWS}


def main(setting: str, out: str, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    rows, names = table(), sys.stdin.read().splitlines()
    exchange = None
    if setting == TWO_PROCESSES:
        exchange = dist.FileStore(f"{store}-rows", 2)
        exchange.set_timeout(timedelta(seconds=15))
        begin(store, rank)
    with Path(out).open("a") as lines:
        for i, name in enumerate(names):
            outcome = rows[name].outcome(Setting(setting, rank))
            lines.write(json.dumps([name, outcome]) + "\n")
            lines.flush()
            if exchange is None:
                continue
            # A row that ended differently here and there may have left a collective call half done.
            kind = outcome.split(":")[0]
            if kind.startswith("raised") and any(word in outcome for word in BROKEN):
                kind = f"broken on {rank}"
            exchange.set(f"{i} {rank}", kind)
            if exchange.get(f"{i} {1 - rank}").decode() != kind:
                dist.destroy_process_group()
                begin(f"{store}-{i}", rank)
    if exchange is not None:
        dist.destroy_process_group()


def begin(store: str, rank: int) -> None:
    """A process group that nothing has used."""
    timeout = timedelta(seconds=8)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
