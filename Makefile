# make demo: toy videos, pre-training, loss curve and figure.   make test: the tests.
# Both first make .venv, once. With another Python: make demo PYTHON=python3.12
PYTHON ?= python3
RUN = .venv/bin/python

demo: runs/pretrain-toy/reconstruction.png
	@echo "Look at runs/pretrain-toy/loss.png and runs/pretrain-toy/reconstruction.png"

runs/pretrain-toy/reconstruction.png: | .venv/installed
	$(RUN) pretrain.py $(if $(wildcard runs/pretrain-toy/checkpoint.pt),--resume)

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
