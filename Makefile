# make demo   what training needs, the kernels, and the comparison of natural, PGD, FGSM and YOPO training on real digits
# make test   what testing needs, the kernels, tests (aim: 5 minutes on 2 cores); compiles no CUDA unless YOPO_CUDA says so
# make test TORCH=2.14.1   the same on another torch, in an environment of its own
# make test-long   what takes longer (at most 40 minutes): slow tests, other instruction sets, thread counts and orders, CUDA
# make bench  the CPU benchmarks (within 10 minutes), the README's tables; make bench-digits: the README's comparison
# make test-gpu, make bench-gpu   on a machine with an NVIDIA GPU, nvcc and torch in $(PYTHON); nothing is fetched
# make lint | clean
PYTHON ?= python3
PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED_TORCH)
OTHER := $(filter-out $(PINNED_TORCH),$(TORCH))# empty: the torch that everything is built and measured with
VENV ?= .venv$(if $(OTHER),-torch-$(TORCH))
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(OTHER),$(VENV)/constraints.txt,constraints.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
.PHONY: demo test test-long test-binaries test-core lint bench bench-digits test-gpu bench-gpu bench-training-gpu build-gpu clean env build FORCE
.NOTPARALLEL:  # every step uses all cores by itself

env: $(VENV)/.dev
build: $(VENV)/.build

# Three sets of packages, each installed once: for the build, for the command line, for tests and linters.
# torch goes in first because the native build takes its headers.
$(VENV)/.tools: constraints.txt
	@echo "== Installing PyTorch and the build tools into $(VENV): about 250 MB to download (a CUDA build of PyTorch: 3 GB), usually 1 to 3 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(OTHER),sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^torchvision==/d' constraints.txt > $(CONSTRAINTS))
	$(PIP) torch==$(TORCH) setuptools wheel cmake ninja
	@touch $@

$(VENV)/.train: $(VENV)/.tools pyproject.toml
	@echo "== Installing the packages that training needs: about 100 MB to download, usually half a minute"
	$(BIN)/python scripts/requirements.py train > $(VENV)/requirements-train.txt
	$(PIP) -r $(VENV)/requirements-train.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "== Installing the packages that tests and linters need: about 200 MB to download, usually half a minute"
	$(BIN)/python scripts/requirements.py dev > $(VENV)/requirements-dev.txt
	$(PIP) -r $(VENV)/requirements-dev.txt
	@touch $@

# The package and its command point into this folder. The kernels come from the next rule, whose output pip would hide.
$(VENV)/.linked: $(VENV)/.train setup.py
	@echo "== Installing yopo_ext as a link to this folder: usually 5 seconds"
	$(if $(OTHER),,YOPO_EXT_BUILD_NATIVE=0 $(PIP) --quiet --no-build-isolation --no-deps --editable .)
	@touch $@

# Another torch runs the libraries that were built with the pinned one, as the wheel's users do.
# Runs every time: CMake notices changed sources, another YOPO_CUDA or CXX, and a GPU that was not there before.
$(VENV)/.build: $(VENV)/.linked FORCE
	$(if $(OTHER),$(MAKE) build VENV=.venv TORCH=$(PINNED_TORCH),PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace)
	@touch $@

# Beside the rules below, which say what these commands do.
test test-core test-long test-binaries lint: $(VENV)/.dev

demo: $(VENV)/.build
	@echo "== Training six models on the digits of scikit-learn, and attacking them: usually 2 minutes"
	$(BIN)/yopo-ext compare --seeds 0 --test-samples 200 --out runs/demo --resume auto

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

# The demo's methods with three seeds and all test images, for the README: 10 minutes on a machine with nothing else to do.
bench-digits: $(VENV)/.build
	$(BIN)/yopo-ext compare --out runs/bench-digits
	cp runs/bench-digits/comparison.json benchmarks/results/digits_comparison.json
	cp runs/bench-digits/accuracy-time.png docs/digits.png
	$(BIN)/python scripts/readme.py

build-gpu:
	YOPO_CUDA=ON $(PYTHON) setup.py --quiet build_ext --inplace

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

lint:
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info yopo_ext/lib $(VENV)/.build
