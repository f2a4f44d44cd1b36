"""The README's figures come from the committed JSON files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_those_of_the_results():
    subprocess.run([sys.executable, ROOT / "scripts" / "readme.py", "--check"], check=True)


def test_a_changed_figure_is_noticed(tmp_path):
    for name in ("scripts", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = tmp_path / "readme.py"
    script.write_text(
        (ROOT / "scripts" / "readme.py").read_text().replace("Path(__file__).parent.parent", f"Path({str(tmp_path)!r})")
    )
    readme = (ROOT / "README.md").read_text()
    head, mark, rest = readme.partition("<!-- table:first_layer_cpu -->\n")
    assert mark
    (tmp_path / "README.md").write_text(head + mark + "x" + rest)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 1


def test_the_links_lead_somewhere():
    import re

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
