"""The native libraries: other instruction sets, no code that leaks between them, and life without them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from yopo_ext import ops

ROOT = Path(__file__).parent.parent
needs_native = pytest.mark.skipif(not ops.native_status.cpu, reason=str(ops.native_status.why_not_cpu))


def run_operation_tests(keyword: str, **environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/test_operation.py",
        "-k",
        keyword,
    ]
    environment = {**os.environ, "YOPO_TEST_EXAMPLES": "20", **environment}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)


@needs_native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set(isa):
    run_operation_tests("native and (stems or geometry)", YOPO_EXT_ISA=isa)


def test_without_native_libraries_everything_still_works():
    run_operation_tests("reference and stems", YOPO_EXT_NATIVE="0")
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import yopo_ext\n"
        "assert [str(w.message) for w in seen if 'YOPO_EXT_NATIVE is 0' in str(w.message)], seen\n"
        "assert not yopo_ext.build_info()['cpu_kernels']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "YOPO_EXT_NATIVE": "0"})


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_function_is_shared_between_instruction_sets():
    """A weak symbol outside an instruction set's namespace could be the widest one's copy, kept by the linker for all."""
    objects = sorted((ROOT / "build" / "native").glob("CMakeFiles/kernel_*.dir/csrc/cpu/kernel.cpp.o"))
    if not objects:
        pytest.skip("not built from this checkout")
    for path in objects:
        isa = re.search(r"kernel_(\w+)\.dir", str(path)).group(1)
        symbols = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], check=True, capture_output=True, text=True
        )
        leaked = [
            line for line in symbols.stdout.splitlines() if re.search(r" [VWu] ", line) and f"yopo::{isa}::" not in line
        ]
        assert not leaked, "\n".join(leaked)


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_needs_no_python_and_no_unstable_torch():
    library = ROOT / "yopo_ext" / "lib" / "libyopo_ext_cpu.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    assert not re.search(r"\bPy[A-Z_]", symbols)
    assert not re.search(r"_ZNK?(2at|3c10|5torch)", symbols), (
        "a C++ symbol of torch would tie the binary to one version"
    )
