# Every target makes the environment it needs; nothing is installed by hand.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# FAISS owns one import name in two distributions: `make FAISS=gpu …` on a CUDA host.
FAISS  ?= cpu

.PHONY: help install quickstart test lint format bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

install: $(VENV)/.installed  ## make the virtual environment

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or set PYTHON=…"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(FAISS),quickstart,dev]"
	@touch $@

quickstart: install  ## text to a served, trained retriever, on this machine
	$(BIN)/raycolbert pipeline recipes/quickstart.yaml --report quickstart

test: install  ## all tests, two files at a time: much of an integration test is waiting for processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install  ## format check, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install  ## the benchmarks, in their quick form
	@for program in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$program .py) --quick || exit 1; done

clean:  ## remove the environment and what quickstart wrote
	rm -rf $(VENV) quickstart
