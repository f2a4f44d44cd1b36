"""Each layer knows only the one below: what a file may include or import."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# folder -> (project folders or headers it may include, whether torch's headers, whether CUDA's)
CSRC_RULES = {
    "core": ({"core"}, False, False),
    "cpu": ({"core", "cpu", "launch.h"}, False, False),
    "cuda": ({"core", "cuda", "emulation", "launch.h"}, False, True),
    "emulation": ({"core", "cuda", "emulation", "launch.h"}, False, False),
    "testing": ({"core", "cpu", "cuda", "emulation", "testing", "torch", "launch.h", "pybind11"}, False, False),
    "torch": ({"core", "torch", "launch.h"}, True, False),
}
CUDA_HEADERS = re.compile(r"^(cuda|cooperative_groups|cub|mma\.h|nv/)")


def csrc_files() -> list[Path]:
    return sorted(
        p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"} and p.parent.name != "csrc"
    )


@pytest.mark.parametrize("path", csrc_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_includes(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    assert folder in CSRC_RULES, f"csrc/{folder} has no rule: add one here with its layer"
    allowed, torch_allowed, cuda_allowed = CSRC_RULES[folder]
    ours = {p.name for p in (ROOT / "csrc").iterdir()}
    for header in INCLUDE.findall(path.read_text()):
        first = header.split("/")[0]
        if header.startswith(("torch/csrc/", "torch/headeronly/", "ATen/", "c10/")):
            assert torch_allowed, f"{path.name} includes torch's {header}"
            assert header.startswith(
                ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            ), f"{path.name} includes {header}, which is outside the stable ABI"
        elif first in ours:
            assert first in allowed, f"csrc/{folder} must not know {header}"
        elif CUDA_HEADERS.match(header) and not header.startswith("cuda/"):
            assert cuda_allowed, f"{path.name} includes CUDA's {header}"


# The core's ladder, bottom first: module -> the modules of the package that it imports. Training knows the public names.
PYTHON_CORE: dict[str, set[str]] = {
    # facts and settings
    "_version": set(),
    "constants": set(),
    "compilation": set(),
    "modes": set(),
    "normalisation": set(),
    # the operator and its functions
    "_native": {"_version"},
    "reference": {"constants"},
    "validation": {"constants"},
    "ops": {"_native", "reference"},
    "build": {"_version", "constants", "ops", "validation"},
    "eligibility": {"constants", "ops"},
    "functional": {"compilation", "constants", "eligibility", "ops", "validation"},
    # the first layer as an autograd node
    "node": {"eligibility", "ops", "reference", "validation"},
    "batch_norm_node": {"node", "reference"},
    "opaque": {"compilation", "constants", "node"},
    "first_layer": {"constants", "normalisation"},
    "interposition": {"batch_norm_node", "first_layer", "node", "normalisation", "opaque"},
    # steps and attacks
    "attacks": {"modes", "reference", "validation"},
    "passes": {"first_layer", "functional", "interposition", "node", "normalisation"},
    "guard": {"passes"},
    "preparation": {"attacks", "constants", "guard", "node", "normalisation", "passes", "validation"},
    "step": {"compilation", "modes", "passes", "preparation", "validation"},
    # what a user sees
    "__init__": {"_version", "build", "functional", "step"},
    "__main__": set(),
}


def imports(path: Path) -> set[str]:
    """Modules of the package (by their first name) and foreign packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] if module else [a.name for a in node.names]
            if not module and node.level:
                found |= {"." * node.level + n for n in names}
            else:
                found.add("." * node.level + module)
                if module == "yopo_ext":
                    found |= {f"yopo_ext.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "yopo_ext").glob("*.py")), ids=lambda p: p.name)
def test_core_imports(path):
    names = imports(path)
    own = {n.lstrip(".").split(".")[0] for n in names if n.startswith(".")}
    foreign = {n.split(".")[0] for n in names if not n.startswith(".")}
    assert "training" not in own or path.name == "__main__.py", f"{path.name} must not know yopo_ext.training"
    standard = set(__import__("sys").stdlib_module_names)
    assert foreign <= standard | {"torch", "yopo_ext"}, (
        f"the core depends on torch alone; {path.name} imports {foreign - standard}"
    )
    assert path.stem in PYTHON_CORE, f"{path.name} has no rule: add it to PYTHON_CORE with what it may import"
    assert own <= PYTHON_CORE[path.stem], f"{path.name} must not know {own - PYTHON_CORE[path.stem]}"


def test_the_ladder_has_no_loop_and_no_rule_without_a_module():
    below: set[str] = set()
    for module, known in PYTHON_CORE.items():
        assert known <= below, f"{module} must stand below {known - below}, not above"
        below.add(module)
    assert below == {path.stem for path in (ROOT / "yopo_ext").glob("*.py")}


def test_no_file_outgrows_its_role():
    """A file of more than 400 lines wants to be two."""
    tracked = [
        p
        for d in ("csrc", "yopo_ext")
        for p in (ROOT / d).rglob("*")
        if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"}
    ]
    assert tracked
    long = {str(p.relative_to(ROOT)): n for p in tracked if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long
