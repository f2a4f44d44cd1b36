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
    "compilation": set(),
    "validation": set(),
    # the operator, and the choice of a backend
    "kernels/__init__": set(),
    "kernels/constants": set(),
    "kernels/native": {"_version"},
    "kernels/reference": {"kernels/constants"},
    "kernels/costs": set(),
    "kernels/library": {"kernels/constants", "kernels/costs", "kernels/reference"},
    "kernels/ops": {"kernels/library", "kernels/native", "kernels/reference"},
    "kernels/dispatch": {
        "compilation", "kernels/constants", "kernels/costs", "kernels/native", "kernels/ops", "kernels/reference",
    },
    "threat": {"kernels/constants", "kernels/reference", "validation"},
    "model_state": set(),
    # the first layer: what it is, and the autograd nodes in its place
    "first_layer/__init__": set(),
    "first_layer/normalisation": {"kernels/reference", "validation"},
    "first_layer/describe": {"kernels/constants", "first_layer/normalisation"},
    "first_layer/fused_node": {
        "kernels/constants", "kernels/dispatch", "kernels/ops", "kernels/reference", "first_layer/normalisation", "threat",
        "validation",
    },
    "first_layer/batch_norm_node": {"first_layer/fused_node", "first_layer/normalisation", "kernels/reference"},
    "first_layer/autograd_node": {
        "compilation", "kernels/constants", "first_layer/fused_node", "first_layer/normalisation", "model_state",
    },
    "first_layer/stand_in": {
        "compilation", "first_layer/autograd_node", "first_layer/batch_norm_node", "first_layer/describe",
        "first_layer/fused_node", "first_layer/normalisation", "model_state", "threat",
    },
    "first_layer/outputs": set(),
    "first_layer/watch": {
        "first_layer/describe", "first_layer/normalisation", "first_layer/outputs", "first_layer/stand_in", "model_state",
    },
    "first_layer/fingerprint": set(),
    "first_layer/inspect": {
        "first_layer/describe", "first_layer/fingerprint", "first_layer/normalisation", "first_layer/watch", "model_state",
        "threat", "validation",
    },
    "first_layer/full_pass": {
        "kernels/constants", "first_layer/describe", "first_layer/fused_node", "first_layer/inspect",
        "first_layer/normalisation", "first_layer/outputs", "first_layer/stand_in", "first_layer/watch", "model_state", "threat",
    },
    # the public calls
    "functional": {"_version", "kernels/constants", "kernels/dispatch", "kernels/ops", "threat", "validation"},
    "attacks": {"first_layer/normalisation", "model_state", "threat", "validation"},
    "problem": {
        "kernels/dispatch", "first_layer/full_pass", "first_layer/inspect", "first_layer/normalisation",
        "first_layer/watch", "model_state", "threat", "validation",
    },
    "step": {"compilation", "first_layer/full_pass", "model_state", "problem", "threat", "validation"},
    "__init__": {"_version", "functional", "step"},
    "__main__": set(),
}  # fmt: skip
PACKAGE = ROOT / "yopo_ext"
CORE_FILES = sorted(p for folder in ("", "first_layer", "kernels") for p in (PACKAGE / folder).glob("*.py"))


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of the package (as in PYTHON_CORE) and foreign packages that a file imports."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            targets = [base / a.name for a in node.names] if base.is_dir() else [base]
            own |= {str(t.relative_to(PACKAGE)) for t in targets}
    return own, foreign


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_core_imports(path):
    own, foreign = imports(path)
    name = str(path.relative_to(PACKAGE).with_suffix(""))
    if name != "__main__":
        standard = set(__import__("sys").stdlib_module_names)
        assert foreign <= standard | {"torch"}, f"the core depends on torch alone; {name} imports {foreign - standard}"
    assert name in PYTHON_CORE, f"{name} has no rule: add it to PYTHON_CORE with what it may import"
    assert own <= PYTHON_CORE[name], f"{name} must not know {own - PYTHON_CORE[name]}"


def test_the_ladder_has_no_loop_and_no_rule_without_a_module():
    below: set[str] = set()
    for module, known in PYTHON_CORE.items():
        assert known <= below, f"{module} must stand below {known - below}, not above"
        below.add(module)
    assert below == {str(path.relative_to(PACKAGE).with_suffix("")) for path in CORE_FILES}


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


# The rooms of yopo_ext/training/ and their floors: a file imports from lower floors and from its own folder, never across a
# floor or upwards. A file that stands in no folder has a floor of its own.
TRAINING_FLOORS: dict[str, int] = {
    "__init__": 0,
    "nearest": 1,
    "numbers": 1,
    "option": 1,
    "torchvision_import": 1,
    "run": 1,
    "optim": 1,
    "data": 2,
    "models": 2,
    "attacks": 2,
    "methods": 3,
    "config": 4,
    "evaluation": 5,
    "loop": 6,
    "comparison": 7,
    "cli": 8,
}
# ThreatModel stands in methods/base.py until the core has one; methods import nothing from attacks.
BORROWED = {("attacks", "methods.base")}
TRAINING = ROOT / "yopo_ext" / "training"


def training_imports(path: Path) -> set[str]:
    """Modules of yopo_ext.training, without that prefix, that a file imports anywhere in its text."""
    prefix = "yopo_ext.training."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; the training package writes names in full"
            inner = node.module == "yopo_ext.training"
            found |= {f"{node.module}.{a.name}" for a in node.names} if inner else {node.module or ""}
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def training_violations(path: Path, floors: dict[str, int]) -> list[str]:
    room = path.relative_to(TRAINING).parts[0].removesuffix(".py")
    found = []
    for module in sorted(training_imports(path)):
        other = module.split(".")[0]
        assert other in floors, f"{path.name} imports {module}, which has no floor"
        if other != room and floors[other] >= floors[room] and (room, module) not in BORROWED:
            found.append(
                f"{path.relative_to(TRAINING)} (floor {floors[room]}) imports {module} (floor {floors[other]})"
            )
    return found


def test_training_ladder():
    rooms = {p.stem for p in TRAINING.iterdir() if p.name != "__pycache__"}
    assert rooms == set(TRAINING_FLOORS), (
        "every folder and file of yopo_ext/training needs a floor, and no other has one"
    )
    assert not [text for path in sorted(TRAINING.rglob("*.py")) for text in training_violations(path, TRAINING_FLOORS)]


def test_training_ladder_notices_a_breach():
    """With the floors of data and loop exchanged, the rule finds the imports that now run upwards."""
    floors = {**TRAINING_FLOORS, "data": 6, "loop": 2}
    assert training_violations(TRAINING / "loop" / "trainer.py", floors)
    assert training_violations(TRAINING / "methods" / "base.py", floors)
    assert not training_violations(TRAINING / "loop" / "trainer.py", TRAINING_FLOORS)
