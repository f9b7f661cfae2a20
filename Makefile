# make demo: toy videos, pre-training, fine-tuning, linear probe.   make test: the tests.
# Both first make .venv, once. Another Python: make demo PYTHON=python3.12. Another seed: make demo SEED=1
PYTHON ?= python3
SEED ?= 0
RUN = .venv/bin/python
# Threads that wait do not spin: another process on one of the cores costs less.
export OMP_WAIT_POLICY = PASSIVE
S := $(if $(filter-out 0,$(SEED)),-seed$(SEED))
PRE = runs/pretrain-toy$S
INIT = --init $(PRE)/checkpoint.pt
SCRATCH = --init none --init-scale 1 --base-lr 0.008
STAGES = finetune-toy$S scratch-toy$S scratch2-toy$S linprobe-toy$S linprobe-random-toy$S
TIMES = runs/demo$S.txt

# Run a stage with the name and seed of this target, and note how long it took.
stage = @mkdir -p runs; begin=$$(date +%s); $(RUN) $(1) --seed $(SEED) --name $(@D:runs/%=%) && \
  echo "$(@D:runs/%=%) $$(($$(date +%s) - begin))" >> $(TIMES)

demo: $(STAGES:%=runs/%/results.json)
	@echo "Seconds:"
	@awk '{ s[$$1] += $$2 } END { for (n in s) printf "  %-28s%6d\n", n, s[n] }' $(TIMES) | sort -k2nr
	@echo "Top-1 of 600 test videos; 10 labelled videos per class:"
	@$(RUN) -c "import json, sys; [print(f'  {n:28}{json.load(open(f\"runs/{n}/results.json\"))[\"top1\"]:6.2f} %') \
	  for n in sys.argv[1:]]" $(STAGES)
	@echo "(scratch: without pre-training; scratch2: twice as long; random: an untrained encoder)"
	@echo "Look at $(PRE)/reconstruction.png and runs/finetune-toy$S/classes.png"

$(PRE)/reconstruction.png: | .venv/installed
	$(call stage,pretrain.py --resume)

runs/finetune-toy$S/results.json: $(PRE)/reconstruction.png
	$(call stage,finetune.py $(INIT) --resume)

runs/scratch-toy$S/results.json: $(PRE)/reconstruction.png
	$(call stage,finetune.py $(SCRATCH) --resume)

runs/scratch2-toy$S/results.json: $(PRE)/reconstruction.png
	$(call stage,finetune.py $(SCRATCH) --epochs 40 --resume)

runs/linprobe-toy$S/results.json: $(PRE)/reconstruction.png
	$(call stage,linprobe.py $(INIT))

runs/linprobe-random-toy$S/results.json: $(PRE)/reconstruction.png
	$(call stage,linprobe.py --init random)

test: .venv/installed
	$(RUN) -m pytest -n 2 --dist loadfile

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: demo test lint
