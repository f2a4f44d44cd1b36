"""Prints the requirements of the named extras of pyproject.toml, one a line."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

extras = read_configuration(Path(__file__).parent.parent / "pyproject.toml", expand=False)["project"][
    "optional-dependencies"
]
print("\n".join(requirement for name in sys.argv[1:] for requirement in extras[name]))
