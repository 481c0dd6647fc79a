# make setup | check | test | test-full | demo. A machine with Python 3.11 and make is enough; everything goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: setup check test test-full demo

setup: $(STAMP)

# torch first: packages that build against it have to find it.
$(STAMP): pyproject.toml setup.py constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest -m 'not full and not gpu'

test-full: setup
	$(BIN)/python -m pytest -m 'not gpu'

demo: setup
	$(BIN)/python examples/demo/run.py
