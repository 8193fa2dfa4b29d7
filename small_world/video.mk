# Make the small video model: videos, three lessons that start from the small MG-LLaVA, evaluation.
# `make small-video` in the folder above runs it. Existing files are kept, so an interrupted run is resumed.
PYTHON := .venv/bin/python
MGLLAVA := .venv/bin/mgllava
WORLD := small-video
MODEL := small_world/video_model
RECIPES := small_world/recipes
# Matrix products in bfloat16: faster on CPUs that have them. `make small-video PRECISION=` trains in float32.
PRECISION ?= training.bf16=true training.use_cpu=true

.PHONY: all
all: $(WORLD)/accuracy.json

$(WORLD)/train/boxes.json:
	$(PYTHON) -m small_world.video_dataset $(WORLD)/train --count 6000 --few-frames 2
$(WORLD)/lesson/boxes.json:
	$(PYTHON) -m small_world.video_dataset $(WORLD)/lesson --split lesson --count 6000
$(WORLD)/test/boxes.json:
	$(PYTHON) -m small_world.video_dataset $(WORLD)/test --split test --first 200 --count 200

$(WORLD)/start/config.json:
	$(PYTHON) -m small_world.video_start small_world/model --output $(WORLD)/start
$(WORLD)/colors/config.json: $(WORLD)/start/config.json $(WORLD)/train/boxes.json
	$(MGLLAVA) train $(RECIPES)/small_video_colors.yaml $(PRECISION) --resume
$(WORLD)/motion/config.json: $(WORLD)/colors/config.json $(WORLD)/lesson/boxes.json
	$(MGLLAVA) train $(RECIPES)/small_video_motion.yaml $(PRECISION) --resume
$(WORLD)/all-kinds/config.json: $(WORLD)/motion/config.json
	$(MGLLAVA) train $(RECIPES)/small_video.yaml $(PRECISION) --resume

$(MODEL)/config.json: $(WORLD)/all-kinds/config.json
	$(PYTHON) -m small_world.bundle_model $(WORLD)/all-kinds --output $(MODEL)
$(WORLD)/accuracy.json: $(MODEL)/config.json $(WORLD)/test/boxes.json
	$(PYTHON) -m small_world.video_evaluation $(MODEL) --data $(WORLD)/test --output $@
