"""Gathers finished runs and what `yopo-ext evaluate` found of them into one JSON file, for the documents' tables.

    python scripts/collect.py benchmarks/results/mnist.json RUN ...

A run is a folder of `yopo-ext train`, with the reports of `yopo-ext evaluate RUN/model.pt --out RUN/evaluation-*.json` and the
journals beside them. Of every attack the file holds which images it and the attacks before it in its report have left
(`survivors`, as `paired.packed` writes them), so that two runs can be compared image by image. A run without reports is a trial.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from paired import packed

from yopo_ext.training import methods
from yopo_ext.training.evaluation.journal import Journal
from yopo_ext.training.run.files import write_json
from yopo_ext.training.run.metrics import MetricsFile


def survivors_of(path: Path) -> dict[str, dict[str, Any]]:
    """Of the report at `path`: by attack, how many images it was tried on, and which of them it and those before it left.

    Raises:
        ValueError: the journal has another result than the report.
    """
    report, lines = json.loads(path.read_text()), Path(f"{path}.journal").read_text().splitlines()
    known = Journal(Path(f"{path}.journal"), json.loads(lines[-1])["fingerprint"]).known
    left = [known["clean"][image] for image in range(report["samples"])]
    found = {"clean": list(left)}
    for name in report["robust"]:
        kind, _, images = name.partition("@")
        outcomes = known.get(name, known.get(kind, {}))
        tried = min(int(images or len(left)), len(left))
        # An attack on survivors has no result for an image that was lost before.
        alone = [outcomes.get(image, False) for image in range(tried)]
        left[:tried] = [before and after for before, after in zip(left, alone, strict=False)]
        found[name] = left[:tried]
        counted = found[name] if report.get("survivors_only") else alone
        if abs(100 * sum(counted) / tried - report["robust"][name]) > 1e-6:
            raise ValueError(f"{path}.journal and {path} disagree about {name}")
    return {name: {"images": len(images), "left": packed(images)} for name, images in found.items()}


def run_of(folder: Path, paths: list[Path]) -> dict[str, Any]:
    """What is kept of a run and its reports."""
    facts, result = facts_of(folder)
    reports = [json.loads(path.read_text()) for path in paths]
    return {
        **result,
        "cost": methods.parse(result["method"]).cost().as_dict(),
        "config": {name: value for name, value in facts["config"].items() if name not in ("out", "data_dir")},
        "environment": facts["environment"],
        "samples": reports[0]["samples"],
        "clean": reports[0]["clean"],
        "robust": {name: value for report in reports for name, value in report["robust"].items()},
        "survivors": {name: found for path in paths for name, found in survivors_of(path).items()},
        "alarms": sorted({text for report in reports for text in report["alarms"]}),
        "curve": MetricsFile(folder / "metrics.jsonl").read(),
        **commit_of(folder),
    }


def trial_of(folder: Path) -> dict[str, Any]:
    """What is kept of a run that was judged on the validation split alone."""
    facts, result = facts_of(folder)
    last = MetricsFile(folder / "metrics.jsonl").read()[-1]
    return {
        "method": result["method"],
        "lr": facts["config"]["lr"],
        "epochs": facts["config"]["epochs"],
        "updates": result["updates"],
        "cost": methods.parse(result["method"]).cost().as_dict(),
        **{name: last.get(name) for name in ("validation_clean", "validation_pgd", "alignment")},
        **commit_of(folder),
    }


def facts_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    facts, result = (json.loads((folder / name).read_text()) for name in ("run.json", "result.json"))
    return facts, result


def commit_of(folder: Path) -> dict[str, str]:
    """The package's commit, where whoever ran it has written it into the folder."""
    path = folder / "commit"
    return {"commit": path.read_text().strip()} if path.exists() else {}


def main(target: str, *runs: str) -> None:
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "trials": []}
    for folder in map(Path, runs):
        if paths := sorted(folder.glob("evaluation-*.json")):
            found["rows"].append(run_of(folder, paths))
        else:
            found["trials"].append(trial_of(folder))
    write_json(Path(target), found)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].endswith(".json"):
        sys.exit(str(__doc__))
    main(*sys.argv[1:])
