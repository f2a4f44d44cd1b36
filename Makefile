# make demo   environment, build, and the comparison of natural, PGD and YOPO training on real digits
# make test   environment, build, all tests
# make bench  environment, build, the CPU benchmarks (within 10 minutes), the README's tables
# make test-gpu, make bench-gpu   on a machine with an NVIDIA GPU, nvcc and torch in $(PYTHON); nothing is fetched
# make lint | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc yopo_ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name 'CMakeLists.txt' -o -name '*.in')
.PHONY: demo test lint bench test-gpu bench-gpu bench-training-gpu build-gpu clean env build

env: $(VENV)/.environment
build: $(VENV)/.build

# CXX and friends are read by CMake; torch goes in first because the native build takes its headers.
$(VENV)/.environment: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 setuptools wheel cmake ninja
	$(BIN)/python scripts/requirements.py train dev > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.build: $(VENV)/.environment CMakeLists.txt setup.py $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps --editable .
	touch $@

demo: $(VENV)/.build
	$(BIN)/yopo-ext compare --out runs/demo --resume auto

test: $(VENV)/.build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest

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

# Every method on CIFAR-10 (DATASET=cifar100: on CIFAR-100), in commands of under nine minutes, to be repeated until $(RUN)/comparison.json is there. A command
# that leaves something to do ends with make's status for any failure, 2, and says so.
DATA ?= data
DATASET ?= cifar10
RUN ?= runs/bench-training-gpu-$(DATASET)
bench-training-gpu: build-gpu
	PYTHONPATH=$(CURDIR) $(PYTHON) -m yopo_ext compare --config recipes/fastat-resnet18.yaml --dataset $(DATASET) --data-dir $(DATA) --out $(RUN) \
	|| { status=$$?; test $$status -ne 75 || echo "not finished: run make bench-training-gpu again"; exit $$status; }
	cp $(RUN)/comparison.json benchmarks/results/$(DATASET)_comparison.json
	$(PYTHON) scripts/readme.py

lint: $(VENV)/.environment
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info yopo_ext/lib
