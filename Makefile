# Every command sets up what it needs: `.venv` with the package and its development tools.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
SOURCES := src tests examples benchmarks small_world

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench bench-pooling bench-convert bench-detector clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | column -t -s '	'

setup: $(VENV)/.installed  ## install the package and its tools into .venv

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable .[dev]
	touch $@

demo: setup  ## convert the small checkpoint that the repository ships, and let it answer
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

test: setup  ## run the fast tests
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-all: setup  ## run all tests, slow ones and (where there is a GPU) those for a GPU included
	$(PYTEST)

lint: setup  ## check style and types, change nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: setup  ## fix style
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: bench-pooling bench-convert bench-detector  ## run all benchmarks; results go to benchmarks/results/

bench-pooling: setup  ## box pooling against upsampling, RoI-align and mean
	$(BIN)/python benchmarks/pooling.py

bench-convert: setup  ## peak memory of converting a checkpoint of several GB
	$(BIN)/python benchmarks/convert_memory.py

bench-detector: setup  ## tags and boxes against a path of the original's shape
	$(BIN)/python benchmarks/detector.py

clean:  ## remove .venv and what the commands left
	rm -rf $(VENV) demo-output build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
