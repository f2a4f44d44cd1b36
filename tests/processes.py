"""Processes for tests, forked from a server that has imported the package: 0.3 CPU seconds a start instead of 6."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

LIMIT = 300  # seconds
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


def _child(target: Callable[..., Any], arguments: tuple, environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    status = target(*arguments)
    sys.stdout.flush()
    sys.exit(status)


def start(
    target: Callable[..., Any], *arguments: Any, log: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Run `target`, a function of a test module, in a process of its own; its result is the exit status (None: 0).

    What it prints is appended to `log`. `environment` is set in the process, after torch's and the package's import.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    try:
        process = _context.Process(target=_child, args=(target, arguments, environment or {}, log), daemon=True)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def finished(process: BaseProcess, log: Path) -> int:
    """The exit status, negative for a signal; an AssertionError with the log if the process does not end."""
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the process did not end within {LIMIT} seconds:\n{log.read_text()}")
    return process.exitcode


def run_ranks(
    target: Callable[..., Any], *arguments: Any, log: Path, ranks: int = 2, environment: dict[str, str] | None = None
) -> list[int]:
    """Run `target` in `ranks` processes, as torchrun starts them, and wait; the exit statuses.

    The store at which they meet is made here, on a port that the system chooses, and stays open: no other process can take it.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", **(environment or {}),
    }  # fmt: skip
    processes = [
        start(target, *arguments, log=log, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    return [finished(process, log) for process in processes]


def _answer(target: Callable[..., Any], arguments: tuple, file: Path) -> None:
    file.write_bytes(pickle.dumps(target(*arguments)))


def call(target: Callable[..., Any], *arguments: Any, folder: Path, environment: dict[str, str] | None = None) -> Any:
    """What `target` returns in a process of its own; an AssertionError with what it printed if it raises."""
    log, file = folder / "log", folder / "answer"
    status = finished(start(_answer, target, arguments, file, log=log, environment=environment), log)
    assert status == 0, log.read_text()
    return pickle.loads(file.read_bytes())
