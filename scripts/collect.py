"""Gathers finished runs and what `yopo-ext evaluate` found of them into one JSON file, for the documents' tables.

    python scripts/collect.py benchmarks/results/mnist.json RUN ...

A run is a folder of `yopo-ext train`, with the reports of `yopo-ext evaluate RUN/model.pt --out RUN/evaluation-*.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from yopo_ext.training import methods
from yopo_ext.training.checkpoint import write_json
from yopo_ext.training.metrics import MetricsFile


def run_of(folder: Path) -> dict[str, Any]:
    facts, result = (json.loads((folder / name).read_text()) for name in ("run.json", "result.json"))
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("evaluation-*.json"))]
    robust = {name: value for report in reports for name, value in report["robust"].items()}
    return {
        **result,
        "cost": methods.parse(result["method"]).cost().as_dict(),
        "config": {name: value for name, value in facts["config"].items() if name not in ("out", "data_dir")},
        "environment": facts["environment"],
        "samples": reports[0]["samples"],
        "clean": reports[0]["clean"],
        "robust": robust,
        "alarms": sorted({text for report in reports for text in report["alarms"]}),
        "curve": MetricsFile(folder / "metrics.jsonl").read(),
    }


def main(target: str, *runs: str) -> None:
    write_json(Path(target), {"rows": [run_of(Path(run)) for run in runs]})


if __name__ == "__main__":
    main(*sys.argv[1:])
