"""Outcomes of the table of faults: here, in a process without native kernels, and in two processes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_rows import COMPILED, EAGER, INDUCTOR, REFERENCE, TWO_PROCESSES, Row, Setting

WORKER = Path(__file__).with_name("fault_worker.py")
ROOT = Path(__file__).parents[3]


def _spawned(setting: str, names: list[str], folder: Path, ranks: int) -> dict[str, list[str]]:
    """Outcomes of the rows by name, one per process. A row that ends the processes is noted; new ones do the rest."""
    found: dict[str, list[str]] = {}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    if setting == REFERENCE:
        environment["YOPO_EXT_NATIVE"] = "0"
    attempt = 0
    while names:
        attempt += 1
        outs = [folder / f"{attempt}-{rank}.jsonl" for rank in range(ranks)]
        store = folder / f"{attempt}-store"
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), setting, str(out), str(rank), str(store)],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank, out in enumerate(outs)
        ]  # fmt: skip
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n".join(names))
            process.stdin.close()
        errors = []
        for process in processes:
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                process.kill()
            assert process.stderr is not None
            errors.append(process.stderr.read()[-500:])
        done = [dict(json.loads(line) for line in out.read_text().splitlines()) if out.exists() else {} for out in outs]
        complete = [name for name in names if all(name in part for part in done)]
        found |= {name: [part[name] for part in done] for name in complete}
        names = [name for name in names if name not in found]
        if not complete and names:
            found[names[0]] = [f"ended the process: {error}" for error in errors]
            names = names[1:]
    return found


@pytest.fixture(scope="session")
def spawned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """The outcomes in a setting that needs processes of its own; all rows that were asked for run in one go.

    The test processes of one run share them: the first that asks runs them, the others wait.
    """
    kept: dict[str, dict[str, list[str]]] = {}

    def outcomes(setting: str) -> dict[str, list[str]]:
        if setting not in kept:
            cells = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            names = [c["row"].name for c in cells if isinstance(c.get("row"), Row) and c["setting"] == setting]
            ranks = 2 if setting == TWO_PROCESSES else 1
            folder = tmp_path_factory.getbasetemp()
            folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
            file = folder / f"outcomes of {setting}.json"
            with (folder / f"{file.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not file.exists():
                    file.write_text(json.dumps(_spawned(setting, names, tmp_path_factory.mktemp("rows"), ranks)))
            kept[setting] = json.loads(file.read_text())
        return kept[setting]

    return outcomes


@pytest.fixture
def outcome(spawned: Callable[[str], dict[str, list[str]]]) -> Callable[[Row, str], set[str]]:
    """What a row came to in a setting, over its processes."""

    def find(row: Row, setting: str) -> set[str]:
        if setting in (EAGER, COMPILED, INDUCTOR):
            return {row.outcome(Setting(setting))}
        assert setting in (REFERENCE, TWO_PROCESSES)
        return set(spawned(setting)[row.name])

    return find
