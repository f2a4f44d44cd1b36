#!/usr/bin/env bash
# What `make test` leaves out: the CUDA kernels for every architecture, the slow tests, and the suite again on other
# instruction sets, numbers of threads and in random order. Arguments: pytest's options for a parallel run.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { echo; echo "== after $((SECONDS / 60)) minutes: $* =="; }
run() { python -m pytest "$@"; }
export PYTHONPATH="$PWD"

if command -v "${CUDACXX:-nvcc}" > /dev/null; then
  step "the CUDA kernels for all architectures (about 6 minutes on 2 cores), and what ptxas says of them"
  cmake -S . -B build/cuda-report -G Ninja -DCMAKE_BUILD_TYPE=Release -DYOPO_CUDA=ON \
    -DYOPO_TORCH_DIR="$(python -c 'import torch; print(torch.__path__[0])')" > /dev/null
  cmake --build build/cuda-report --target yopo_ext_cuda
  YOPO_PTXAS_REPORTS=build/cuda-report YOPO_NEEDS_PTXAS_REPORTS=1 run -q tests/emulated/test_plans.py
else
  step "no CUDA compiler (nvcc) was found: the CUDA kernels are not compiled"
fi

step "slow tests"
run "$@" -m slow

step "AVX2 everywhere, two threads, random order"
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 YOPO_EXT_ISA=avx2 YOPO_TEST_THREADS=2 OMP_NUM_THREADS=2 \
  YOPO_TEST_SHUFFLE=${YOPO_TEST_SHUFFLE:-$RANDOM} run "$@" -m "not slow"

# The emulated kernels use neither of the package's libraries.
step "the baseline instruction set, one thread"
YOPO_EXT_ISA=baseline OMP_NUM_THREADS=1 run "$@" -m "not slow" --ignore=tests/emulated

step "without native libraries, random order"
YOPO_EXT_NATIVE=0 YOPO_TEST_SHUFFLE=${YOPO_TEST_SHUFFLE:-$RANDOM} run "$@" -m "not slow" --ignore=tests/emulated

step "more random geometries"
YOPO_TEST_EXAMPLES=400 run "$@" tests/kernels/test_operation.py tests/emulated/test_update.py -k any_geometry
