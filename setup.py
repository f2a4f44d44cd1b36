"""Runs CMakeLists.txt with Ninja; without a C++ compiler the package installs as pure Python."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


# Seconds of one core that the sources take: the CPU kernels, and the CUDA kernels once and per architecture.
CPU_SECONDS, CUDA_SECONDS, ARCHITECTURE_SECONDS = 25, 15, 45


def say(text: str) -> None:
    print(f"== yopo_ext: {text}", flush=True)


def usual_time(architectures: int, jobs: int) -> str:
    seconds = (CPU_SECONDS + (CUDA_SECONDS + ARCHITECTURE_SECONDS * architectures if architectures else 0)) / jobs
    return f"{max(10, 10 * round(seconds / 10))} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def why_pure_python() -> str | None:
    """None if the native libraries can be built, else the reason."""
    if os.environ.get("YOPO_EXT_BUILD_NATIVE", "1") == "0":
        return "YOPO_EXT_BUILD_NATIVE=0"
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        return f"no C++ compiler ({', '.join(compiler)}) was found"
    return None


def torch_dir() -> Path:
    found = importlib.util.find_spec("torch")  # importing it would take seconds
    if found is None or found.origin is None:
        sys.exit(
            "yopo_ext: the native build needs torch >= 2.10 for its headers. Install torch first when building with "
            "--no-build-isolation, or set YOPO_EXT_BUILD_NATIVE=0 for a pure-Python install."
        )
    return Path(found.origin).parent


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CMakeBuild(build_ext):
    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        cmake = shutil.which("cmake") or "cmake"
        build = ROOT / "build" / "native"
        # Each setting is given every time: the cache of an earlier build holds what that one was given.
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython3_EXECUTABLE={sys.executable}", f"-DYOPO_TORCH_DIR={torch_dir()}",
            f"-DYOPO_CUDA={os.environ.get('YOPO_CUDA', 'AUTO')}",
            f"-DYOPO_CUDA_ARCHITECTURES={os.environ.get('YOPO_CUDA_ARCHITECTURES', '')}",
        ]  # fmt: skip
        ninja = shutil.which("ninja")
        if ninja:  # an isolated build's ninja moves between builds: never keep an old path
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        say("configuring the native build: usually 2 seconds, 10 where CUDA kernels are built")
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        jobs = int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or cores())
        info = json.loads((build / "build_info.json").read_text())
        targets = [t for t in info["cuda_architectures"].split(";") if t]
        say(
            f"compiling what has changed, {jobs} files at a time; everything usually takes {usual_time(len(targets), jobs)}"
        )
        subprocess.run([cmake, "--build", str(build), "--parallel", str(jobs)], check=True)
        prefix = target / "yopo_ext" / "lib"
        subprocess.run([cmake, "--install", str(build), "--prefix", str(prefix), "--strip"], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """One wheel for every Python: the libraries use neither the Python nor an unstable C++ interface."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


reason = why_pure_python()
if reason is not None and {"bdist_wheel", "editable_wheel", "build"} & set(sys.argv):  # once, not for metadata too
    print(f"yopo_ext: pure-Python install, everything runs on PyTorch reference kernels ({reason})", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("yopo_ext.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
