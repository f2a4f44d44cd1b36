"""What the documents' tables share: where results lie, and how a table is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine(environment: dict[str, Any]) -> str:
    torch = environment.get("torch") or environment["packages"]["torch"]
    date = f", {environment['date']}" if "date" in environment else ""
    processor = environment.get("gpu") or f"{environment['cpu']} ({environment['cores']} cores)"
    return f"{processor}, torch {torch}{date}"


def rows_of(file: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{file}.json").read_text())["rows"]
