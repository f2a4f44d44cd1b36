"""The native libraries: other instruction sets, no code that leaks between them, and life without them."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import LAYOUTS, cases, make_arguments
from hypothesis import given, settings
from instruction_sets import NEEDED, supported
from policy import check_update
from processes import call
from test_operation import STEMS

from yopo_ext.kernels import ops
from yopo_ext.kernels.constants import NORMS

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(not ops.native_status.cpu, reason=str(ops.native_status.why_not_cpu))


def check_instruction_set() -> str:
    """The operator's stems and random geometries against the oracle; the instruction set that ran."""
    for stem, norm, layout in itertools.product(STEMS.values(), NORMS, LAYOUTS):
        arguments = make_arguments(**stem, steps=3, norm=norm, x_layout=layout, costate_layout=layout)
        check_update(ops.first_layer_update, arguments)

    @settings(max_examples=20, deadline=None, database=None)
    @given(case=cases())
    def any_geometry(case) -> None:
        check_update(ops.first_layer_update, make_arguments(**case))

    any_geometry()
    return ops.first_layer_variant(*make_arguments())


@needs_native
@pytest.mark.parametrize("isa", NEEDED)
def test_every_instruction_set(isa, tmp_path):
    """The set is chosen in a process' first call; an unknown or unsupported one falls back, so the test asks which ran."""
    if not supported(isa):
        pytest.skip(f"this processor has no {isa}")
    assert call(check_instruction_set, folder=tmp_path, environment={"YOPO_EXT_ISA": isa}) == isa


@needs_native
def test_this_process_runs_the_set_that_was_asked_for():
    """Without YOPO_EXT_ISA the widest of the processor; a suite run under YOPO_EXT_ISA must not test another set."""
    widest = next(isa for isa in NEEDED if supported(isa))
    assert ops.first_layer_variant(*make_arguments()) == os.environ.get("YOPO_EXT_ISA", widest)


def test_without_native_libraries_everything_still_works():
    """A new process, for the libraries are loaded by the import."""
    code = (
        "import sys, warnings\n"
        f"sys.path[:0] = {[str(ROOT / 'tests')]!r}\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import yopo_ext.kernels.ops\n"
        "assert [str(w.message) for w in seen if 'YOPO_EXT_NATIVE is 0' in str(w.message)], seen\n"
        "assert not yopo_ext.build_info()['cpu_kernels']\n"
        "from cases import make_arguments\n"
        "from policy import check_update\n"
        "from test_operation import STEMS\n"
        "for stem in STEMS.values():\n"
        "    for norm in ('linf', 'l2'):\n"
        "        check_update(yopo_ext.kernels.ops.first_layer_update_reference, make_arguments(**stem, steps=3, norm=norm))\n"
        "a = make_arguments(steps=1)\n"
        "yopo_ext.adversary_steps(*a[:4], padding=1, eps=0.1, step_size=0.02)\n"
    )
    environment = {**os.environ, "YOPO_EXT_NATIVE": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


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
