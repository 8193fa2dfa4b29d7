# Every command sets up what it needs: `.venv` with the package and its development tools.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The same packages with the oldest release of transformers that setup.cfg allows.
FLOOR := build/venv-floor
FLOOR_RELEASE := $(shell sed -n 's/.*transformers>=\([0-9.]*\).*/\1/p' setup.cfg)
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
SOURCES := src tests examples benchmarks small_world
ABLATION_WORLD := small-ablation
# Half of the shipped model's training, two runs at a time.
ABLATION := --world $(ABLATION_WORLD) --alignment 0.5 --tuning 0.5 --bf16 --jobs 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-mixins hub-check lint format bench bench-pooling bench-convert bench-detector \
	bench-quantization bench-generation bench-train bench-import refresh-code small-model ablation clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | column -t -s '	'

setup: $(VENV)/.installed  ## install the package and its tools into .venv

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable .[dev]
	touch $@

demo: setup  ## let the small model that the repository ships answer questions about new pictures
	HF_HUB_OFFLINE=1 $(BIN)/python -m small_world.demo

test: setup  ## run the fast tests
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-all: setup  ## run all tests, slow ones and (where there is a GPU) those for a GPU included
	$(PYTEST)

test-mixins: setup  ## run transformers' own test mixins, from its git tag or TRANSFORMERS_SOURCE
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.transformers_mixins -n 2

hub-check: setup $(FLOOR)/.installed  ## load exported repositories without the package, on two releases of transformers
	MGLLAVA_OTHER_PYTHON=$(FLOOR)/bin/python $(PYTEST) -n 2 tests/hub tests/test_structure.py
	HF_HUB_OFFLINE=1 MGLLAVA_OTHER_PYTHON=$(BIN)/python $(FLOOR)/bin/python -m pytest -n 2 tests/hub tests/test_structure.py

# One package is installed, the others are those of .venv.
$(FLOOR)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(FLOOR)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> `$(FLOOR)/bin/python -c "import site; print(site.getsitepackages()[0])"`/packages_of_venv.pth
	$(FLOOR)/bin/python -m pip install --quiet transformers==$(FLOOR_RELEASE)
	touch $@

lint: setup  ## check style and types, change nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: setup  ## fix style
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: bench-pooling bench-convert bench-detector bench-quantization bench-import  ## run all benchmarks; results go to benchmarks/results/

bench-pooling: setup  ## box pooling against upsampling, RoI-align and mean
	$(BIN)/python benchmarks/pooling.py

bench-convert: setup  ## peak memory of converting a checkpoint of several GB
	$(BIN)/python benchmarks/convert_memory.py

bench-detector: setup  ## tags and boxes against a path of the original's shape
	$(BIN)/python benchmarks/detector.py

bench-quantization: setup  ## accuracy and memory of quantized models
	$(BIN)/python benchmarks/quantization.py

bench-generation: setup  ## memory, first token and tokens per second at real size, on a GPU
	$(BIN)/python benchmarks/generation.py

bench-train: setup  ## training at real size on a GPU (tiny without one), and whether the processor keeps up
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/processor.py

bench-import: setup  ## import time beyond torch and transformers
	$(BIN)/python benchmarks/import_time.py

refresh-code: setup  ## copy the code in src into the shipped model, which carries it like every saved repository
	HF_HUB_OFFLINE=1 $(BIN)/python -m small_world.refresh_code

small-model: setup  ## make the small model from nothing, in small-world/ (hours; goes on where it was)
	$(MAKE) -f small_world/Makefile

ablation: setup  ## the paper's ablations at the size of the small model, from its parts (hours; goes on where it was)
	$(MAKE) -f small_world/Makefile pictures WORLD=$(ABLATION_WORLD)
	$(BIN)/python -m small_world.unbundle small_world/model --output $(ABLATION_WORLD)/parts
	$(BIN)/python -m small_world.ablation main --seeds 3 $(ABLATION)
	$(BIN)/python -m small_world.ablation fusion merging boxes $(ABLATION)

clean:  ## remove .venv and what the commands left
	rm -rf $(VENV) demo-output build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
