"""Runs generated models and counts what they come to: `python tests/step/generated/tally.py --seeds 20000`.

Outcomes are written to a .jsonl file as they come; a run with the same file goes on behind the seeds that it holds. At the end
the counts go to a .json file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE))
CHUNK = 20


def take(seeds: list[int]) -> list[dict[str, Any]]:
    """The outcomes of some seeds, in this process."""
    import torch
    from compare import Outcome, outcome
    from draft import draw

    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        draft = draw(seed)
        try:
            result = outcome(seed)
        except Exception as error:
            result = Outcome("differs", f"the driver: {type(error).__name__}: {error}")
        found.append({
            "seed": seed, "kind": draft.kind, "status": result.status, "steps": result.steps, "message": result.message,
            "plain": result.plain, "change": draft.steps[result.step].change if result.step >= 0 else "",
        })  # fmt: skip
    return found


def run(seeds: list[int], log: Path, processes: int) -> list[int]:
    """Take the seeds that the log lacks; returns those that ended their process."""
    known = {json.loads(line)["seed"] for line in log.read_text().splitlines()} if log.exists() else set()
    missing = [seed for seed in seeds if seed not in known]
    begun, done, again, lost = time.monotonic(), 0, [], []
    with log.open("a") as out, ProcessPoolExecutor(processes) as pool:
        futures = {
            pool.submit(take, missing[i : i + CHUNK]): missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)
        }
        for future in as_completed(futures):
            try:
                lines = future.result()
            except BrokenProcessPool:
                again += futures[future]
                continue
            _write(out, lines)
            done += len(lines)
            left = (time.monotonic() - begun) / done * (len(missing) - done)
            print(f"{done}/{len(missing)} seeds, about {left / 60:.0f} minutes left", flush=True)
    for seed in again:  # in a process of its own each: one of them ended the process that it ran in
        with log.open("a") as out, ProcessPoolExecutor(1) as pool:
            try:
                _write(out, pool.submit(take, [seed]).result())
            except BrokenProcessPool:
                lost.append(seed)
                print(f"seed {seed} ended its process", flush=True)
    return lost


def _write(out: TextIO, lines: list[dict[str, Any]]) -> None:
    out.writelines(json.dumps(line) + "\n" for line in lines)
    out.flush()
    for line in lines:
        if line["status"] == "differs":
            print(f"seed {line['seed']} ({line['kind']}) differs: {line['message']}", flush=True)


def counts(lines: Iterable[dict[str, Any]], lost: list[int]) -> dict[str, Any]:
    """The tally of outcomes."""
    lines = sorted(lines, key=lambda line: line["seed"])
    kinds = sorted({line["kind"] for line in lines})

    def statuses(chosen: Iterable[dict[str, Any]]) -> dict[str, int]:
        return dict(sorted(Counter(line["status"] for line in chosen).items()))

    return {
        "models": len(lines), "statuses": statuses(lines), "ended_the_process": lost,
        "steps_equal": sum(line["steps"] for line in lines),
        "of_these_to_plain_passes": sum(line["plain"] for line in lines),
        "kinds": {kind: statuses(line for line in lines if line["kind"] == kind) for kind in kinds},
        "refused_by": dict(Counter(line["message"] for line in lines if line["status"] == "refused").most_common()),
        "invalid_by": dict(Counter(line["message"] for line in lines if line["status"] == "invalid").most_common(30)),
        "differs": [line for line in lines if line["status"] == "differs"],
    }  # fmt: skip


def environment() -> dict[str, str]:
    import torch

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "commit": git("rev-parse", "HEAD") + changed, "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20_000, help="how many, from --from on")
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="SEED")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "generated_models.jsonl")
    parser.add_argument("--tally", type=Path, default=HERE / "tally.json")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    seeds = list(range(arguments.start, arguments.start + arguments.seeds))
    lost = run(seeds, arguments.log, arguments.processes)
    lines = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    wanted = set(seeds)
    tally = {"environment": environment()} | counts((line for line in lines if line["seed"] in wanted), lost)
    arguments.tally.write_text(json.dumps(tally, indent=1) + "\n")
    print(json.dumps(tally["statuses"]), f"-> {arguments.tally}")
    if tally["differs"] or lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
