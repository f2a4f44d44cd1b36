"""The README's figures come from the committed JSON files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_those_of_the_results():
    subprocess.run([sys.executable, ROOT / "scripts" / "readme.py", "--check"], check=True)


def test_a_changed_figure_is_noticed(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    readme = (ROOT / "README.md").read_text()
    head, mark, rest = readme.partition("<!-- table:first_layer_cpu -->\n")
    assert mark
    (tmp_path / "README.md").write_text(head + mark + "x" + rest)
    for folder in ("docs", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    assert subprocess.run([sys.executable, tmp_path / "scripts" / "readme.py", "--check"], check=False).returncode == 1


def test_counted_instructions_keep_to_their_budgets():
    """Counted after a change to the CUDA kernels, as docs/kernels.md says."""
    counted = json.loads((ROOT / "benchmarks" / "results" / "warp_instructions.json").read_text())["cases"]
    for line in (ROOT / "benchmarks" / "warp_instructions.toml").read_text().splitlines():
        if line and not line.startswith("#"):
            name, most = line.split(" = ")
            assert counted[name]["warp_instructions_per_image"]["now"] <= int(most), name


def test_the_links_lead_somewhere():
    import re

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
