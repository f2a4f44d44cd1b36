"""What tests run that must be compiled: the emulated CUDA kernels and the sanitized CPU kernels.

`python tests/binaries.py` builds all of it, on all cores; `make test` does so before pytest starts. Whoever runs pytest
alone gets the emulated kernels built by tests/conftest.py, and the rest by the tests that need it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EMULATED = Path(os.environ.get("YOPO_EMULATED_DIR", ROOT / "build" / "emulated"))
SANITIZERS = ("address,undefined", "thread")


class NoToolsError(RuntimeError):
    """Nothing can be compiled on this machine: a reason to skip, where a failed build is a defect."""


def _tool(name: str) -> str:
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if path is None:
        raise NoToolsError(f"{name} was not found")
    return path


def _run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-6000:]
        raise RuntimeError(f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{output}")


def _build(source: Path, folder: Path, options: list[str], targets: tuple[str, ...]) -> None:
    """CMake and Ninja; nothing if all is up to date. One build at a time, whatever the number of test processes.

    Raises:
        NoToolsError: CMake, Ninja or a C++ compiler is missing.
        RuntimeError: the build failed; with the end of what it printed.
    """
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise NoToolsError("no C++ compiler was found")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Ninja configures again by itself when a CMakeLists.txt has changed, but not when these options have.
        asked, said = "\n".join(options), folder / ".options"
        if not (folder / "build.ninja").exists() or not said.exists() or said.read_text() != asked:
            _run([cmake, "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options])
            said.write_text(asked)
        _run([ninja, "-C", folder, *targets])


def build_emulated(*targets: str) -> None:
    """The CUDA kernels compiled for the CPU: `_emulated`, `emulated_glue`, `emulated_race_check`. See `_build`."""
    options = [f"-D{name}_EXECUTABLE={sys.executable}" for name in ("Python3", "Python")]
    _build(ROOT / "csrc" / "testing", EMULATED, options, targets or ("_emulated",))


def build_sanitized(sanitizer: str) -> Path:
    """The program that runs the CPU kernels of every instruction set under a sanitizer. See `_build`."""
    folder = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
    torch = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    # ThreadSanitizer looks at the sharing of work, which no instruction set changes.
    isas = "" if sanitizer == "thread" else "avx512;avx2"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DYOPO_CUDA=OFF", f"-DYOPO_CPU_ISAS={isas}"]
    options += [f"-DYOPO_SANITIZE={sanitizer}", f"-DYOPO_TORCH_DIR={torch}"]
    _build(ROOT, folder, options, ("cpu_sanitized",))
    return folder / "cpu_sanitized"


if __name__ == "__main__":
    print("tests: building the emulated CUDA kernels and the sanitized CPU kernels (about 2 minutes, once)", flush=True)
    try:
        build_emulated("_emulated", "emulated_glue", "emulated_race_check")
        for sanitizer in SANITIZERS:
            build_sanitized(sanitizer)
    except NoToolsError as reason:
        print(f"tests: not built, the tests that need them are skipped ({reason})")
