# make demo: toy videos, pre-training, loss curve and figure.   make test: the tests.
# Both first make .venv, once. To use another Python or a ready environment: make demo PYTHON=python3.12 VENV=path
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

demo: runs/pretrain-toy/reconstruction.png
	@echo "Look at runs/pretrain-toy/loss.png and runs/pretrain-toy/reconstruction.png"

runs/pretrain-toy/reconstruction.png: | $(VENV)/installed
	$(RUN) pretrain.py $(if $(wildcard runs/pretrain-toy/checkpoint.pt),--resume)

test: $(VENV)/installed
	$(RUN) -m pytest

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: demo test lint
