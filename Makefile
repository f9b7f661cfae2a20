# make demo: toy videos, pre-training, fine-tuning, linear probe.   make test: the tests.
# Both first make .venv, once. With another Python: make demo PYTHON=python3.12. Another seed: make demo SEED=1
PYTHON ?= python3
SEED ?= 0
RUN = .venv/bin/python
S := $(if $(filter-out 0,$(SEED)),-seed$(SEED))
PRE = runs/pretrain-toy$S
FINE = $(RUN) finetune.py --seed $(SEED) --name
SCRATCH = --init none --init-scale 1 --base-lr 0.008
PROBE = $(RUN) linprobe.py --seed $(SEED) --name
STAGES = finetune-toy$S scratch-toy$S scratch2-toy$S linprobe-toy$S linprobe-random-toy$S

demo: $(STAGES:%=runs/%/results.json)
	@echo "Top-1 of 600 test videos; 10 labelled videos per class:"
	@$(RUN) -c "import json, sys; [print(f'{name:28}{json.load(open(f\"runs/{name}/results.json\"))[\"top1\"]:6.2f} %') \
	  for name in sys.argv[1:]]" $(STAGES)
	@echo "(scratch: the same fine-tuning without pre-training; scratch2: twice as long; random: an untrained encoder)"
	@echo "Look at $(PRE)/reconstruction.png and runs/finetune-toy$S/classes.png"

$(PRE)/reconstruction.png: | .venv/installed
	$(RUN) pretrain.py --seed $(SEED) --name pretrain-toy$S --resume
	@test -f $@  # not if a signal stopped it

runs/finetune-toy$S/results.json: $(PRE)/reconstruction.png
	$(FINE) finetune-toy$S --init $(PRE)/checkpoint.pt --resume

runs/scratch-toy$S/results.json: $(PRE)/reconstruction.png
	$(FINE) scratch-toy$S $(SCRATCH) --resume

runs/scratch2-toy$S/results.json: $(PRE)/reconstruction.png
	$(FINE) scratch2-toy$S $(SCRATCH) --epochs 40 --resume

runs/linprobe-toy$S/results.json: $(PRE)/reconstruction.png
	$(PROBE) linprobe-toy$S --init $(PRE)/checkpoint.pt

runs/linprobe-random-toy$S/results.json: $(PRE)/reconstruction.png
	$(PROBE) linprobe-random-toy$S --init random

test: .venv/installed
	$(RUN) -m pytest

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: demo test lint
