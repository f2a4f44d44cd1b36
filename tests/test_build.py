"""What the build decides: CUDA kernels for the GPUs that the driver lists, and for no others unless YOPO_CUDA=ON insists."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALL = "80;86;89;90;100;120"

DRIVER = """
static const int capabilities[] = {CAPABILITIES -1};
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int* count) { *count = sizeof capabilities / sizeof(int) - 1; return 0; }
int cuDeviceGet(int* device, int number) { *device = 100 + number; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int capability = capabilities[device - 100];
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return 0;
}
"""


def environment_with_gpus(folder: Path, capabilities: list[int] | None, init: int = 0) -> dict[str, str]:
    """Where the CUDA driver lists these GPUs; None: where it cannot be loaded."""
    library = folder / "libcuda.so.1"
    if capabilities is None:
        library.write_text("not a library")
    else:
        source = folder / "driver.c"
        listed = "".join(f"{capability}, " for capability in capabilities)
        source.write_text(DRIVER.replace("CAPABILITIES", listed).replace("INIT", str(init)))
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run_script(
    folder: Path, environment: dict[str, str], call: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    script = folder / "decide.cmake"
    script.write_text(
        f"include({ROOT}/csrc/cuda/choose.cmake)\n{call}\n"
        'message("targets=${YOPO_CUDA_TARGETS}")\nmessage("reason=${YOPO_CUDA_REASON}")\n'
    )
    settings = [f"-D{name}={value}" for name, value in {"Python3_EXECUTABLE": sys.executable, **variables}.items()]
    return subprocess.run(
        ["cmake", *settings, "-P", script], capture_output=True, text=True, env=environment, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("cuda", "gpus", "asked", "targets", "reason"),
    [
        ("AUTO", None, "", "", "there is no CUDA driver; YOPO_CUDA=ON builds them anyway"),
        ("AUTO", [], "", "", "the CUDA driver lists no GPU; YOPO_CUDA=ON builds them anyway"),
        ("AUTO", None, "90", "", "there is no CUDA driver; YOPO_CUDA=ON builds them anyway"),
        ("AUTO", [90], "", "90", ""),
        ("AUTO", [120, 89, 120, 75], "", "89;120", ""),
        ("AUTO", [75], "", "", "GPUs need compute capability 8.0 or higher"),
        ("AUTO", [90], "80;100", "80;100", ""),
        ("ON", None, "", ALL, ""),
        ("ON", [75], "", ALL, ""),
        ("ON", [90], "", "90", ""),
        ("ON", [90], ALL, ALL, ""),
        ("ON", None, "native", "native", ""),
        ("OFF", [90], "", "", "YOPO_CUDA=OFF"),
    ],
)
def test_cuda_kernels_are_built_for_the_gpus_that_are_seen(tmp_path, cuda, gpus, asked, targets, reason):
    environment = environment_with_gpus(tmp_path, gpus)
    done = run_script(tmp_path, environment, "yopo_choose_cuda()", YOPO_CUDA=cuda, YOPO_CUDA_ARCHITECTURES=asked)
    assert done.returncode == 0, done.stderr
    assert f"targets={targets}\n" in done.stderr
    assert f"reason={reason}" in done.stderr
    assert ("reason=\n" in done.stderr) == (reason == "")


def test_a_driver_that_does_not_work_is_no_gpu(tmp_path):
    done = run_script(tmp_path, environment_with_gpus(tmp_path, [90], init=803), "yopo_choose_cuda()", YOPO_CUDA="AUTO")
    assert "reason=the CUDA driver answers cuInit with error 803" in done.stderr


def test_a_wrong_setting_is_named(tmp_path):
    done = run_script(tmp_path, dict(os.environ), "yopo_choose_cuda()", YOPO_CUDA="YES")
    assert done.returncode != 0
    assert "YOPO_CUDA must be AUTO, ON or OFF; got 'YES'" in done.stderr


@pytest.mark.parametrize(("cuda", "status"), [("AUTO", 0), ("ON", 1)])
def test_a_compiler_older_than_the_gpu(tmp_path, cuda, status):
    nvcc = executable(tmp_path / "nvcc", "echo sm_80; echo sm_90; echo sm_90a\n")
    call = f"yopo_check_cuda_compiler({nvcc})"
    done = run_script(tmp_path, dict(os.environ), call, YOPO_CUDA=cuda, YOPO_CUDA_TARGETS="80;120")
    assert done.returncode == status
    assert "cannot build for sm_120" in " ".join(done.stderr.split())
    done = run_script(tmp_path, dict(os.environ), call, YOPO_CUDA=cuda, YOPO_CUDA_TARGETS="80;90a-real;native")
    assert done.returncode == 0
    assert "reason=\n" in done.stderr


def test_without_a_gpu_nvcc_is_not_even_called_and_ccache_is(tmp_path):
    environment = environment_with_gpus(tmp_path, None)
    executable(tmp_path / "bin" / "nvcc", f"echo called > {tmp_path}/nvcc-was-called; exit 1\n")
    ccache = executable(tmp_path / "bin" / "ccache", 'exec "$@"\n')
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    environment.pop("CUDACXX", None)
    build = tmp_path / "build"
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "nvcc-was-called").exists()
    info = json.loads((build / "build_info.json").read_text())
    assert (info["cuda_runtime_version"], info["cuda_architectures"]) == (0, "")
    assert info["cuda_reason"].startswith("there is no CUDA driver")
    assert f"LAUNCHER = {ccache}" in (build / "build.ninja").read_text()
