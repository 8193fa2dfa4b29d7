# Make the small SliME: pictures with small print, a vision tower that reads it, training, evaluation.
# `make small-slime` in the folder above runs it. Existing files are kept, so an interrupted run is resumed. Language
# model and the start of the tower are parts of the small MG-LLaVA.
PYTHON := .venv/bin/python
MGLLAVA := .venv/bin/mgllava
WORLD := small-slime
PARTS := $(WORLD)/parts
MODEL := small_world/slime_model
RECIPES := small_world/recipes
# Matrix products in bfloat16: a sixth faster on CPUs that have them. `make small-slime PRECISION=` trains in float32.
PRECISION ?= training.bf16=true training.use_cpu=true

.PHONY: all
all: $(WORLD)/accuracy.json

$(WORLD)/train/boxes.json:
	$(PYTHON) -m small_world.dataset $(WORLD)/train --split fine --count 6000 --questions 5
$(WORLD)/crowded/boxes.json:
	$(PYTHON) -m small_world.dataset $(WORLD)/crowded --split fine-crowded --count 3000 --questions 1
$(WORLD)/test/boxes.json:
	$(PYTHON) -m small_world.dataset $(WORLD)/test --split fine-test --count 400 --questions 8

$(PARTS)/vision-tower/config.json:
	$(PYTHON) -m small_world.unbundle small_world/model --output $(PARTS)
$(PARTS)/tile-tower/config.json: $(PARTS)/vision-tower/config.json $(WORLD)/crowded/boxes.json $(WORLD)/test/boxes.json
	$(PYTHON) -m small_world.parts tile-tower --data $(WORLD)/crowded --test $(WORLD)/test --output $(PARTS) --max-steps 1000
$(WORLD)/start/config.json: $(PARTS)/tile-tower/config.json
	$(PYTHON) -m small_world.slime_start --parts $(PARTS) --output $(WORLD)/start

$(WORLD)/reading-1/config.json: $(WORLD)/start/config.json $(WORLD)/train/boxes.json
	$(MGLLAVA) train $(RECIPES)/small_slime_reading.yaml $(PRECISION) --resume \
		training.output_dir=$(WORLD)/reading-1 training.max_steps=800 training.learning_rate=4e-4
$(WORLD)/reading-2/config.json: $(WORLD)/reading-1/config.json
	$(MGLLAVA) train $(RECIPES)/small_slime_reading.yaml $(PRECISION) --resume \
		model.name=$(WORLD)/reading-1 training.output_dir=$(WORLD)/reading-2 training.max_steps=1300
$(WORLD)/all-kinds/config.json: $(WORLD)/reading-2/config.json
	$(MGLLAVA) train $(RECIPES)/small_slime.yaml $(PRECISION) --resume

$(MODEL)/config.json: $(WORLD)/all-kinds/config.json
	$(PYTHON) -m small_world.bundle_model $(WORLD)/all-kinds --output $(MODEL)
$(WORLD)/accuracy.json: $(MODEL)/config.json $(WORLD)/test/boxes.json
	$(PYTHON) -m small_world.evaluation $(MODEL) --data $(WORLD)/test --output $@

# The start of the trained rows of the ablation: tower and language model of the shipped model, new adapters.
$(WORLD)/ablation/parts/tile-tower/config.json:
	$(PYTHON) -m small_world.unbundle $(MODEL) --output $(WORLD)/ablation/parts
$(WORLD)/ablation/start/config.json: $(WORLD)/ablation/parts/tile-tower/config.json $(WORLD)/crowded/boxes.json
	$(PYTHON) -m small_world.slime_start --parts $(WORLD)/ablation/parts --data $(WORLD)/crowded --output $(WORLD)/ablation/start
