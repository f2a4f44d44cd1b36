"""Runs CMakeLists.txt with Ninja; without a C++ compiler the package installs as pure Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def why_pure_python() -> str | None:
    """None if the native libraries can be built, else the reason."""
    if os.environ.get("YOPO_EXT_BUILD_NATIVE", "1") == "0":
        return "YOPO_EXT_BUILD_NATIVE=0"
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        return f"no C++ compiler ({', '.join(compiler)}) was found"
    return None


def torch_dir() -> Path:
    try:
        import torch
    except ImportError:
        sys.exit(
            "yopo_ext: the native build needs torch >= 2.10 for its headers. Install torch first when building with "
            "--no-build-isolation, or set YOPO_EXT_BUILD_NATIVE=0 for a pure-Python install."
        )
    return Path(torch.__path__[0])


class CMakeBuild(build_ext):
    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        cmake = shutil.which("cmake") or "cmake"
        build = ROOT / "build" / "native"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DYOPO_TORCH_DIR={torch_dir()}", f"-DYOPO_CUDA={os.environ.get('YOPO_CUDA', 'AUTO')}",
        ]  # fmt: skip
        if "YOPO_CUDA_ARCHITECTURES" in os.environ:
            configure.append(f"-DYOPO_CUDA_ARCHITECTURES={os.environ['YOPO_CUDA_ARCHITECTURES']}")
        ninja = shutil.which("ninja")
        if ninja:  # an isolated build's ninja moves between builds: never keep an old path
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
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
