# make demo   environment, build, and the comparison of natural, PGD and YOPO training on real digits
# make test   environment, build, tests (at most 5 minutes on 2 cores); compiles no CUDA unless YOPO_CUDA says so
# make test TORCH=2.15.0   the same on another torch, in an environment of its own
# make test-long   what takes longer (at most 40 minutes): slow tests, other instruction sets, thread counts and orders, CUDA
# make bench  environment, build, the CPU benchmarks (within 10 minutes), the README's tables
# make test-gpu, make bench-gpu   on a machine with an NVIDIA GPU, nvcc and torch in $(PYTHON); nothing is fetched
# make lint | clean
PYTHON ?= python3
PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED_TORCH)
OTHER := $(filter-out $(PINNED_TORCH),$(TORCH))# empty: the torch that everything is built and measured with
VENV ?= .venv$(if $(OTHER),-torch-$(TORCH))
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(OTHER),$(VENV)/constraints.txt,constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
SOURCES := $(shell find csrc yopo_ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name 'CMakeLists.txt' -o -name '*.in')
.PHONY: demo test test-long test-binaries test-core lint bench test-gpu bench-gpu bench-training-gpu build-gpu clean env build

env: $(VENV)/.environment
build: $(VENV)/.build

# CXX and friends are read by CMake; torch goes in first because the native build takes its headers.
$(VENV)/.environment: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(OTHER),sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^torchvision==/d' constraints.txt > $(CONSTRAINTS))
	$(PIP) torch==$(TORCH) setuptools wheel cmake ninja
	$(BIN)/python scripts/requirements.py train dev > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	touch $@

# Another torch gets the libraries that were built with the pinned one, as the wheel's users do.
$(VENV)/.build: $(VENV)/.environment CMakeLists.txt setup.py $(SOURCES)
	$(if $(OTHER),$(MAKE) build VENV=.venv TORCH=$(PINNED_TORCH),PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps --editable .)
	touch $@

demo: $(VENV)/.build
	$(BIN)/yopo-ext compare --out runs/demo --resume auto

# Two processes share the tests; a process that is done takes some of the other's.
PYTEST := PYTHONPATH="$(CURDIR)" PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest
PARALLEL := -n 2 --dist worksteal --durations=20

test test-long test-core: export YOPO_CUDA ?= OFF
test: test-binaries
	$(PYTEST) $(PARALLEL) -m "not slow" $(TESTS)

# What a second torch must pass: the core, without training.
test-core: test-binaries
	$(PYTEST) $(PARALLEL) -m "not slow" --ignore=tests/training --ignore=tests/gpu tests

test-binaries: $(VENV)/.build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/binaries.py

test-long: test-binaries
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/test_long.sh $(PARALLEL)

bench: $(VENV)/.build
	$(BIN)/python benchmarks/first_layer.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python scripts/readme.py

build-gpu:
	YOPO_CUDA=ON YOPO_CUDA_ARCHITECTURES=$${YOPO_CUDA_ARCHITECTURES:-native} $(PYTHON) setup.py --quiet build_ext --inplace

test-gpu: build-gpu
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest tests/gpu

bench-gpu: build-gpu
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/first_layer_gpu.py
	$(PYTHON) scripts/readme.py

# Every method on CIFAR-10, in commands of under nine minutes, to be repeated until $(RUN)/comparison.json is there. A command
# that leaves something to do ends with make's status for any failure, 2, and says so.
DATA ?= data
RUN ?= runs/bench-training-gpu
bench-training-gpu: build-gpu
	PYTHONPATH=$(CURDIR) $(PYTHON) -m yopo_ext compare --config recipes/bench-training-gpu.yaml --data-dir $(DATA) --out $(RUN) \
	|| { status=$$?; test $$status -ne 75 || echo "not finished: run make bench-training-gpu again"; exit $$status; }
	cp $(RUN)/comparison.json benchmarks/results/cifar10_comparison.json
	$(PYTHON) scripts/readme.py

lint: $(VENV)/.environment
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info yopo_ext/lib
